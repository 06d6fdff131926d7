"""A tiny video model that follows the protocol of `fgattn_jax.models.video.model`, for tests of the sampler."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fgattn_jax.models.video.attention import TextTail, dense
from fgattn_jax.models.video.layers import Linear, Norm, layer_norm, patchify, sinusoid, unpatchify
from fgattn_jax.models.video.model import VideoOutput

TRACES: list[str] = []
"""One entry for every time the model's Python code ran."""


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """Sizes of `TinyModel`; `num_text` of None is a model without joint attention."""

    num_attentions: int = 2
    num_heads: int = 2
    head_dim: int = 16
    in_channels: int = 4
    patch: tuple[int, int, int] = (1, 2, 2)
    num_text: int | None = None

    def grid(self, frames, rows, columns):
        for size, patch in zip((frames, rows, columns), self.patch, strict=True):
            if size % patch:
                raise ValueError(f"expected whole patches of {self.patch}, got {(frames, rows, columns)}")
        return tuple(size // patch for size, patch in zip((frames, rows, columns), self.patch, strict=True))


class TinyCondition(NamedTuple):
    """`text` is a vector without joint attention, and tokens with one; `lengths` and `guidance` are then wanted."""

    text: Any
    lengths: Any = None
    guidance: Any = None


class VectorCondition(NamedTuple):
    """A condition like Wan's: no guidance scale."""

    text: Any


class Layer(nnx.Module):
    """Attention with qk-norm and no feed-forward."""

    def __init__(self, config, *, dtype, rngs):
        width = config.num_heads * config.head_dim
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm = Norm(config.head_dim, dtype=dtype)


class TinyModel(nnx.Module):
    """Scanned layers of attention; queries and keys are scaled up, so that scores differ and masks are not full."""

    def __init__(self, config=None, *, dtype=jnp.float32, seed=0):
        config = config or TinyConfig()
        self.config, self.dtype = config, jnp.dtype(dtype)
        width, rngs = config.num_heads * config.head_dim, nnx.Rngs(seed)
        patch = config.in_channels * int(np.prod(config.patch))
        self.embed = Linear(patch, width, dtype=dtype, rngs=rngs)
        self.time = Linear(32, width, dtype=dtype, rngs=rngs)
        self.text = Linear(8, width, dtype=dtype, rngs=rngs)
        self.last = Linear(width, patch, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_attentions)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Layer(config, dtype=dtype, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, latents, timestep, condition, *, attention=dense, state=None):
        TRACES.append("forward")
        config = self.config
        grid = config.grid(*latents.shape[2:])
        video = self.embed(patchify(latents, config.patch))
        vector = self.time(sinusoid(timestep, 32))
        if getattr(condition, "guidance", None) is not None:
            vector = vector + self.time(sinusoid(condition.guidance * 1000, 32))
        tail, tokens = None, video
        if config.num_text is None:
            vector = vector + self.text(condition.text)
        else:
            tail = TextTail(config.num_text, condition.lengths)
            tokens = jnp.concatenate([video, self.text(condition.text)], axis=1)
        tokens = tokens + vector[:, None]
        graph, stacked = nnx.split(self.layers)

        def run(carry, layer_state):
            tokens, state, number = carry
            layer = nnx.merge(graph, layer_state)
            batch, length, width = tokens.shape
            y = layer.qkv(layer_norm(tokens)).reshape(batch, length, 3, config.num_heads, config.head_dim)
            query, key, value = (y[:, :, i] for i in range(3))
            query, key = 2 * layer.norm.rms(query), 2 * layer.norm.rms(key)
            attended = attention(query, key, value, state, layer=number, text=tail)
            tokens = tokens + layer.out(attended.output.reshape(batch, length, width))
            return (tokens, attended.state, number + 1), None

        (tokens, state, _), _ = jax.lax.scan(run, (tokens, state, jnp.int32(0)), stacked)
        tokens = self.last(layer_norm(tokens[:, : video.shape[1]]))
        return VideoOutput(unpatchify(tokens, grid, config.patch, channels_last=True), state)


def conditions(num_branches=2, *, batch=1, num_text=None, seed=5):
    """Random conditions of `TinyModel`, as many as branches; text lengths differ over branches and batch."""
    random = np.random.default_rng(seed)
    found = []
    for branch in range(num_branches):
        if num_text is None:
            found.append(VectorCondition(jnp.asarray(2 * random.standard_normal((batch, 8)), jnp.float32)))
            continue
        text = jnp.asarray(random.standard_normal((batch, num_text, 8)), jnp.float32)
        lengths = jnp.asarray([1 + (branch + 3 * entry) % num_text for entry in range(batch)], jnp.int32)
        found.append(TinyCondition(text, lengths, jnp.full((batch,), 6.0)))
    return found


def noise(batch=1, size=(3, 10, 12), channels=4, seed=1):
    """Unit-normal latents; 3 x 5 x 6 = 90 tokens of `TinyModel` by default, which no slice height divides."""
    return jax.random.normal(jax.random.key(seed), (batch, channels, *size))
