"""Weights as safetensors: one file with 16-bit parameters, the config and the training facts in its header."""

import importlib.resources
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fgattn_jax.models._leaves import leaf_name, named_leaves
from fgattn_jax.models.dit import layers
from fgattn_jax.models.dit.config import DiTConfig
from fgattn_jax.models.dit.model import DiT

FORMAT = "fgattn_jax.dit.v1"
"""Value of `format` in the header of a weights file."""
PRETRAINED = "dit_video.safetensors"
"""Name of the shipped weights in the package folder `models/dit/weights`."""


def fill_leaves(template: Any, named: Mapping[str, Any], source: str) -> Any:
    """Put named arrays into the places of a template, cast to its dtypes.

    Args:
        template: pytree of arrays or shapes.
        named: arrays by name; exactly those of the template.
        source: what the arrays come from, for messages.

    Raises:
        ValueError: names or shapes differ from the template's.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    wanted = {leaf_name(path): leaf for path, leaf in paths}
    missing, extra = sorted(wanted.keys() - named.keys()), sorted(named.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(f"{source} does not fit this model: missing {missing[:4]}, not expected {extra[:4]}.")
    leaves = []
    for name, leaf in wanted.items():
        if tuple(named[name].shape) != tuple(leaf.shape):
            raise ValueError(f"{source}: `{name}` must have shape {leaf.shape}, got {named[name].shape}.")
        leaves.append(jnp.asarray(named[name], leaf.dtype))
    return jax.tree_util.tree_unflatten(structure, leaves)


def save_weights(
    path: str | pathlib.Path,
    params: Any,
    config: DiTConfig,
    *,
    dtype: Any = jnp.bfloat16,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters and config to a safetensors file.

    Args:
        path: file to write.
        params: the parameters (`nnx.state(model, nnx.Param)`).
        config: sizes of the model.
        dtype: dtype to store; 16 bits halve the file and cost about 3 digits.
        facts: further facts for the header (steps, device, command ...), anything JSON holds.
    """
    from safetensors.numpy import save_file

    arrays = {name: np.asarray(leaf.astype(dtype)) for name, leaf in named_leaves(params).items()}
    metadata = {"format": FORMAT, "config": config.to_json(), "facts": json.dumps(dict(facts or {}), sort_keys=True)}
    save_file(arrays, str(path), metadata=metadata)


def load_weights(
    path: str | pathlib.Path, *, dtype: Any = jnp.float32, attention: Any = layers.slice_attention
) -> tuple[DiT, dict[str, Any]]:
    """Read a weights file into a model.

    Args:
        path: file written by `save_weights`.
        dtype: dtype of matrix products and attention; parameters become float32.
        attention: see `DiT`.

    Returns:
        The model, and the facts from the file's header.

    Raises:
        ValueError: the file is missing, corrupt, of another format, or does not fit its own config.
    """
    from safetensors import SafetensorError, safe_open

    source = f"Weights file {str(path)!r}"
    try:
        with safe_open(str(path), framework="flax") as stored:
            metadata = stored.metadata() or {}
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{source} cannot be read ({error}); expected a safetensors file of `save_weights`."
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{source} has format={metadata.get('format')!r}, expected {FORMAT!r}.")
    config = DiTConfig.from_json(metadata.get("config", ""))
    model = nnx.eval_shape(lambda: DiT(config, dtype=dtype, attention=attention, rngs=nnx.Rngs(0)))
    graph, shapes, rest = nnx.split(model, nnx.Param, ...)
    params = fill_leaves(shapes, arrays, source)
    return nnx.merge(graph, params, materialize(rest)), json.loads(metadata.get("facts", "{}"))


def load_pretrained(*, dtype: Any = jnp.float32, attention: Any = layers.slice_attention) -> DiT:
    """The shipped model, trained on three short videos and generated scenes (models/dit/MODEL_CARD.md).

    Reads package data only; nothing is downloaded.

    Args:
        dtype: dtype of matrix products and attention; bfloat16 suits GPUs, float32 CPUs.
        attention: see `DiT`.

    Raises:
        ValueError: the installation lacks the weights or they are corrupt.
    """
    resource = importlib.resources.files("fgattn_jax.models.dit") / "weights" / PRETRAINED
    with importlib.resources.as_file(resource) as path:
        return load_weights(path, dtype=dtype, attention=attention)[0]


def materialize(state: Any) -> Any:
    """Zeros in the place of abstract leaves, for what is left of a model beside its parameters.

    That is at most the streams of random keys the parameters were drawn from; nothing is drawn from them again.
    """

    def zeros(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0) if not leaf.shape else jax.random.split(jax.random.key(0), leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(zeros, state)
