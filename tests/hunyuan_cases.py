"""HunyuanVideo models for tests: the modules as diffusers' counterparts are run, and tiny models without torch."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fgattn_jax.models._leaves import leaf_name
from fgattn_jax.models.hunyuan_video import HunyuanVideoCondition, HunyuanVideoConfig, HunyuanVideoTransformer
from fgattn_jax.models.hunyuan_video.blocks import with_still_text
from fgattn_jax.models.video.attention import TextTail, dense
from fgattn_jax.models.video.layers import patchify, rotary_tables, silu

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hunyuan_video"

TINY = HunyuanVideoConfig(
    in_channels=4,
    num_heads=2,
    head_dim=8,
    num_dual_layers=2,
    num_single_layers=3,
    num_refiner_layers=2,
    mlp_ratio=3.0,
    text_dim=12,
    pooled_dim=10,
    rope_dims=(2, 2, 4),
)
SIZE = (3, 6, 10)  # 45 video tokens
NUM_TEXT = 7
NUM_TOKENS = 45 + NUM_TEXT


@functools.cache
def make_model(dtype=jnp.float32, config=TINY):
    """A tiny model in which biases and norms count; shared."""
    # NumPy: drawing on the device takes seconds to compile.
    graph, template = nnx.split(abstract_model(config, dtype), nnx.Param)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        kernel = leaf_name(path).endswith("kernel")
        spread = leaf.shape[-2] ** -0.5 if kernel else 0.1
        return jnp.asarray(leaf_name(path).endswith("scale") + rng.normal(scale=spread, size=leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, template))


def make_inputs(lengths=(1, NUM_TEXT), seed=0, config=TINY, size=SIZE):
    """Latents, timesteps and a condition."""
    rng = np.random.default_rng(seed)
    batch = len(lengths)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    condition = HunyuanVideoCondition(
        normal(batch, NUM_TEXT, config.text_dim),
        jnp.asarray(lengths, jnp.int32),
        normal(batch, config.pooled_dim),
        jnp.linspace(6.0, 3.0, batch) if config.guidance_embeds else None,
    )
    return normal(batch, config.in_channels, *size), jnp.linspace(500.0, 40.0, batch), condition


def compiled(model, attention=dense):
    """A function of latents, timesteps, condition and state, compiled."""
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    def run(latents, timestep, condition, state=None):
        return nnx.merge(graph, params)(latents, timestep, condition, attention=attention, state=state)

    return run


def first_layer(stacked):
    """The first block of a stack."""
    graph, params = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], params))


def run_module(model, name, inputs):
    """What the module gives for `inputs`, compiled, as `hunyuan_torch.MODULES` of the same name."""
    graph, params = nnx.split(model, nnx.Param)
    return np.asarray(_run_module(graph, name, params, {key: jnp.asarray(value) for key, value in inputs.items()}))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_module(graph, name, params, x):
    model = nnx.merge(graph, params)
    config = model.config
    grid = config.grid(*x["latents"].shape[2:])
    rope = rotary_tables(grid, config.rope_dims, config.rope_theta, np.float32)
    num_text = x["tokens"].shape[1]

    def attend(query, key, value):
        return dense(query, key, value, None, layer=jnp.int32(0), text=TextTail(num_text, x["lengths"]))

    def cast(*names):
        return (x[key].astype(model.dtype) for key in names)

    (latents, text, pooled, vector, video, tokens) = cast("latents", "text", "pooled", "vector", "video", "tokens")
    if name == "patch":
        return model.x_embedder(patchify(latents, config.patch))
    if name == "conditioning":
        return model.cond(x["timestep"], x["guidance"] if config.guidance_embeds else None, pooled)
    if name == "refiner":
        return model.refiner(text, x["timestep"], x["lengths"])
    if name == "dual":
        return jnp.concatenate(first_layer(model.dual)(video, tokens, silu(vector), rope, attend)[:2], axis=1)
    if name == "single":
        joined = jnp.concatenate([video, tokens], axis=1)
        return first_layer(model.single)(joined, silu(vector), with_still_text(rope, num_text), attend)[0]
    if name == "final":
        return model.final(video, silu(vector))
    guidance = x["guidance"] if config.guidance_embeds else None
    condition = HunyuanVideoCondition(x["text"], x["lengths"], x["pooled"], guidance)
    return model(latents, x["timestep"], condition).velocity


def distance(a, b):
    """Relative distance in the Euclidean norm, in float64."""
    a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def without_guidance():
    """The tiny config of a model that takes no guidance scale."""
    return dataclasses.replace(TINY, guidance_embeds=False)


def tail(num_text, lengths):
    """Text behind the video."""
    return TextTail(num_text, jnp.asarray(lengths, jnp.int32))


def abstract_model(config, dtype=jnp.bfloat16):
    """A model with shapes in place of parameters."""
    return nnx.eval_shape(lambda: HunyuanVideoTransformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
