"""Runs the CUDA kernel inside a captured command buffer; prints whether that was so and whether the results are equal.

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
from fgattn_jax.xla_ffi import support

CASE = AttentionCase(
    "captured", "", num_queries=700, num_keys=900, num_heads=4, num_kv_heads=2, head_dim=128, query_block=128,
    dtype="bfloat16",
)  # fmt: skip


def attend(query, key, value, mask):
    return attention_with_lse(query, key, value, mask, implementation="cuda")


@jax.jit
def between_other_kernels(query, key, value, mask):
    output, lse = attend(jnp.sin(query), key, value, mask)
    return jnp.cos(output), lse + 1


def captured(compiled_text: str, dump: Path) -> bool:
    """Whether every call of the kernels stands inside a command buffer.

    Older versions of XLA move calls there in the HLO, newer ones in the list of thunks, where members are indented.
    """
    for computation in compiled_text.split("\n\n"):
        if "command_buffer" in computation.partition("{")[0] and "fgattn_attention" in computation:
            return True
    for file in dump.glob("*between_other_kernels*thunk_sequence*"):
        lines = file.read_text(errors="replace").splitlines()
        calls = [line for line in lines if ": kCustomCall" in line]
        if calls and any(": kCommandBuffer" in line for line in lines):
            return all(line.startswith(" ") for line in calls)
    return False


def main(with_work: str, dump: str) -> None:
    support.RELEASED = True
    inputs = make_inputs(CASE)
    mask = inputs.mask.with_work_order() if with_work == "work_order" else inputs.mask
    arrays = (inputs.query, inputs.key, inputs.value, mask)
    output, lse = jax.jit(attend)(jnp.sin(inputs.query), *arrays[1:])
    expected = [np.asarray(x, np.float32) for x in (jnp.cos(output), lse + 1)]
    compiled = between_other_kernels.lower(*arrays).compile()
    equal = True
    other = make_inputs(CASE, seed=1)
    for _ in range(4):  # a graph is recorded at the first or second run, and replayed afterwards
        for got, want in zip(compiled(*arrays), expected, strict=True):
            equal &= bool(np.array_equal(np.asarray(got, np.float32), want))
        compiled(other.query, *arrays[1:])  # other buffers: the graph is updated
    print(json.dumps({"equal": equal, "captured": captured(compiled.as_text(), Path(dump))}))


main(*sys.argv[1:3])
