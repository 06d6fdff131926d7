"""Denoising runs whose settings are traced, so that one compiled program serves a whole sweep."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fgattn_jax.evaluation.study.attention import MAX_STEPS, STATISTICS, LayerState, Settings

Apply = Callable[..., Any]
"""`apply(params, x, t, label, masks=None, predictor=None) -> (velocity, masks)`: a model whose attention seam is
a `StudyAttention`."""


def make_settings(
    query_order: np.ndarray,
    *,
    num_steps: int,
    statistic: str = "mass",
    threshold: float | None = None,
    top_p: float | None = None,
    refresh_every: int | None = None,
    dense_first: int = 0,
    dense_at_refresh: bool = True,
) -> Settings:
    """Settings from plain numbers.

    Args:
        query_order: The query at each position.
        num_steps: Euler steps, at most `MAX_STEPS`.
        statistic: One of `STATISTICS`.
        threshold: Keep scores above it. Give it or `top_p`.
        top_p: Keep the smallest set of keys with this share of the score.
        refresh_every: Steps between refreshes, counted from `dense_first`; None refreshes once.
        dense_first: Dense steps at the start.
        dense_at_refresh: Whether a refresh step runs dense (exact scores need it) or under its new masks.

    Raises:
        ValueError: Both or neither of `threshold` and `top_p` are given, or a number is out of range.
    """
    if (threshold is None) == (top_p is None):
        raise ValueError(f"expected one of `threshold` and `top_p`, got threshold={threshold} and top_p={top_p}")
    if statistic not in STATISTICS:
        raise ValueError(f"expected `statistic` to be one of {STATISTICS}, got statistic={statistic!r}")
    if not 1 <= num_steps <= MAX_STEPS:
        raise ValueError(f"expected `num_steps` in 1..{MAX_STEPS}, got num_steps={num_steps}")
    if not 0 <= dense_first < num_steps or (refresh_every is not None and refresh_every < 1):
        raise ValueError(
            f"expected 0 <= `dense_first` < num_steps={num_steps} and `refresh_every` >= 1, got "
            f"dense_first={dense_first} and refresh_every={refresh_every}"
        )
    steps = np.arange(MAX_STEPS)
    refresh = steps == dense_first
    if refresh_every is not None:
        refresh = (steps >= dense_first) & ((steps - dense_first) % refresh_every == 0)
    return Settings(
        jnp.asarray(STATISTICS.index(statistic), jnp.int32),
        jnp.asarray(threshold or 0.0, jnp.float32),
        jnp.asarray(top_p or 0.0, jnp.float32),
        jnp.asarray(query_order, jnp.int32),
        jnp.asarray(num_steps, jnp.int32),
        jnp.asarray(refresh),
        jnp.asarray((steps < dense_first) | (refresh & dense_at_refresh)),
    )


class RunOutput(NamedTuple):
    """Result of one denoising run.

    Attributes:
        video: Clips in about [-1, 1].
        density: `[MAX_STEPS, L, B]`, share of slices that attention computed: 1 at dense steps, 0 past the last step.
        counts: `[L, B, N, R]`, kept keys of the rows of the last masks.
    """

    video: Float[Array, "B F Y X 3"]
    density: Float[Array, "steps L B"]
    counts: Int[Array, "L B N R"]


@functools.partial(jax.jit, static_argnames=("apply", "num_layers", "num_heads", "query_block"))
def run_sparse(
    params: Any,
    noise: Float[Array, "B F Y X 3"],
    label: Int[Array, " B"],
    settings: Settings,
    *,
    apply: Apply,
    num_layers: int,
    num_heads: int,
    query_block: int,
) -> RunOutput:
    """Denoise by Euler steps with cached masks; one compiled program for all settings.

    Args:
        params: The model's parameters.
        noise: Start of the run, unit normal.
        label: Class of every clip.
        settings: What to skip, and when.
        apply: The model, its attention a `StudyAttention(query_block)`.
        num_layers: Layers of the model.
        num_heads: Heads of the model.
        query_block: Queries per slice.
    """
    batch, num_tokens = noise.shape[0], settings.query_order.shape[0]
    num_rows = num_tokens // query_block

    def layers(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (num_layers, *leaf.shape))

    def body(state: tuple) -> tuple:
        step, x, kept, density = state
        dense = settings.dense[step]
        layer_state = LayerState(kept, *jax.tree.map(layers, (settings, settings.refresh[step], dense)))
        t = jnp.full((batch,), 1.0 - step / settings.num_steps, jnp.float32)
        velocity, kept = apply(params, x, t, label, masks=layer_state)
        now = jnp.where(dense, 1.0, jnp.mean(kept, axis=(2, 3, 4), dtype=jnp.float32))  # [L, B]
        return step + 1, x - velocity / settings.num_steps, kept, density.at[step].set(now)

    kept = jnp.zeros((num_layers, batch, num_heads, num_rows, num_tokens), bool)
    density = jnp.zeros((MAX_STEPS, num_layers, batch), jnp.float32)
    start = (jnp.zeros((), jnp.int32), noise, kept, density)
    _, video, kept, density = jax.lax.while_loop(lambda state: state[0] < settings.num_steps, body, start)
    return RunOutput(video, density, jnp.sum(kept, axis=-1, dtype=jnp.int32))


@functools.partial(jax.jit, static_argnames=("apply", "probe", "num_steps"))
def run_dense(
    params: Any,
    noise: Float[Array, "B F Y X 3"],
    label: Int[Array, " B"],
    arguments: Any,
    *,
    apply: Apply,
    num_steps: int,
    probe: Callable[[Any, Array, Array], Any] | None = None,
) -> tuple[Float[Array, "B F Y X 3"], Any]:
    """Denoise by Euler steps with dense attention, looking at queries and keys on the way.

    Args:
        params: The model's parameters.
        noise: Start of the run, unit normal.
        label: Class of every clip.
        arguments: Arrays handed to the probe.
        apply: The model, its attention a `StudyAttention`.
        num_steps: Euler steps.
        probe: `probe(arguments, query, key)`, called in every layer at every step; None looks at nothing.

    Returns:
        The clips, and what the probe returned with leading axes `[num_steps, L]` (None without a probe).
    """
    look = None if probe is None else functools.partial(probe, arguments)

    def body(x: Array, step: Array) -> tuple[Array, Any]:
        t = jnp.full(x.shape[:1], 1.0 - step / num_steps, jnp.float32)
        velocity, seen = apply(params, x, t, label, predictor=look)
        return x - velocity / num_steps, seen

    return jax.lax.scan(body, noise, jnp.arange(num_steps))
