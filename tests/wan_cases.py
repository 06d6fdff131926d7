"""Every part of a Wan transformer on what diffusers recorded before it, for the golden and the live tests."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fgattn_jax import attention
from fgattn_jax.models.video import layers
from fgattn_jax.models.video.attention import Attended, dense, plain
from fgattn_jax.models.wan import WanCondition, WanTransformer
from fgattn_jax.models.wan import model as wan_model
from fgattn_jax.models.wan.model import ROPE_THETA


def parts(model: WanTransformer, inputs: dict[str, Any], recorded: dict[str, Any]) -> dict[str, jax.Array]:
    """Outputs of ours by the names of the recorded ones: each part from diffusers' inputs to it, and the whole.

    Blocks run twice: whole, and with what diffusers' attentions gave in the place of ours ("resumed").
    """
    graph, params = nnx.split(model)
    grid = model.config.grid(*inputs["latents"].shape[2:])

    @jax.jit
    def run(params, inputs):
        condition = WanCondition(inputs["text"])
        return nnx.merge(graph, params)(inputs["latents"], inputs["timestep"], condition).velocity

    # XLA would leave out roundings to 16 bits between operations that it fuses: closer to float32, and so it may for
    # the whole, but the parts are to show that each rounding stands where diffusers has it.
    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def run_parts(params, inputs, recorded):
        model, result = nnx.merge(graph, params), {}
        result["tokens"] = model.embed_patches(inputs["latents"])
        result["time"], result["modulation"] = model.embed_time(inputs["timestep"])
        result["text"] = model.text_embedder(inputs["text"])
        rope = layers.rotary_tables(grid, model.config.rope_dims, ROPE_THETA, np.float64)
        block_graph, stacked = nnx.split(model.blocks)
        names = [f"block{i}" for i in range(model.config.num_layers)]
        before = jnp.stack([recorded["tokens"], *(recorded[name] for name in names[:-1])])

        def run_block(given):
            params, before, self_attended, cross_attended = given
            block, seen = nnx.merge(block_graph, params), {}
            inputs = (before, recorded["modulation"], recorded["text"], rope)

            def attend(query, key, value, state, *, layer, text):
                seen["self"] = dense(query, key, value, state, layer=layer, text=text).output
                return Attended(seen["self"], state)

            def attend_text(query, key, value):
                seen["cross"] = attention(query, key, value)
                return seen["cross"]

            with mock.patch.object(wan_model, "dense_attention", attend_text):
                seen["block"] = block(*inputs, attention=attend, state=None, layer=jnp.int32(0))[0]
            take = plain(lambda query, key, value: self_attended.reshape(query.shape))
            with mock.patch.object(wan_model, "dense_attention", lambda q, *_: cross_attended.reshape(q.shape)):
                seen["resumed"] = block(*inputs, attention=take, state=None, layer=jnp.int32(0))[0]
            return {name: value.reshape(before.shape) for name, value in seen.items()}

        attended = [jnp.stack([recorded[f"{kind}{i}"] for i in range(len(names))]) for kind in ("self", "cross")]
        for name, values in jax.lax.map(run_block, (stacked, before, *attended)).items():
            result |= {f"{name}{i}": value for i, value in enumerate(values)}
        result["patches"] = model.project_out(recorded[names[-1]], recorded["time"])
        return result

    return {"velocity": run(params, inputs), **run_parts(params, inputs, recorded)}


def distance(ours: Any, theirs: Any) -> float:
    """Relative L2 distance, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def check_float32(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """In float32 every part and the whole agree to 1e-5."""
    assert {_recorded(name) for name in ours} == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == np.float32, name
        assert distance(value, theirs[_recorded(name)]) <= 1e-5, name


def check_bfloat16(ours: dict[str, Any], theirs: dict[str, Any], exact: dict[str, Any]) -> None:
    """In bfloat16 ours lies no further from theirs than theirs lies from `exact`, theirs in float32, by a factor.

    1.5 for the whole; 1 for a block and its attentions, which start from the same rounded inputs. 1/8 for all that
    holds no attention of ours: every rounding stands at its place, only the order of sums can turn a few of them.
    """
    assert {_recorded(name) for name in ours} == theirs.keys() == exact.keys()
    for name, value in ours.items():
        key = _recorded(name)
        factor = 1.5 if name == "velocity" else 1.0 if name.startswith(("block", "self", "cross")) else 0.125
        assert value.dtype == theirs[key].dtype == jnp.bfloat16, name
        assert distance(value, theirs[key]) <= factor * distance(theirs[key], exact[key]), name


def _recorded(name: str) -> str:
    """Name of what diffusers recorded; a block resumed behind its attentions must give what the block gave."""
    return name.replace("resumed", "block")
