"""Every part of a Wan transformer on what diffusers recorded before it, for the golden and the live tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fgattn_jax.models.video import layers
from fgattn_jax.models.video.attention import dense
from fgattn_jax.models.wan import WanCondition, WanTransformer
from fgattn_jax.models.wan.model import ROPE_THETA

EMBEDDINGS = ("tokens", "time", "modulation", "text")


def parts(model: WanTransformer, inputs: dict[str, Any], recorded: dict[str, Any]) -> dict[str, jax.Array]:
    """Outputs of ours by the names of the recorded ones: each part from diffusers' inputs to it, and the whole."""
    graph, params = nnx.split(model)
    grid = model.config.grid(*inputs["latents"].shape[2:])

    @jax.jit
    def run(params, inputs, recorded):
        model = nnx.merge(graph, params)
        condition = WanCondition(inputs["text"])
        result = {"velocity": model(inputs["latents"], inputs["timestep"], condition).velocity}
        result["tokens"] = model.embed_patches(inputs["latents"])
        result["time"], result["modulation"] = model.embed_time(inputs["timestep"])
        result["text"] = model.text_embedder(inputs["text"])
        rope = layers.rotary_tables(grid, model.config.rope_dims, ROPE_THETA, np.float64)
        block_graph, stacked = nnx.split(model.blocks)
        names = [f"block{i}" for i in range(model.config.num_layers)]
        before = jnp.stack([recorded["tokens"], *(recorded[name] for name in names[:-1])])

        def run_block(given):
            block, given = nnx.merge(block_graph, given[0]), (given[1], recorded["modulation"], recorded["text"], rope)
            return block(*given, attention=dense, state=None, layer=jnp.int32(0))[0]

        result |= zip(names, jax.lax.map(run_block, (stacked, before)), strict=True)
        result["patches"] = model.project_out(recorded[names[-1]], recorded["time"])
        return result

    return run(params, {name: jnp.asarray(value) for name, value in inputs.items()}, recorded)


def distance(ours: Any, theirs: Any) -> float:
    """Relative L2 distance, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def check_float32(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """In float32 every part and the whole agree to 1e-5."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == np.float32, name
        assert distance(ours[name], value) <= 1e-5, name


def check_bfloat16(ours: dict[str, Any], theirs: dict[str, Any], exact: dict[str, Any]) -> None:
    """In bfloat16 ours lies no further from theirs than theirs lies from `exact`, theirs in float32, by a factor.

    1.5 for the whole; 1 for a block, which starts from the same rounded inputs; 1/8 for an embedding, whose few
    roundings stand at the same places, so that only the order of sums can turn some of them.
    """
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, value in theirs.items():
        factor = 1.5 if name == "velocity" else 0.125 if name in (*EMBEDDINGS, "patches") else 1.0
        assert ours[name].dtype == value.dtype == jnp.bfloat16, name
        assert distance(ours[name], value) <= factor * distance(value, exact[name]), name
