"""Weights of Wan: where each parameter stands in a diffusers checkpoint, loading, and random ones for timing."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from fgattn_jax.models._leaves import leaf_name
from fgattn_jax.models.video.checkpoint import (
    Placement,
    Progress,
    Source,
    load_stacked,
    placement,
    read_config,
    read_pipeline,
)
from fgattn_jax.models.wan.config import CLASS_NAME, WanConfig
from fgattn_jax.models.wan.model import WanTransformer

IGNORED = ("norm_added_q",)
"""Some files hold these tensors; diffusers does not read them either."""


def tensor_names(config: WanConfig) -> dict[str, Source]:
    """Where each parameter of `WanTransformer` stands in a diffusers checkpoint, by the name of its leaf."""
    names = {
        "patch_embedding.kernel": Source(
            "patch_embedding.weight", "kernel", window=(config.in_channels, *config.patch)
        ),
        "patch_embedding.bias": Source("patch_embedding.bias"),
        "scale_shift_table": Source("scale_shift_table"),
        "blocks.scale_shift_table": Source("blocks.{i}.scale_shift_table", num_layers=config.num_layers),
    }
    linears = {"proj_out": "proj_out", "time_proj": "condition_embedder.time_proj"}
    for embedder in ("time_embedder", "text_embedder"):
        for linear in ("linear_1", "linear_2"):
            linears[f"{embedder}.{linear}"] = f"condition_embedder.{embedder}.{linear}"
    stacked = {"ffn.up": "ffn.net.0.proj", "ffn.down": "ffn.net.2"}
    norms = {"norm2": "norm2"}
    for attention in ("attn1", "attn2"):
        stacked |= {f"{attention}.{name}": f"{attention}.to_{name}" for name in "qkv"}
        stacked[f"{attention}.out"] = f"{attention}.to_out.0"
        norms |= {f"{attention}.{name}": f"{attention}.{name}" for name in ("norm_q", "norm_k")}
    for ours, theirs in linears.items():
        names[f"{ours}.kernel"] = Source(f"{theirs}.weight", "kernel")
        names[f"{ours}.bias"] = Source(f"{theirs}.bias")
    for ours, theirs in stacked.items():
        names[f"blocks.{ours}.kernel"] = Source(f"blocks.{{i}}.{theirs}.weight", "kernel", config.num_layers)
        names[f"blocks.{ours}.bias"] = Source(f"blocks.{{i}}.{theirs}.bias", num_layers=config.num_layers)
    for ours, theirs in norms.items():
        names[f"blocks.{ours}.scale"] = Source(f"blocks.{{i}}.{theirs}.weight", num_layers=config.num_layers)
    names["blocks.norm2.bias"] = Source("blocks.{i}.norm2.bias", num_layers=config.num_layers)
    return names


def read_sizes(directory: str | pathlib.Path) -> WanConfig:
    """The config of a checkpoint, refused as `load` refuses it; weights are not touched.

    Args:
        directory: see `load`.

    Raises:
        ValueError: the directory holds no Wan 2.1 text-to-video checkpoint in the layout of diffusers.
    """
    _refuse_wan22(read_pipeline(directory), directory)
    return WanConfig.from_json(read_config(directory, class_name=CLASS_NAME))


def load(
    directory: str | pathlib.Path,
    *,
    dtype: Any = jnp.bfloat16,
    sharding: Placement = None,
    progress: Progress | None = None,
) -> WanTransformer:
    """Read a Wan 2.1 text-to-video checkpoint in the layout of diffusers.

    Args:
        directory: the downloaded repository (`Wan2.1-T2V-1.3B-Diffusers` or the 14B one), or its folder `transformer`.
        dtype: bfloat16, or float32; what diffusers keeps in float32 is kept in it.
        sharding: where the parameters go: None (the default device), one sharding, a function of a parameter's name
            (such as `blocks.attn1.q.kernel`, whose first axis is that of layers), or a pytree of shardings like the
            parameters.
        progress: called after every parameter with its name, its bytes and the bytes of all.

    Returns:
        The model.

    Raises:
        ValueError: the directory holds no such checkpoint (image-to-video, Wan 2.2, the original layout and other
            models are named), files are missing or corrupt, or `dtype` is another one.
    """
    config = read_sizes(directory)
    graph, shapes = _abstract(config, dtype)
    params = load_stacked(
        directory, tensor_names(config), shapes, ignored=IGNORED, sharding=sharding, progress=progress
    )
    return nnx.merge(graph, params)


def random(
    config: WanConfig, *, dtype: Any = jnp.bfloat16, seed: int = 0, sharding: Placement = None
) -> WanTransformer:
    """A model with random weights, made on its devices, for timing without a checkpoint.

    Activations stay finite, of unit scale; attention is nearly uniform, so that no threshold finds much to skip.

    Args:
        config: sizes; see `PRESETS`.
        dtype: bfloat16, or float32.
        seed: of the random numbers.
        sharding: see `load`.

    Raises:
        ValueError: `dtype` is another one, or a pytree of shardings does not fit.
    """
    dtype = jnp.dtype(dtype)
    graph, shapes = _abstract(config, dtype)
    # The key is an argument: another seed does not compile again.
    key = jax.random.key(seed)
    if sharding is None:
        return nnx.merge(graph, _draw(key, config=config, dtype=dtype))
    place = placement(sharding, shapes)
    shardings = jax.tree_util.tree_map_with_path(lambda path, _: place(leaf_name(path)), shapes)
    draw = jax.jit(_draw, static_argnames=("config", "dtype"), out_shardings=shardings)
    return nnx.merge(graph, draw(key, config=config, dtype=dtype))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _draw(key: Array, *, config: WanConfig, dtype: Any) -> Any:
    return nnx.split(WanTransformer(config, dtype=dtype, rngs=nnx.Rngs(key)))[1]


def _abstract(config: WanConfig, dtype: Any) -> tuple[Any, Any]:
    """Structure and shapes of a model; no parameter is made."""
    return nnx.split(nnx.eval_shape(lambda: WanTransformer(config, dtype=dtype, rngs=nnx.Rngs(0))))


def _refuse_wan22(pipeline: dict[str, Any], directory: str | pathlib.Path) -> None:
    found = None
    if any(part is not None for part in pipeline.get("transformer_2") or ()):
        found = f"transformer_2={pipeline['transformer_2']}"
    elif pipeline.get("boundary_ratio") is not None:
        found = f"boundary_ratio={pipeline['boundary_ratio']}"
    elif pipeline.get("expand_timesteps"):
        found = f"expand_timesteps={pipeline['expand_timesteps']}"
    if found:
        raise ValueError(
            f"expected a checkpoint of Wan 2.1 in {str(directory)!r}, got {found} in model_index.json: this is Wan "
            "2.2, which is not supported"
        )
