"""Selection of the best keys of every row, exact and without a sort.

Non-negative floats order as their bit patterns do, so the score of the last kept key is found by bisection over
integers: at most 31 passes over the block, each a compare and a sum. (A sort of `S` keys per row costs XLA's CPU
backend about as much as the attention itself.)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from fgattn_jax.predictors.budget import Budget

_SIGN = np.int32(0x7FFFFFFF)
_LARGEST = np.int32(0x7FFFFFFE)  # one below the largest int32: the upper end of a bracket is one more


def select(
    scores: Float32[Array, "R S"],
    budget: Budget,
    floor: Int32[Array, ""] | None = None,
    threshold: Float32[Array, ""] | None = None,
) -> Bool[Array, "R S"]:
    """The keys that every row keeps.

    Args:
        scores: Non-negative; NaN ranks first.
        budget: The rule, resolved (`has_rule`).
        floor: The least number of keys of these rows, on top of `budget.min_keys` (the per-head floor).
        threshold: That of these rows' head; None is `budget.threshold`, one number.

    Returns:
        True where a key is kept.
    """
    if budget.threshold is not None and budget.min_keys <= 1 and budget.max_keys is None and floor is None:
        kept = _above(scores, _threshold(budget, threshold))
        if budget.min_keys == 1:
            kept = kept | _first_best(scores, kept)
    else:
        patterns = _patterns(scores)
        counts, lower = _rule_counts(scores, patterns, budget, threshold)
        kept = _best(patterns, _final_counts(counts, budget, scores.shape[-1], floor), lower)
    return _with_kept_keys(kept, budget)


def rule_counts(
    scores: Float32[Array, "R S"], budget: Budget, threshold: Float32[Array, ""] | None = None
) -> Int32[Array, " R"]:
    """`max(rule, min_keys)` of every row: what the per-head floor is the mean of. Arguments as `select`."""
    counts, _ = _rule_counts(scores, _patterns(scores), budget, threshold)
    return jnp.maximum(counts, budget.min_keys)


def _threshold(budget: Budget, threshold) -> Float32[Array, ""]:
    return jnp.asarray(budget.threshold if threshold is None else threshold, jnp.float32)


def _above(scores: Float32[Array, "R S"], threshold: Float32[Array, ""]) -> Bool[Array, "R S"]:
    """True where a score is greater than the threshold, or NaN."""
    return ~(scores <= threshold)


def _final_counts(counts, budget, num_keys, floor):
    counts = jnp.maximum(counts, budget.min_keys)
    if floor is not None:
        counts = jnp.maximum(counts, floor)
    return jnp.minimum(counts, num_keys if budget.max_keys is None else min(budget.max_keys, num_keys))


def _with_kept_keys(kept, budget):
    keys = budget.kept_keys(kept.shape[-1])
    if not keys:
        return kept
    always = np.zeros(kept.shape[-1], bool)
    always[list(keys)] = True
    return kept | always


def _first_best(scores, kept):
    """One-hot of the first largest score, in rows that kept nothing."""
    best = jnp.max(scores, axis=-1, keepdims=True)
    keys = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    first = jnp.min(jnp.where(scores == best, keys, scores.shape[-1]), axis=-1, keepdims=True)
    return (keys == first) & ~jnp.any(kept, axis=-1, keepdims=True)


def _patterns(scores) -> Int32[Array, "R S"]:
    """Bit patterns of non-negative floats: int32 in the same order, NaN last."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32) & _SIGN
    return jnp.minimum(bits, _LARGEST)


def _rule_counts(scores, patterns, budget, threshold):
    """Keys per row by the rule alone, and a pattern that at least that many keys of the row reach."""
    lowest = jnp.zeros(scores.shape[:1], jnp.int32)
    if budget.top_k is not None:
        return jnp.full_like(lowest, budget.top_k), lowest
    if budget.threshold is not None:
        threshold = _threshold(budget, threshold)
        counts = jnp.sum(_above(scores, threshold), axis=-1, dtype=jnp.int32)
        # Every pattern above the threshold's is reached by exactly these keys.
        return counts, jnp.full_like(lowest, jax.lax.bitcast_convert_type(threshold, jnp.int32) + 1)
    return _share_counts(scores, patterns, budget.top_p)


