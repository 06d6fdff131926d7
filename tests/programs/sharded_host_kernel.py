"""Runs `implementation="cuda"` on the host kernel over 2 emulated devices, and prints along which axes it sharded."""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from host_kernel import installed

from fgattn_jax.attention import AttentionOutput, attention_with_lse
from fgattn_jax.evaluation.cases import AttentionCase, make_inputs

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
CASE = AttentionCase(
    "sharded", "", batch=2, num_queries=150, num_keys=99, num_heads=4, num_kv_heads=2, head_dim=64, query_block=64,
    dtype="bfloat16", ordered=True,
)  # fmt: skip


def whole(query, key, value, mask):
    return attention_with_lse(query, key, value, mask, implementation="cuda")


def main(kind: str, library: str) -> None:
    inputs = make_inputs(CASE)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit if kind == "explicit" else AxisType.Auto,))
    for axis in ("heads", "batch"):
        spec, of_mask = (P(None, None, "x"), P(None, "x")) if axis == "heads" else (P("x"), P("x"))
        run = whole
        if kind == "shard_map":
            specs = (spec, spec, spec, of_mask)
            run = jax.shard_map(whole, mesh=mesh, in_specs=specs, out_specs=AttentionOutput(spec, of_mask))
        for mask in (inputs.mask, inputs.mask.with_work_order()):
            with installed(Path(library)):
                expected = whole(inputs.query, inputs.key, inputs.value, mask)
                with jax.set_mesh(mesh):
                    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in inputs[:3]]
                    sharded = jax.device_put(mask, NamedSharding(mesh, of_mask))
                    compiled = jax.jit(run).lower(*arrays, sharded).compile()
                    got = compiled(*arrays, sharded)
            text = compiled.as_text() or ""
            assert "fgattn_host_attention" in text, text
            assert not [name for name in COLLECTIVES if name in text], text
            assert not got.output.sharding.is_fully_replicated
            for one, other in zip(got, expected, strict=True):
                np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
        print(axis)


main(*sys.argv[1:3])
