"""HunyuanVideo against golden files of diffusers (tests/programs/make_hunyuan_golden.py)."""

import functools

import hunyuan_cases
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fgattn_jax.models import hunyuan_video

MODULES = ("patch", "conditioning", "refiner", "dual", "single", "final", "whole")


@functools.cache
def golden():
    return load_file(hunyuan_cases.GOLDEN / "modules.safetensors")


@functools.cache
def model(dtype):
    return hunyuan_video.load(hunyuan_cases.GOLDEN, dtype=dtype)


def run(name, dtype):
    inputs = {key.removeprefix("input/"): value for key, value in golden().items() if key.startswith("input/")}
    output = hunyuan_cases.run_module(model(dtype), name, inputs)
    assert output.dtype == dtype
    return output


@pytest.mark.parametrize("name", MODULES)
def test_float32_equals_diffusers(name):
    assert hunyuan_cases.distance(run(name, jnp.float32), golden()[f"{name}/float32"]) <= 1e-5


@pytest.mark.parametrize("name", MODULES)
def test_bfloat16_is_as_near_as_diffusers_in_float32(name):
    theirs = golden()[f"{name}/bfloat16"]
    rounding = hunyuan_cases.distance(theirs, golden()[f"{name}/float32"])
    assert hunyuan_cases.distance(run(name, jnp.bfloat16), theirs) <= 1.5 * rounding


def test_golden_inputs_are_no_special_case():
    lengths, text = golden()["input/lengths"], golden()["input/text"]
    assert lengths.tolist() == [1, text.shape[1]]
    assert len(set(golden()["input/timestep"].tolist())) == 2
    assert all(size % 2 for size in model(jnp.float32).config.grid(*golden()["input/latents"].shape[2:]))
    # Every parameter counts: none is constant.
    for name, stored in load_file(hunyuan_cases.GOLDEN / "transformer/diffusion_pytorch_model.safetensors").items():
        assert np.ptp(stored.astype(np.float32)) > 0.1, name
