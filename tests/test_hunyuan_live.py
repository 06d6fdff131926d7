"""HunyuanVideo against the installed diffusers, on models that the golden files do not hold."""

import hunyuan_cases
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fgattn_jax.models import hunyuan_video
from fgattn_jax.models._leaves import named_leaves
from fgattn_jax.models.hunyuan_video import HunyuanVideoConfig, tensor_names

pytestmark = pytest.mark.usefixtures("torch_models")

CASES = {
    "three prompts, many texts": ({}, (2, 4, 6), 9, (9, 4, 1)),
    "patches of two frames, no guidance": ({"patch_size_t": 2, "guidance_embeds": False}, (6, 2, 10), 3, (2, 3)),
    "more heads, other rotary axes": ({"num_attention_heads": 3, "rope_axes_dim": (4, 2, 2)}, (1, 6, 6), 130, (129,)),
}
"""Changes of the config, latent size, text tokens, lengths."""


def arrays(tensors):
    return {name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy() for name, tensor in tensors}


@pytest.mark.parametrize(
    ("changes", "size", "num_text", "lengths"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] if name.startswith("more heads") else [])
        for name, case in CASES.items()
    ],
)
def test_every_module_equals_diffusers(tmp_path, changes, size, num_text, lengths):
    import hunyuan_torch

    model = hunyuan_torch.make_model(seed=5, **changes)
    model_16 = hunyuan_torch.in_16_bits(model, tmp_path)
    inputs = hunyuan_torch.make_inputs(model, size, num_text, lengths, seed=6)
    outputs = arrays(hunyuan_torch.run_modules(model, model_16, inputs).items())
    given = {name.removeprefix("input/"): value for name, value in outputs.items() if name.startswith("input/")}
    ours = {dtype: hunyuan_video.load(tmp_path, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)}
    for name in hunyuan_torch.MODULES:
        exact, rounded = outputs[f"{name}/float32"], outputs[f"{name}/bfloat16"]
        apart = hunyuan_cases.distance(hunyuan_cases.run_module(ours[jnp.float32], name, given), exact)
        assert apart <= 1e-5, name
        apart = hunyuan_cases.distance(hunyuan_cases.run_module(ours[jnp.bfloat16], name, given), rounded)
        assert apart <= 1.5 * hunyuan_cases.distance(rounded, exact), name


def test_names_and_shapes_of_the_released_size():
    import hunyuan_torch
    import torch  # pyright: ignore[reportMissingImports]

    with torch.device("meta"):
        model = hunyuan_torch.HunyuanVideoTransformer3DModel()
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config = HunyuanVideoConfig.from_json({**model.config, "_class_name": type(model).__name__})
    leaves = named_leaves(nnx.state(hunyuan_cases.abstract_model(config), nnx.Param))
    ours = {
        tensor: source.stored_shape(tuple(leaves[name].shape))
        for name, source in tensor_names(config).items()
        for tensor in source.tensors()
    }
    assert len(stored) == 1264
    assert ours == stored


def test_rounding_of_the_pipeline_reaches_the_model(tmp_path):
    """A scale of 6 in 16 bits is 6016 thousandths: whoever passes that gets what diffusers' pipeline gets."""
    import hunyuan_torch
    import torch  # pyright: ignore[reportMissingImports]

    model = hunyuan_torch.make_model(seed=5)
    model_16 = hunyuan_torch.in_16_bits(model, tmp_path)
    inputs = hunyuan_torch.make_inputs(model, (1, 4, 4), 3, (3,))
    inputs["guidance"] = torch.tensor([6.016])
    with torch.no_grad():
        pipeline = model_16.time_text_embed(
            inputs["timestep"], inputs["pooled"].bfloat16(), torch.tensor([6.0 * 1000]).bfloat16()
        )[0].float()
    ours = hunyuan_video.load(tmp_path, dtype=jnp.bfloat16)
    pooled = jnp.asarray(inputs["pooled"].numpy(), jnp.bfloat16)
    timestep = jnp.asarray(inputs["timestep"].numpy())
    near = ours.cond(timestep, jnp.asarray([6.016], jnp.float32), pooled)
    far = ours.cond(timestep, jnp.asarray([6.0], jnp.float32), pooled)
    assert hunyuan_cases.distance(np.asarray(near), pipeline) < 0.01
    assert hunyuan_cases.distance(np.asarray(far), pipeline) > 0.1
