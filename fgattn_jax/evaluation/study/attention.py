"""Attention of the study: dense masked softmax, and masks whose thresholds are traced.

The same numbers as `fgattn_jax.attention` up to rounding (the study checks it on one setting), with all scores of a
clip's layer in memory. It is for quality, not for speed: one compiled program serves a whole sweep.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fgattn_jax.predictors.mean_query import mean_queries

STATISTICS: tuple[str, ...] = ("peak", "mass", "mean")
"""Scores by number: largest probability, sum of probabilities, probability of the mean query."""
MAX_STEPS = 50
"""Longest run; schedules are padded to it."""


class Settings(NamedTuple):
    """One point of a sweep; all arrays, so that another point needs no new program.

    Attributes:
        statistic: int32, index into `STATISTICS`.
        threshold: float32, scores above it are kept; 0 if `top_p` rules.
        top_p: float32, share of the score to keep; 0 if `threshold` rules.
        query_order: int32 `[T]`, the query at each position.
        num_steps: int32, Euler steps.
        refresh: bool `[MAX_STEPS]`, steps at which masks are made.
        dense: bool `[MAX_STEPS]`, steps whose attention is dense.
    """

    statistic: Int[Array, ""]
    threshold: Float[Array, ""]
    top_p: Float[Array, ""]
    query_order: Int[Array, " T"]
    num_steps: Int[Array, ""]
    refresh: Bool[Array, " steps"]
    dense: Bool[Array, " steps"]


class LayerState(NamedTuple):
    """What a layer gets through the model's mask argument: its mask, and the step's settings (leading layer axis)."""

    kept: Bool[Array, "B N R S"]
    settings: Settings
    refresh: Bool[Array, ""]
    dense: Bool[Array, ""]


class StudyAttention:
    """Attention seam of a model for the study: `(query, key, value, mask, predictor) -> (output, extra)`.

    With a `LayerState` as `mask` it makes masks at refresh steps and attends under them; `extra` is the layer's mask.
    With a function `probe(query, key)` as `predictor` attention is dense and `extra` is what the probe returns.

    Args:
        query_block: Queries per slice, `M`.
    """

    def __init__(self, query_block: int):
        self.query_block = query_block

    def __call__(self, query: Array, key: Array, value: Array, mask: Any = None, predictor: Any = None) -> tuple:
        """See the class; tokens must be a multiple of `query_block`."""
        if mask is None:
            identity = jnp.arange(query.shape[1], dtype=jnp.int32)
            output = masked_attention(query, key, value, None, identity, self.query_block)
            return output, None if predictor is None else predictor(query, key)
        state: LayerState = mask
        settings = state.settings
        kept = jax.lax.cond(
            state.refresh,
            lambda: predict_rows(query, key, settings, self.query_block),
            lambda: state.kept,
        )
        output = masked_attention(query, key, value, kept | state.dense, settings.query_order, self.query_block)
        return output, kept


def masked_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    kept: Bool[Array, "B N R S"] | None,
    query_order: Int[Array, " T"],
    query_block: int,
) -> Float[Array, "B T N H"]:
    """Softmax over the kept keys of every row, all scores of one batch entry in memory; None keeps everything.

    Rows are never empty here (masks keep at least one key per row).
    """

    def one(entry: tuple[Array, ...]) -> Array:
        rows, keys, values, kept_rows = entry  # [R, M, N, H], [S, N, H], [S, N, H], [N, R, S]
        scores = scaled_scores(rows, keys)
        if kept is not None:
            scores = jnp.where(kept_rows[:, :, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        return jnp.einsum("nrms,snh->rmnh", weights, values, preferred_element_type=jnp.float32).astype(query.dtype)

    batch, _, num_heads, width = query.shape
    rows = query[:, query_order].reshape(batch, -1, query_block, num_heads, width)
    dummy = jnp.ones((batch, 0), bool) if kept is None else kept
    output = jax.lax.map(one, (rows, key, value, dummy)).reshape(query.shape)
    return jnp.zeros_like(output).at[:, query_order].set(output, unique_indices=True)


def predict_rows(
    query: Float[Array, "B T N H"], key: Float[Array, "B S N H"], settings: Settings, query_block: int
) -> Bool[Array, "B N R S"]:
    """Masks by the rule of the settings: those of `ExactPredictor` and `MeanQueryPredictor`, with traced numbers."""

    def exact(entry: tuple[Array, Array]) -> Array:
        rows, keys = entry
        probabilities = jax.nn.softmax(scaled_scores(rows, keys), axis=-1)  # [N, R, M, S]
        return jnp.where(settings.statistic == 0, probabilities.max(2), probabilities.sum(2))

    def mean(entry: tuple[Array, Array]) -> Array:
        rows, keys = entry
        means = mean_queries(rows.reshape(1, -1, *rows.shape[2:]), None, query_block)  # [1, R, N, H]
        return jax.nn.softmax(scaled_scores(means[0][:, None], keys.astype(jnp.float32)), axis=-1)[:, :, 0]

    def one(entry: tuple[Array, Array]) -> Array:
        scores = jax.lax.cond(settings.statistic == 2, mean, exact, entry)  # [N, R, S]
        flat = scores.reshape(-1, scores.shape[-1])
        return select_traced(flat, settings.threshold, settings.top_p).reshape(scores.shape)

    batch, _, num_heads, width = query.shape
    rows = query[:, settings.query_order].reshape(batch, -1, query_block, num_heads, width)
    return jax.lax.map(one, (rows, key))


def select_traced(
    scores: Float[Array, "R S"], threshold: Float[Array, ""], top_p: Float[Array, ""]
) -> Bool[Array, "R S"]:
    """`Budget(threshold=...)`, or `Budget(top_p=...)` where `top_p` is positive, with traced numbers.

    A row keeps at least its best key. Keys that tie with the last kept one are kept too, where a `Budget` drops them.

    Args:
        scores: Non-negative.
        threshold: Scores above it are kept.
        top_p: Share of the row's score to keep; 0 lets `threshold` rule.
    """
    # Non-negative floats order as their bit patterns, so that the last kept score is found by bisection over integers.
    patterns = jax.lax.bitcast_convert_type(scores, jnp.int32)
    best = jnp.max(patterns, axis=-1)
    target = top_p * jnp.sum(scores, axis=-1)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        lower, upper = bracket
        middle = lower + (upper - lower) // 2
        mass = jnp.sum(jnp.where(patterns >= middle[:, None], scores, 0.0), axis=-1)
        return jnp.where(mass >= target, middle, lower), jnp.where(mass >= target, upper, middle)

    by_share, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(best), best + 1))
    by_threshold = jax.lax.bitcast_convert_type(threshold, jnp.int32) + 1
    last = jnp.minimum(jnp.where(top_p > 0, by_share, by_threshold), best)
    return patterns >= last[:, None]


def scaled_scores(rows: Float[Array, "R M N H"], keys: Float[Array, "S N H"]) -> Float[Array, "N R M S"]:
    """Scaled scores in float32; products of 16-bit inputs are exact."""
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    scores = jnp.einsum("rmnh,snh->nrms", rows, keys, precision=precision, preferred_element_type=jnp.float32)
    return scores * rows.shape[-1] ** -0.5
