"""Heads or batch sharded over four devices: same numbers, no communication, forward and gradient."""

import json
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs" / "sharded_attention.py"
pytestmark = pytest.mark.multidevice


def run_sharded(run_python, kind: str, axis: str, mask: str) -> dict:
    code = f"import runpy, sys; sys.argv[1:] = {[kind, axis, mask]!r}; runpy.run_path({str(PROGRAM)!r})"
    return json.loads(run_python(code, devices=4).splitlines()[-1])


@pytest.mark.parametrize("mask", ["own", pytest.param("shared", marks=pytest.mark.slow)])
@pytest.mark.parametrize("axis", ["heads", "batch"])
@pytest.mark.parametrize("kind", ["jit", "explicit"])
def test_sharded_heads_or_batch_need_no_communication(run_python, kind, axis, mask):
    got = run_sharded(run_python, kind, axis, mask)
    assert got["error"] < 5e-6
    assert got["gradient_error"] < 2e-5
    assert got["sharded"]
    assert got["forward"]["all-gather"] == got["backward"]["all-gather"] == 0
    assert sum(got["forward"].values()) == sum(got["backward"].values()) == 0


@pytest.mark.parametrize("kind", ["jit", "explicit"])
def test_dense_attention_needs_no_communication_either(run_python, kind):
    got = run_sharded(run_python, kind, "heads", "none")
    assert got["error"] < 5e-6
    assert got["gradient_error"] < 2e-5
    assert sum(got["forward"].values()) == sum(got["backward"].values()) == 0


def test_shard_map_runs_the_local_call(run_python):
    got = run_sharded(run_python, "shard_map", "heads", "own")
    assert got["error"] < 5e-6
    assert got["gradient_error"] < 2e-5
    assert sum(got["forward"].values()) == sum(got["backward"].values()) == 0


def test_replicated_arrays_on_a_mesh_stay_right(run_python):
    got = run_sharded(run_python, "jit", "queries", "shared")
    assert got["error"] < 5e-6
    assert got["gradient_error"] < 2e-5
