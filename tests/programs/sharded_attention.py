"""Runs `attention` over 4 devices in several ways and prints one JSON line per way; see test_attention_sharding.py."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fgattn_jax.attention import attention
from fgattn_jax.evaluation.cases import AttentionCase, make_inputs
from fgattn_jax.evaluation.oracle import attention_oracle, gradient_oracle
from fgattn_jax.masks import SliceMask

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


def collectives(compiled) -> dict[str, int]:
    text = compiled.as_text()
    return {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in COLLECTIVES}


def mask_parts(mask: SliceMask, arrays) -> SliceMask:
    return SliceMask(*arrays, query_block=mask.query_block, num_keys=mask.num_keys, num_queries=mask.num_queries)


def main(kind: str, axis: str, mask_axes: str) -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit if kind == "explicit" else AxisType.Auto,))
    one = 1 if mask_axes == "shared" else None
    case = AttentionCase(
        "sharded", "", batch=4, num_queries=70, num_keys=99, num_heads=8, num_kv_heads=4, head_dim=16, query_block=16,
        mask_batch=one, mask_heads=one, ordered=True,
    )  # fmt: skip
    inputs = make_inputs(case)
    spec = P(None, None, "x") if axis == "heads" else P("x")
    mask_spec = P() if one else (P(None, "x") if axis == "heads" else P("x"))
    if axis == "queries":
        spec, mask_spec = P(None, "x"), P()
    d_output = jnp.asarray(np.random.default_rng(3).standard_normal(inputs.query.shape), jnp.float32)

    def run(query, key, value, mask):
        return attention(query, key, value, mask, implementation="xla")

    def grad(query, key, value, mask, d_output):
        return jax.vjp(lambda *a: run(*a, mask), query, key, value)[1](d_output)

    rows = inputs.rows
    if mask_axes == "none":
        rows = np.ones_like(rows)

        def run(query, key, value, mask):
            return attention(query, key, value)

    if kind == "shard_map":
        inner, inner_mask = (spec,) * 3, mask_spec
        run = jax.shard_map(run, mesh=mesh, in_specs=(*inner, inner_mask), out_specs=spec)
    with jax.set_mesh(mesh):

        def put(x, where):
            return jax.device_put(x, NamedSharding(mesh, where))

        even = axis != "queries"  # 70 queries do not divide by 4: the sequence stays whole on each device's copy
        arrays = [put(x, spec if even else P()) for x in (inputs.query, inputs.key, inputs.value)]
        mask = mask_parts(inputs.mask, [put(x, mask_spec) for x in (inputs.mask.bits, inputs.mask.query_order)])
        forward = jax.jit(run).lower(*arrays, mask).compile()
        backward = jax.jit(grad).lower(*arrays, mask, put(d_output, spec if even else P())).compile()
        output, grads = forward(*arrays, mask), backward(*arrays, mask, put(d_output, spec if even else P()))
    kwargs = {"query_block": 16, "scale": case.scale, "order": inputs.order}
    wanted, _ = attention_oracle(inputs.query, inputs.key, inputs.value, rows, **kwargs)
    no_lse = np.zeros((4, 8, 70))
    wanted_grads = gradient_oracle(inputs.query, inputs.key, inputs.value, rows, np.asarray(d_output), no_lse, **kwargs)
    print(
        json.dumps(
            {
                "error": float(np.abs(np.asarray(output) - wanted).max()),
                "gradient_error": max(
                    float(np.abs(np.asarray(g) - w).max()) for g, w in zip(grads, wanted_grads, strict=True)
                ),
                "forward": collectives(forward),
                "backward": collectives(backward),
                "sharded": not output.sharding.is_fully_replicated,
            }
        )
    )


main(*sys.argv[1:4])
