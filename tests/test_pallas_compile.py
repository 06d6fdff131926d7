"""What ptxas makes of the Pallas kernel: registers, machine code, time. `make test-pallas-compile` runs it.

It compiles for an H100 and needs no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.pallas_compile

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "programs" / "compile_for_h100.py"
REGISTERS_OF_AN_SM = 65536
THREADS = 512  # of the only block on a multiprocessor: two warpgroups gather, two multiply
MOST_SECONDS = 60.0  # measured on two shared cores: 3 to 8

WIDE = {"head_dim": 128, "query_block": 128}
FORMS: dict[str, dict[str, Any]] = {
    **{
        f"{dtype}-H{head_dim}-M{query_block}": {"head_dim": head_dim, "query_block": query_block, "dtype": dtype}
        for dtype in ("bfloat16", "float16")
        for head_dim in (64, 128)
        for query_block in (64, 128)
    },
    # Each of these changes what the kernel reads, or where.
    "ordered": WIDE | {"ordered": True},
    "grouped heads": WIDE | {"num_kv_heads": 4},
    "mask for all heads": WIDE | {"mask_heads": 1},
    "mask for the whole batch": WIDE | {"mask_batch": 1},
    "everything at once": {
        "head_dim": 64, "query_block": 64, "ordered": True, "num_kv_heads": 1, "mask_batch": 1, "mask_heads": 1,
    },
}  # fmt: skip


def compile_for_h100(form: dict[str, Any]) -> dict[str, Any]:
    # Flags of the caller's would change what is compiled, or where it is said.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "MOSAIC_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, PROGRAM, json.dumps(form)],
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=FORMS)
def compiled(request, pytestconfig) -> dict[str, Any]:
    found = compile_for_h100(FORMS[request.param])
    # The figures are what a reader of a CI log wants to compare.
    with pytestconfig.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{request.param}: {json.dumps(found)}")
    return found


def test_no_register_is_spilled(compiled):
    assert (compiled["spill_bytes"], compiled["stack_bytes"], compiled["local_memory"]) == (0, 0, 0)


def test_ptxas_does_not_warn(compiled):
    assert compiled["warnings"] == []


def test_the_launch_has_every_register_of_the_multiprocessor(compiled):
    # The warpgroups share them out anew at their start. Fewer at the launch, and they ask for more than the block has.
    assert compiled["registers"] == REGISTERS_OF_AN_SM // THREADS


def test_the_kernel_multiplies_on_tensor_cores_and_copies_16_bytes_at_a_time(compiled):
    assert compiled["architecture"] == "sm_90a"
    assert compiled["hgmma"] > 0
    assert compiled["ldgsts_128"] > 0


def test_a_compilation_takes_less_than_a_minute(compiled):
    assert compiled["compile_seconds"] < MOST_SECONDS


def test_a_kernel_with_too_few_registers_is_found_out():
    # Without it nobody would notice if ptxas said the same in other words.
    found = compile_for_h100(WIDE | {"config": {"tile_keys": 128, "stages": 3, "compute_registers": 136}})
    assert min(found["spill_bytes"], found["stack_bytes"], found["local_memory"]) > 0
    assert any("(C7512) Potential Performance Loss" in warning for warning in found["warnings"])
