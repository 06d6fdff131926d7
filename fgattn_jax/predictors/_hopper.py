"""Which masks the CUDA kernels make, and how a predictor hands them its call."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fgattn_jax.masks._bits import num_words
from fgattn_jax.predictors.budget import Budget
from fgattn_jax.xla_ffi import masks, support
from fgattn_jax.xla_ffi import one_pass as one_pass_kernel

_SMALLEST = float(np.finfo(np.float32).tiny)


def exact_bits(query, key, lse, statistic: str, budget: Budget, query_block: int) -> Callable | None:
    """The function `(query, key, lse, query_order, scale) -> bits` of the kernel for exact masks; None if it has none.

    `"peak"` compares with a threshold, and has no kernel for budgets that rank keys.
    """
    if lse is None or not _runs_here(query, key, query_block):
        return None
    if statistic == "mass" and _can_rank(budget, key):
        make = _mass_bits
    elif statistic == "peak" and not ranks(budget):
        make = _peak_bits
    else:
        return None
    always = _words_of(budget, key.shape[1])
    return lambda *operands: make(*operands, budget=budget, query_block=query_block) | jnp.asarray(always)


def mean_bits(query, key, budget: Budget, query_block: int, num_means: int) -> Callable | None:
    """The function `(query, key, query_order, scale) -> bits` of the kernel for mean queries; None if it has none."""
    if num_means not in (1, 2, 4, masks.MOST_MEANS) or not _runs_here(query, key, query_block):
        return None
    if ranks(budget) and not _can_rank(budget, key):
        return None
    always = _words_of(budget, key.shape[1])
    keep_best = budget.min_keys == 1 and not ranks(budget)

    def bits(query, key, query_order, scale):
        keep = _rule(budget) if ranks(budget) else _log_threshold(budget, query)
        shape = {"scale": scale, "query_block": query_block, "num_means": num_means, "keep_best": keep_best}
        found, _ = masks.mean_mask(query, key, keep, query_order, **shape)
        return found | jnp.asarray(always)

    return bits


def one_pass(query, key, budget: Budget, query_block: int, scale: float) -> Callable | None:
    """The function `(query, key, value, lse, query_order) -> output, lse, bits` of the kernel; None if it has none."""
    if ranks(budget) or not _runs_here(query, key, query_block):
        return None
    always = _words_of(budget, key.shape[1])

    def run(query, key, value, lse, query_order):
        shape = {"scale": scale, "query_block": query_block, "keep_best": budget.min_keys == 1}
        operands = (query, key, value, lse, _log_threshold(budget, query), query_order)
        output, new_lse, bits, _ = one_pass_kernel.attention_and_mask(*operands, **shape)
        return output, new_lse, bits | jnp.asarray(always)

    return run


def _peak_bits(query, key, lse, query_order, scale, *, budget: Budget, query_block: int):
    shape = {"scale": scale, "query_block": query_block, "keep_best": budget.min_keys == 1}
    bits, _ = masks.exact_mask(query, key, lse, _log_threshold(budget, query), query_order, **shape)
    return bits


def _log_threshold(budget: Budget, query):
    # Below the smallest number, exponentials are 0 on most devices, and 0 is not above a threshold of 0.
    thresholds = budget.thresholds(query.shape[2])
    assert thresholds is not None
    return jnp.asarray(np.log(np.maximum(thresholds, _SMALLEST)), jnp.float32)


def _mass_bits(query, key, lse, query_order, scale, *, budget: Budget, query_block: int):
    bits, _ = masks.exact_mass(query, key, lse, query_order, _rule(budget), scale=scale, query_block=query_block)
    return bits


def _rule(budget: Budget) -> masks.SelectRule:
    names = ("threshold", "top_p", "top_k", "min_keys", "max_keys", "head_floor")
    return masks.SelectRule(**{name: getattr(budget, name) for name in names})


def ranks(budget: Budget) -> bool:
    """Whether a budget is more than a threshold, so that a key's score alone does not say whether it is kept."""
    return budget.threshold is None or budget.min_keys > 1 or budget.max_keys is not None or budget.head_floor > 0


def _can_rank(budget: Budget, key) -> bool:
    """Whether the kernels that rank keys take the budget: they know one threshold for all heads."""
    return not isinstance(budget.threshold, tuple) and key.shape[1] <= masks.MOST_RANKED_KEYS


def _runs_here(query, key, query_block: int) -> bool:
    if key.dtype != query.dtype or jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    return not support.unsupported_reasons(
        head_dim=query.shape[3],
        query_block=query_block,
        dtype=str(query.dtype),
        platform="gpu",
        compute_capability=None if capability is None else str(capability),
        for_masks=True,
    )


def _words_of(budget: Budget, num_keys: int) -> np.ndarray:
    """Words of the keys that every row keeps."""
    words = np.zeros(num_words(num_keys), np.uint32)
    for key in budget.kept_keys(num_keys):
        words[key // 32] |= np.uint32(1 << key % 32)
    return words