def _share_counts(scores, patterns, top_p):
    """The least number of best keys whose scores sum to `top_p` of the row, and the pattern of the last of them."""

    def mass(pivot):
        """Score of the keys at or above the pivot. Comparing floats takes half the time of integers on a CPU."""
        above = scores >= jax.lax.bitcast_convert_type(pivot, jnp.float32)[:, None]
        return jnp.sum(jnp.where(above, scores, 0.0), axis=-1)

    def count(pivot):
        return jnp.sum(patterns >= pivot[:, None], axis=-1, dtype=jnp.int32)

    # Float addition of non-negative numbers in one fixed order is monotone in the pivot, so bisection is exact.
    num_keys = scores.shape[-1]
    total = mass(jnp.zeros(scores.shape[:1], jnp.int32))
    target = total * jnp.float32(top_p)
    # Keys below `(1 - top_p) * total / S` do not hold `1 - top_p` of the score even all together; half of that leaves
    # room for rounding where the share is not next to 1.
    spare = 0.5 * (1.0 - top_p) / num_keys if top_p < 0.999 else 0.0
    lower = _patterns(total * jnp.float32(spare))
    upper = jnp.max(patterns, axis=-1) + 1

    def unfinished(state):
        lower, upper = state
        return jnp.any(upper - lower > 1)

    def halve(state):
        lower, upper = state
        middle = lower + (upper - lower) // 2
        enough = mass(middle) >= target
        return jnp.where(enough, middle, lower), jnp.where(enough, upper, middle)

    lower, upper = jax.lax.while_loop(unfinished, halve, (lower, upper))
    above, reached = count(upper), count(lower)
    last = jax.lax.bitcast_convert_type(lower, jnp.float32)
    # Of the keys that tie at `last`, as many as are missing; at least one, since those above are not enough.
    missing = jnp.ceil((target - mass(upper)) / jnp.where(last > 0, last, 1.0))
    missing = jnp.clip(missing, 1, (reached - above).astype(jnp.float32)).astype(jnp.int32)
    broken = jnp.any(jnp.isnan(scores), axis=-1) | ~jnp.isfinite(total)
    counts = jnp.where(total == 0, 0, above + missing)
    return jnp.where(broken, num_keys, counts), lower


def _best(patterns, counts, lower):
    """The best `counts` keys of every row, the lower key first among equals; `lower` is a guess at the last pattern."""

    def reached(pivot):
        return jnp.sum(patterns >= pivot[:, None], axis=-1, dtype=jnp.int32)

    number = reached(lower)
    low = number < counts  # the guess was too high: start from below all
    lower, number = jnp.where(low, 0, lower), jnp.where(low, patterns.shape[-1], number)
    upper = jnp.max(patterns, axis=-1) + 1
    lower, number = jnp.where(counts > 0, lower, upper), jnp.where(counts > 0, number, 0)

    def unfinished(state):
        lower, upper, number = state
        return jnp.any((number != counts) & (upper - lower > 1))

    def halve(state):
        lower, upper, number = state
        middle = jnp.where(number == counts, lower, lower + (upper - lower) // 2)
        found = reached(middle)
        enough = found >= counts
        return jnp.where(enough, middle, lower), jnp.where(enough, upper, middle), jnp.where(enough, found, number)

    lower, _, number = jax.lax.while_loop(unfinished, halve, (lower, upper, number))
    return _first_of_equals(patterns, counts, lower, number)


def _first_of_equals(patterns, counts, last, number):
    """Keys at or above `last` (`number` of them), less the highest-index ones at `last` beyond `counts`."""
    keys = jax.lax.broadcasted_iota(jnp.int32, patterns.shape, 1)
    equal = patterns == last[:, None]
    above = jnp.sum(patterns > last[:, None], axis=-1, dtype=jnp.int32)
    num_keys = patterns.shape[-1]

    def count(end):
        return jnp.sum(equal & (keys < end[:, None]), axis=-1, dtype=jnp.int32)

    # Smallest `end` such that the equal keys below it are enough; nothing to search where no key is too many.
    lower = jnp.where(number > counts, 0, num_keys - 1)
    upper = jnp.full_like(lower, num_keys)

    def unfinished(state):
        lower, upper = state
        return jnp.any(upper - lower > 1)

    def halve(state):
        lower, upper = state
        middle = lower + (upper - lower) // 2
        enough = count(middle) >= counts - above
        return jnp.where(enough, lower, middle), jnp.where(enough, middle, upper)

    _, end = jax.lax.while_loop(unfinished, halve, (lower, upper))
    return (patterns > last[:, None]) | (equal & (keys < end[:, None]))
