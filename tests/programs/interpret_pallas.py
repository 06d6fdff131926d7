"""Runs the Pallas kernel in Pallas' interpreter, with race detection, on cases of the shared table.

Started by test_pallas_interpreter.py in a process of its own: the interpreter keeps state, and XLA's CPU client needs
more threads than a small machine has cores (NPROC), since every warpgroup may wait for the others.

    NPROC=16 python tests/programs/interpret_pallas.py '{"plain": {"query_block": 64}}'

The argument maps names of cases to changes of what tests/cuda_cases.py makes of them (`smaller` changes the case:
a row of the mask takes seconds); JSON comes back.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from attention_bounds import output_bound
from cuda_cases import for_cuda
from jax.experimental.pallas import mosaic_gpu as plgpu

from fgattn_jax.evaluation.cases import SMALL_CASES, make_inputs
from fgattn_jax.evaluation.oracle import attention_oracle
from fgattn_jax.pallas_kernels.attention import forward
from fgattn_jax.pallas_kernels.config import KernelConfig

NAMED = {case.name: case for case in SMALL_CASES}


def run(name: str, changes: dict) -> dict:
    """One case: largest errors, their bound, and whether the interpreter saw a race."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    stages = changes.pop("stages", 2)
    scale, rise = changes.pop("scale", None), changes.pop("rise", 0.0)
    smaller = changes.pop("smaller", {})
    case = dataclasses.replace(for_cuda(NAMED[name], **{"head_dim": 64, **changes}), **smaller)
    inputs = make_inputs(case)
    if rise:
        # Every key scores higher than the one before it.
        slope = jnp.linspace(-rise, rise, case.num_keys)[None, :, None, None]
        inputs = inputs._replace(
            query=jnp.ones_like(inputs.query), key=jnp.broadcast_to(slope, inputs.key.shape).astype(inputs.key.dtype)
        )
    scale = scale if scale is not None else (case.scale if case.scale is not None else case.head_dim**-0.5)
    config = KernelConfig(tile_keys=case.query_block, stages=stages)
    mask = inputs.mask
    output, lse = forward(
        inputs.query, inputs.key, inputs.value, mask.bits, mask.query_order, mask.work_order,
        scale=scale, query_block=case.query_block, config=config, interpret=True,
    )  # fmt: skip
    expected, expected_lse = attention_oracle(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.rows,
        query_block=case.query_block,
        scale=scale,
        order=inputs.order,
    )
    finite = np.isfinite(expected_lse)
    return {
        "case": name,
        "error": float(np.abs(np.asarray(output, np.float64) - expected).max()),
        "bound": float(output_bound(case, inputs, expected)),
        "lse_error": float(np.abs(np.asarray(lse, np.float64)[finite] - expected_lse[finite]).max(initial=0)),
        "same_empty_rows": bool((np.isneginf(np.asarray(lse)) == np.isneginf(expected_lse)).all()),
        "races": bool(interpret_pallas_call.get_races().races_found),
    }


def main(cases: dict[str, dict]) -> None:
    """All cases as an H100 would run them."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    params = plgpu.InterpretGPUParams(detect_races=True)
    with jax.sharding.use_abstract_mesh(mesh), plgpu.force_gpu_interpret_mode(params):
        for name, changes in cases.items():
            print(json.dumps(run(name, changes)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
