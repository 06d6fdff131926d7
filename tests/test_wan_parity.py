"""Wan against recorded outputs of diffusers (tests/programs/make_wan_golden.py), part by part and as a whole."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from wan_cases import check_bfloat16, check_float32, parts

from fgattn_jax.models import wan

GOLDEN = Path(__file__).parent / "golden" / "wan"


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, np.ndarray]]:
    return {name: load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "float32", "bfloat16")}


def test_float32_agrees_with_diffusers_in_every_part(golden):
    model = wan.load(GOLDEN, dtype=jnp.float32)
    check_float32(parts(model, golden["inputs"], golden["float32"]), golden["float32"])


def test_bfloat16_rounds_where_diffusers_does(golden):
    model = wan.load(GOLDEN, dtype=jnp.bfloat16)
    ours = parts(model, golden["inputs"], golden["bfloat16"])
    check_bfloat16(ours, golden["bfloat16"], golden["float32"])


def test_the_golden_run_tells_entries_times_and_text_apart(golden):
    """What is recorded depends on all that is given: swapped times or text are far away."""
    model = wan.load(GOLDEN, dtype=jnp.float32)
    inputs = golden["inputs"]
    graph, params = nnx.split(model)

    @jax.jit
    def run(params, latents, timestep, text):
        return nnx.merge(graph, params)(latents, timestep, wan.WanCondition(text)).velocity

    given = {"latents": inputs["latents"], "timestep": inputs["timestep"], "text": inputs["text"]}
    for name in given:
        swapped = given | {name: given[name][::-1]}
        velocity = run(params, **swapped)
        difference = np.linalg.norm(velocity - golden["float32"]["velocity"])
        assert difference > 0.02 * np.linalg.norm(golden["float32"]["velocity"]), name


def test_the_golden_files_stay_small():
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 300_000
