"""Shares of slices and blocks: what is negligible, what agrees by chance, how unevenly rows are filled."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BLOCKS: tuple[int, ...] = (16, 32, 64, 128)
"""Sizes whose negligible shares are measured, smallest first; each is twice the one before."""


class NegligibleShares(NamedTuple):
    """Shares of slices and blocks whose largest probability is below a threshold; last axis as `BLOCKS`.

    Attributes:
        slices: M queries x 1 key.
        blocks: M queries x M keys.
    """

    slices: Float[Array, "*B sizes"]
    blocks: Float[Array, "*B sizes"]


def negligible_shares(probabilities: Float[Array, "*B T S"], threshold: float) -> NegligibleShares:
    """How much could be skipped at every block shape, if only what never exceeds the threshold may be skipped.

    A slice or block is negligible if the largest probability in it is below the threshold. Queries (and keys, for
    blocks) are grouped as they come: permute the axes first to measure a query order.

    Args:
        probabilities: Attention probabilities; rows sum to 1. `T` and `S` are multiples of 128.
        threshold: The paper takes `0.5 / S`.

    Returns:
        Shares from 0 to 1 per leading index, float32.

    Raises:
        ValueError: `T` or `S` is no multiple of the largest size: a smaller last block would count as a whole one.

    References:
        FG-Attn (arXiv 2509.16518), table 2.
    """
    num_queries, num_keys = probabilities.shape[-2:]
    if num_queries % BLOCKS[-1] or num_keys % BLOCKS[-1]:
        raise ValueError(
            f"expected `T` and `S` to be multiples of {BLOCKS[-1]}, got T={num_queries} and S={num_keys}: "
            "measure on a grid with such a number of tokens"
        )
    slices, blocks = [], []
    peaks, grouped = probabilities, 1
    for size in BLOCKS:
        peaks = _group_max(peaks, -2, size // grouped)
        grouped = size
        slices.append(_share_below(peaks, threshold))
        blocks.append(_share_below(_group_max(peaks, -1, size), threshold))
    return NegligibleShares(jnp.stack(slices, axis=-1), jnp.stack(blocks, axis=-1))


def _group_max(values: Array, axis: int, size: int) -> Array:
    axis %= values.ndim
    shape = (*values.shape[:axis], values.shape[axis] // size, size, *values.shape[axis + 1 :])
    return jnp.max(values.reshape(shape), axis=axis + 1)


def _share_below(values: Array, threshold: float) -> Array:
    return jnp.mean(values < threshold, axis=(-2, -1), dtype=jnp.float32)


def random_iou(counts: Int[Array, "*B R"], reference: Int[Array, "*B R"], num_keys: int) -> Float[Array, ""]:
    """IoU that masks with these kept counts would have if their keys were drawn at random.

    Per row, `c` of `S` keys and `d` of `S` keys meet in `c * d / S` keys on average; the ratio of the sums over rows
    of intersection and union is returned. Two empty masks agree: 1.

    Args:
        counts: Kept keys of every row of a mask.
        reference: Kept keys of every row of the other mask, of the same shape.
        num_keys: Keys, `S`.
    """
    counts, reference = counts.astype(jnp.float32), reference.astype(jnp.float32)
    both = jnp.sum(counts * reference / num_keys)
    either = jnp.sum(counts + reference) - both
    return jnp.where(either > 0, both / jnp.maximum(either, 1e-9), 1.0)


class CountSpread(NamedTuple):
    """How unevenly rows are filled; coefficients of variation (standard deviation by mean).

    Attributes:
        within_heads: Over the rows of a head, mean over heads.
        between_heads: Of the mean counts of the heads.
        largest_by_mean: Longest row by mean row of its head, mean over heads: what equal portions of rows lose.
    """

    within_heads: float
    between_heads: float
    largest_by_mean: float


def count_spread(counts: Int[np.ndarray, "*H R"]) -> CountSpread:
    """Spread of the kept counts over rows, within and between heads; heads without any kept key are left out.

    Args:
        counts: Kept keys of every row (last axis) of any number of heads.

    Raises:
        ValueError: No head keeps a key.
    """
    heads = np.asarray(counts, np.float64).reshape(-1, np.shape(counts)[-1])
    means = heads.mean(-1)
    heads, means = heads[means > 0], means[means > 0]
    if not len(means):
        raise ValueError("expected kept keys in at least one head, got counts that are all 0: nothing to compare")
    return CountSpread(
        within_heads=float((heads.std(-1) / means).mean()),
        between_heads=float(means.std() / means.mean()),
        largest_by_mean=float((heads.max(-1) / means).mean()),
    )
