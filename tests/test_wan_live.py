"""Wan against the installed diffusers, on fresh random models and checkpoints that diffusers wrote."""

import importlib
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from wan_cases import check_bfloat16, check_float32, parts

from fgattn_jax.models import wan
from fgattn_jax.models._leaves import named_leaves
from fgattn_jax.models.video.checkpoint import save_diffusers
from fgattn_jax.models.wan.weights import tensor_names


@pytest.fixture(scope="module")
def golden(torch_models) -> ModuleType:
    """The functions of tests/programs/make_wan_golden.py, which need torch."""
    return importlib.import_module("programs.make_wan_golden")


def recorded(golden: ModuleType, folder: Path, inputs: dict, dtype: str) -> dict[str, np.ndarray]:
    values = golden.record(folder, inputs, getattr(golden.torch, dtype))
    return {name: np.asarray(value.float().numpy(), jnp.dtype(dtype)) for name, value in values.items()}


@pytest.mark.parametrize(
    ("latents", "sizes"),
    [
        # Latents of one frame and one row of patches; heads whose rotary parts are 4, 2 and 2 channels wide.
        ((1, 2, 6), {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 3}),
        # More tokens than a block of 128 queries, more layers than two; head width 48: parts of 16 each.
        ((5, 10, 14), {"num_layers": 3, "attention_head_dim": 48, "num_attention_heads": 2, "ffn_dim": 64}),
    ],
    ids=["one row", "175 tokens"],
)
def test_fresh_models_agree_in_both_dtypes(golden, tmp_path, latents, sizes):
    model = golden.make_model(seed=sum(latents), **sizes)
    golden.save_model(model, tmp_path, max_shard_size="40KB")
    assert list((tmp_path / "transformer").glob("*.index.json"))
    inputs = golden.make_inputs(5, dict(model.config), latents)
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    exact = recorded(golden, tmp_path, inputs, "float32")
    check_float32(parts(wan.load(tmp_path, dtype=jnp.float32), arrays, exact), exact)
    theirs = recorded(golden, tmp_path, inputs, "bfloat16")
    check_bfloat16(parts(wan.load(tmp_path, dtype=jnp.bfloat16), arrays, theirs), theirs, exact)


def test_the_parameters_kept_in_float32_are_those_of_diffusers(golden, tmp_path):
    golden.save_model(golden.make_model(seed=0), tmp_path)
    theirs = dict(golden.load_model(tmp_path, golden.torch.bfloat16).named_parameters())
    model = wan.load(tmp_path, dtype=jnp.bfloat16)
    ours = named_leaves(nnx.state(model, nnx.Param))
    sources = tensor_names(model.config)
    assert {tensor for source in sources.values() for tensor in source.tensors()} == theirs.keys()
    for name, source in sources.items():
        for tensor in source.tensors():
            assert str(theirs[tensor].dtype) == f"torch.{ours[name].dtype}", tensor


def test_what_is_written_here_is_read_by_diffusers(golden, tmp_path):
    config = wan.WanConfig(
        num_layers=2, num_heads=2, head_dim=16, hidden_dim=48, in_channels=4, out_channels=4, text_dim=20
    )
    model = wan.random(config, dtype=jnp.float32, seed=3)
    params = nnx.state(model, nnx.Param)
    save_diffusers(tmp_path / "transformer", tensor_names(config), params, config.to_json(), num_shards=2)
    inputs = golden.make_inputs(6, {"in_channels": 4, "text_dim": 20}, (2, 4, 6))
    with golden.torch.no_grad():
        theirs = golden.load_model(tmp_path, golden.torch.float32)(
            inputs["latents"], inputs["timestep"], inputs["text"]
        ).sample
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    ours = model(arrays["latents"], arrays["timestep"], wan.WanCondition(arrays["text"])).velocity
    assert np.linalg.norm(ours - theirs.numpy()) <= 1e-5 * np.linalg.norm(theirs.numpy())
