"""What masks and work orders must hold: float64 scores of a few rows, and slices that only rounding may decide."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, UInt32

from benchmarks.gpu import masks
from benchmarks.gpu.cases import MaskRule

ROUNDING = 1e-2
"""Scores this close to the last kept one, relative to it, may fall on either side: 16-bit inputs, float32 sums."""

ROUNDED_DOWN = 2**-10
"""Probabilities of mean queries that are ranked may be this much too small, so that `top_p` asks for as much more."""

WRONG_BOUND = 1e-5
"""Largest share of the checked slices that may be wrong beyond rounding."""


class RowScores(NamedTuple):
    """Scores of the slices of a few rows, float64 `[N, rows, S]`; fields are named like `MaskRule.statistic`.

    Attributes:
        rows: Numbers of the rows: the first, one in the middle, the last.
        peak: Largest probability of the row's queries.
        mass: Sum of their probabilities.
        mean: Probability that their mean gives.
    """

    rows: tuple[int, ...]
    peak: Float64[np.ndarray, "N rows S"]
    mass: Float64[np.ndarray, "N rows S"]
    mean: Float64[np.ndarray, "N rows S"]


def row_scores(
    query: np.ndarray, key: np.ndarray, order: Int32[np.ndarray, " T"] | None, *, query_block: int, scale: float
) -> RowScores:
    """Scores of the checked rows.

    Args:
        query: `[T, N, H]`, any float dtype.
        key: `[S, K, H]`.
        order: Which query stands where before grouping; None is raster.
        query_block: `M`.
        scale: Factor of the scores.
    """
    num_queries, num_heads, _ = query.shape
    num_rows = -(-num_queries // query_block)
    rows = tuple(sorted({0, num_rows // 2, num_rows - 1}))
    numbers = np.arange(num_queries) if order is None else np.asarray(order)

    def one_head(head: int) -> np.ndarray:
        head_key = key[:, head * key.shape[1] // num_heads].astype(np.float64)  # [S, H]
        found = []
        for row in rows:
            block = query[numbers[row * query_block : (row + 1) * query_block], head].astype(np.float64)  # [M, H]
            each = _softmax(scale * block @ head_key.T)
            found.append([each.max(axis=0), each.sum(axis=0), _softmax(scale * block.mean(axis=0) @ head_key.T)])
        return np.array(found)  # [rows, 3, S]

    with ThreadPoolExecutor(min(num_heads, os.cpu_count() or 1)) as pool:
        scores = np.stack(list(pool.map(one_head, range(num_heads))))
    return RowScores(rows, *np.moveaxis(scores, 2, 0))


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def wrong_share(scores: Float64[np.ndarray, "N rows S"], kept: Bool[np.ndarray, "N rows S"], rule: MaskRule) -> float:
    """Share of slices that are kept although they score too low, or left out although they score high enough.

    A `top_k` also keeps exactly so many keys; what a row has too many or too few counts as wrong.
    """
    cut, strict = _last_score(scores, rule)
    least, _ = _last_score(scores, rule, more=ROUNDED_DOWN if rule.statistic == "mean" else 0.0)
    wrong = (kept & (scores < least * (1 - ROUNDING))) | (~kept & (scores > cut * (1 + ROUNDING)))
    total = int(wrong.sum())
    if strict is not None:
        total += int(np.abs(kept.sum(axis=-1) - strict).sum())
    return total / wrong.size


def _last_score(scores: np.ndarray, rule: MaskRule, more: float = 0.0) -> tuple[np.ndarray, int | None]:
    """Score of every row's last kept key `[N, rows, 1]`, and how many keys a row keeps where the rule says that.

    `more`: how much more than its share, relative to it, a `top_p` may ask for.
    """
    best_first = -np.sort(-scores, axis=-1)
    value = rule.budget(scores.shape[-1])[rule.rule]
    if rule.rule == "threshold":
        return np.minimum(value, best_first[..., :1]), None  # a row keeps its best key at least
    if rule.rule == "top_k":
        return best_first[..., value - 1 : value], value
    held = np.cumsum(best_first, axis=-1)
    last = (held < min(value / (1 - more), 1.0) * held[..., -1:]).sum(axis=-1, keepdims=True)
    return np.take_along_axis(best_first, np.minimum(last, scores.shape[-1] - 1), axis=-1), None


class MaskVerdict(NamedTuple):
    """What was found in a mask.

    Attributes:
        wrong: See `wrong_share`, over the checked rows; None where the mask cannot be read.
        note: What is wrong; None if nothing is.
    """

    wrong: float | None
    note: str | None


def check_mask(
    bits: np.ndarray, scores: Callable[[], RowScores], rule: MaskRule, shape: tuple[int, int, int], num_keys: int
) -> MaskVerdict:
    """Compare a mask with the scores of some rows; all its rows must keep something, and no key that there is not.

    Args:
        bits: Of the whole mask.
        scores: Gives the scores.
        rule: What it was to keep.
        shape: `(N, R, W)`.
        num_keys: `S`.
    """
    if bits.shape != shape or bits.dtype != np.uint32:
        return MaskVerdict(None, f"bits {bits.dtype}{bits.shape}, expected uint32{shape}")
    found = scores()
    kept = masks.unpack(bits[:, list(found.rows)], num_keys)
    wrong = wrong_share(getattr(found, rule.statistic), kept, rule)
    if wrong > WRONG_BOUND:
        return MaskVerdict(wrong, f"{wrong:.3g} of the checked slices are wrong, allowed {WRONG_BOUND:g}")
    if (empty := int((masks.count_kept(bits) == 0).sum())) > 0:
        return MaskVerdict(wrong, f"{empty} rows keep nothing, and each should keep one key at least")
    if not np.array_equal(masks.pack(kept.reshape(-1, num_keys)).reshape(kept.shape[0], kept.shape[1], -1),
                          bits[:, list(found.rows)]):  # fmt: skip
        return MaskVerdict(wrong, f"bits are set past num_keys={num_keys}")
    return MaskVerdict(wrong, None)


def check_order(order: np.ndarray, bits: UInt32[np.ndarray, "N R W"]) -> str | None:
    """What is wrong with a work order `[N, R, 2]` of a mask: it must be (row, kept keys), most keys first."""
    counts = masks.count_kept(bits)
    rows = np.argsort(-counts, axis=-1, kind="stable")
    expected = np.stack([rows, np.take_along_axis(counts, rows, axis=-1)], axis=-1)
    if order.shape != expected.shape:
        return f"order of shape {order.shape}, expected {expected.shape}"
    wrong = int((order != expected).any(axis=-1).sum())
    return f"{wrong} of {rows.size} rows stand elsewhere or have other counts" if wrong else None
