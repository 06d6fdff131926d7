"""Runs CUDA kernels inside a captured command buffer; prints whether that was so and whether the results are equal.

Started by test_hopper_gpu.py with the XLA flags that make every launch part of a command buffer and dump the program.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fgattn_jax.attention import attention_with_lse
from fgattn_jax.evaluation.cases import AttentionCase, make_inputs
from fgattn_jax.xla_ffi import masks, support

CASE = AttentionCase(
    "captured", "", num_queries=700, num_keys=900, num_heads=4, num_kv_heads=2, head_dim=128, query_block=128,
    dtype="bfloat16",
)  # fmt: skip


def attend(query, key, value, mask):
    return attention_with_lse(query, key, value, mask, implementation="cuda")


def make_mask(query, key, value, mask):
    """Bits and counts of mean queries: each kernel but the first may start before the one before it has ended."""
    del value, mask
    limits = jnp.full((CASE.num_heads,), -7.0, jnp.float32)
    return masks.mean_mask(query, key, limits, None, scale=jnp.float32(0.1), query_block=128, keep_best=True)


def between(call):
    """The call with kernels of XLA before and behind it."""

    @jax.jit
    def between_other_kernels(query, key, value, mask):
        first, second = call(jnp.sin(query), key, value, mask)
        return (jnp.cos(first), second + 1) if call is attend else (first ^ 1, second + 1)

    return between_other_kernels


def captured(compiled_text: str, dump: Path) -> bool:
    """Whether every call of the kernels stands inside a command buffer.

    Older versions of XLA move calls there in the HLO, newer ones in the list of thunks, where members are indented.
    """
    for computation in compiled_text.split("\n\n"):
        if "command_buffer" in computation.partition("{")[0] and "fgattn_" in computation:
            return True
    for file in dump.glob("*between_other_kernels*thunk_sequence*"):
        lines = file.read_text(errors="replace").splitlines()
        calls = [line for line in lines if ": kCustomCall" in line]
        if calls and any(": kCommandBuffer" in line for line in lines):
            return all(line.startswith(" ") for line in calls)
    return False


def main(what: str, dump: str) -> None:
    support.RELEASED = support.MASKS_RELEASED = True
    inputs = make_inputs(CASE)
    mask = inputs.mask.with_work_order() if what == "work_order" else inputs.mask
    arrays = (inputs.query, inputs.key, inputs.value, mask)
    call = make_mask if what == "mean_mask" else attend
    first, second = jax.jit(call)(jnp.sin(inputs.query), *arrays[1:])
    last = jnp.cos(first) if call is attend else first ^ 1
    expected = [np.asarray(x) for x in (last, second + 1)]
    compiled = between(call).lower(*arrays).compile()
    equal = True
    other = make_inputs(CASE, seed=1)
    for _ in range(4):  # a graph is recorded at the first or second run, and replayed afterwards
        for got, want in zip(compiled(*arrays), expected, strict=True):
            equal &= bool(np.array_equal(np.asarray(got), want))
        compiled(other.query, *arrays[1:])  # other buffers: the graph is updated
    print(json.dumps({"equal": equal, "captured": captured(compiled.as_text(), Path(dump))}))


main(*sys.argv[1:3])
