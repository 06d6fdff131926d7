"""Parameters of HunyuanVideo: from diffusers checkpoints, or random ones for timing."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from fgattn_jax.models._leaves import leaf_name
from fgattn_jax.models.hunyuan_video.config import CLASS_NAME, HunyuanVideoConfig
from fgattn_jax.models.hunyuan_video.model import HunyuanVideoTransformer
from fgattn_jax.models.video.checkpoint import (
    Placement,
    Progress,
    Source,
    load_stacked,
    placement,
    read_config,
)


def read_sizes(directory: str | pathlib.Path) -> HunyuanVideoConfig:
    """The config of a checkpoint, refused as `load` refuses it; weights are not touched.

    Args:
        directory: see `load`.

    Raises:
        ValueError: the directory holds no text-to-video HunyuanVideo checkpoint in the layout of diffusers.
    """
    return HunyuanVideoConfig.from_json(read_config(directory, class_name=CLASS_NAME))


def load(
    directory: str | pathlib.Path,
    *,
    dtype: Any = jnp.bfloat16,
    sharding: Placement = None,
    progress: Progress | None = None,
) -> HunyuanVideoTransformer:
    """Read a text-to-video HunyuanVideo transformer from a diffusers checkpoint; nothing is downloaded.

    Args:
        directory: the pipeline's directory, or the folder of the transformer itself.
        dtype: of all parameters: bfloat16, as diffusers runs it, or float32.
        sharding: where the parameters go: None (the default device), a sharding for all, a function of a parameter's
            name and shape such as "dual.attn.q.kernel", or a pytree of shardings.
        progress: called after every parameter with its name, its bytes and the bytes of all.

    Raises:
        ValueError: files are missing, corrupt, of another layout or of another model, image-to-video ones included; or
            `dtype` is another one.
    """
    config = read_sizes(directory)
    graph, template = _abstract(config, dtype)
    params = load_stacked(directory, tensor_names(config), template, sharding=sharding, progress=progress)
    return nnx.merge(graph, params)


def random(
    config: HunyuanVideoConfig, *, dtype: Any = jnp.bfloat16, seed: int = 0, sharding: Placement = None
) -> HunyuanVideoTransformer:
    """A model with random parameters, made on its devices, for timing without weights: its velocity means nothing.

    Kernels keep the size of what they multiply, so that activations stay finite at any depth; biases are 0, norms 1.

    Args:
        config: sizes.
        dtype: of all parameters: bfloat16 or float32.
        seed: the same seed gives the same parameters.
        sharding: see `load`.

    Raises:
        ValueError: `dtype` is another one, or a pytree of shardings does not fit.
    """
    graph, template = _abstract(config, dtype)
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    keys, place = jax.random.split(jax.random.key(seed), len(paths)), placement(sharding, template)
    made = []
    for key, (path, leaf) in zip(keys, paths, strict=True):
        # One program a parameter: one for all would hold the random bits of several at once.
        name = leaf_name(path)
        made.append(_draw_on(place(name))(key, name.rsplit(".", 1)[-1], leaf.shape, leaf.dtype))
    return nnx.merge(graph, jax.tree_util.tree_unflatten(structure, made))


def tensor_names(config: HunyuanVideoConfig) -> dict[str, Source]:
    """Where diffusers keeps each parameter, by its name here."""
    sources: dict[str, Source] = {}

    def linear(ours: str, theirs: str, num_layers: int | None = None, window: tuple[int, ...] = ()) -> None:
        sources[f"{ours}.kernel"] = Source(f"{theirs}.weight", "kernel", num_layers, window)
        sources[f"{ours}.bias"] = Source(f"{theirs}.bias", "copy", num_layers)

    linear("x_embedder", "x_embedder.proj", window=(config.in_channels, *config.patch))
    for ours, theirs in _LINEARS.items():
        if config.guidance_embeds or not ours.startswith("cond.guidance."):
            linear(ours, theirs)
    num_layers = (config.num_refiner_layers, config.num_dual_layers, config.num_single_layers)
    for number, ((ours, theirs), linears) in zip(num_layers, _BLOCKS.items(), strict=True):
        for name, tensor in linears.items():
            linear(f"{ours}.{name}", f"{theirs}.{{i}}.{tensor}", number)
        for name, tensor in _NORMS[ours].items():
            sources[f"{ours}.{name}.scale"] = Source(f"{theirs}.{{i}}.{tensor}.weight", "copy", number)
            if ours == "refiner.blocks":  # layer norms; those of the other blocks are RMS norms
                sources[f"{ours}.{name}.bias"] = Source(f"{theirs}.{{i}}.{tensor}.bias", "copy", number)
    return sources


_LINEARS = {
    "cond.time.linear_1": "time_text_embed.timestep_embedder.linear_1",
    "cond.time.linear_2": "time_text_embed.timestep_embedder.linear_2",
    "cond.guidance.linear_1": "time_text_embed.guidance_embedder.linear_1",
    "cond.guidance.linear_2": "time_text_embed.guidance_embedder.linear_2",
    "cond.pooled.linear_1": "time_text_embed.text_embedder.linear_1",
    "cond.pooled.linear_2": "time_text_embed.text_embedder.linear_2",
    "refiner.time.linear_1": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "refiner.time.linear_2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "refiner.pooled.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "refiner.pooled.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "refiner.proj_in": "context_embedder.proj_in",
    "final.modulation": "norm_out.linear",
    "final.out": "proj_out",
}
_BLOCKS = {
    ("refiner.blocks", "context_embedder.token_refiner.refiner_blocks"): {
        "attn.q": "attn.to_q",
        "attn.k": "attn.to_k",
        "attn.v": "attn.to_v",
        "attn.out": "attn.to_out.0",
        "ff.up": "ff.net.0.proj",
        "ff.down": "ff.net.2",
        "gates": "norm_out.linear",
    },
    ("dual", "transformer_blocks"): {
        "modulation": "norm1.linear",
        "modulation_text": "norm1_context.linear",
        "attn.q": "attn.to_q",
        "attn.k": "attn.to_k",
        "attn.v": "attn.to_v",
        "attn.out": "attn.to_out.0",
        "attn_text.q": "attn.add_q_proj",
        "attn_text.k": "attn.add_k_proj",
        "attn_text.v": "attn.add_v_proj",
        "attn_text.out": "attn.to_add_out",
        "ff.up": "ff.net.0.proj",
        "ff.down": "ff.net.2",
        "ff_text.up": "ff_context.net.0.proj",
        "ff_text.down": "ff_context.net.2",
    },
    ("single", "single_transformer_blocks"): {
        "modulation": "norm.linear",
        "attn.q": "attn.to_q",
        "attn.k": "attn.to_k",
        "attn.v": "attn.to_v",
        "mlp": "proj_mlp",
        "out": "proj_out",
    },
}
"""Linears of the stacked blocks, by the names of the stack here and in diffusers."""
_NORMS = {
    "refiner.blocks": {"norm1": "norm1", "norm2": "norm2"},
    "dual": {
        "attn.norm_q": "attn.norm_q",
        "attn.norm_k": "attn.norm_k",
        "attn_text.norm_q": "attn.norm_added_q",
        "attn_text.norm_k": "attn.norm_added_k",
    },
    "single": {"attn.norm_q": "attn.norm_q", "attn.norm_k": "attn.norm_k"},
}


def _abstract(config: HunyuanVideoConfig, dtype: Any) -> tuple[Any, Any]:
    """The model without its parameters, and their shapes."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"expected `dtype` to be bfloat16 or float32, got dtype={jnp.dtype(dtype)}")
    model = nnx.eval_shape(lambda: HunyuanVideoTransformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param)


@functools.cache
def _draw_on(sharding: jax.sharding.Sharding | None) -> Callable[..., Array]:
    """`_draw` with its result placed; one function a sharding, so that equal shapes are compiled once."""
    return jax.jit(_draw, static_argnums=(1, 2, 3), out_shardings=sharding)


def _draw(key: Array, kind: str, shape: tuple[int, ...], dtype: Any) -> Array:
    def draw(key: Array) -> Array:
        return jax.random.normal(key, shape[-2:], dtype) * jnp.asarray(shape[-2] ** -0.5, dtype)

    if kind != "kernel":
        return jnp.full(shape, kind == "scale", dtype)
    return draw(key) if len(shape) == 2 else jax.lax.map(draw, jax.random.split(key, shape[0]))
