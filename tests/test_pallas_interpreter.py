"""The Pallas kernel in Pallas' interpreter, with race detection, against the oracle: no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attention_bounds import LSE_CEILING

from fgattn_jax.pallas_kernels import support

ROOT = Path(__file__).resolve().parent.parent
REASONS = support.version_reasons()
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS) or "nothing")

slow = pytest.mark.slow
TWO_HEADS = {"batch": 1, "num_heads": 2, "num_queries": 128}
CASES = [
    pytest.param("plain", {}, id="two rows a block, 64 queries each"),
    pytest.param("more keys than queries", {"query_block": 128, "stages": 3}, marks=slow, id="two warpgroups a row"),
    pytest.param("query order", {"smaller": TWO_HEADS}, marks=slow, id="queries in another order"),
    pytest.param("shared query order", {"smaller": TWO_HEADS}, marks=slow, id="a query order that heads share"),
    pytest.param("grouped heads", {"smaller": TWO_HEADS | {"num_kv_heads": 1}}, marks=slow, id="heads that share keys"),
    pytest.param("shared mask", {"smaller": TWO_HEADS | {"num_kv_heads": 2}}, marks=slow, id="a mask that heads share"),
    pytest.param("one key", {"query_block": 128}, marks=slow, id="one key"),
    pytest.param("one query", {}, marks=slow, id="one query"),
    pytest.param("empty", {}, marks=slow, id="rows without a key"),
    pytest.param("float16", {"query_block": 128, "head_dim": 128}, marks=slow, id="float16, heads of 128"),
    pytest.param("plain", {"scale": -0.125}, marks=slow, id="a negative scale"),
    pytest.param(
        "more keys than queries", {"rise": 1.0, "scale": 1.0, "stages": 3}, marks=slow, id="rising scores"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_the_interpreted_kernel_matches_the_oracle_without_races(name, changes):
    # Each warpgroup is a thread that may wait for the others: fewer threads than warpgroups would wait forever.
    env = os.environ | {
        "NPROC": "16",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    program = [sys.executable, str(ROOT / "tests" / "programs" / "interpret_pallas.py"), json.dumps({name: changes})]
    done = subprocess.run(program, env=env, timeout=600, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["error"] <= got["bound"]
    assert got["lse_error"] <= LSE_CEILING["bfloat16"]
    assert got["same_empty_rows"]
    assert not got["races"]
