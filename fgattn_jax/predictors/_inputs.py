"""Checks and defaults that all predictors share."""

import math

import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fgattn_jax.predictors.budget import Budget
from fgattn_jax.types import QUERY_BLOCKS


def check_query_block(query_block: int) -> None:
    """Refuse a number of queries per slice that no implementation has.

    Raises:
        ValueError: `query_block` is not one of `fgattn_jax.types.QUERY_BLOCKS`.
    """
    if isinstance(query_block, bool) or query_block not in QUERY_BLOCKS:
        raise ValueError(f"expected `query_block` to be one of {QUERY_BLOCKS}, got query_block={query_block!r}")


def freeze_order(query_order) -> np.ndarray | None:
    """A query order as a read-only int32 array of one or three axes.

    Raises:
        ValueError: It is traced, has another rank, or is not a permutation of `0 .. T-1`.
    """
    if query_order is None:
        return None
    if isinstance(query_order, jax.core.Tracer):
        raise ValueError(
            "expected `query_order` to be known before tracing, got a traced array: build the predictor outside `jit`"
        )
    order = np.array(query_order)
    if order.ndim not in (1, 3):
        raise ValueError(f"expected `query_order` of shape [T] or [B|1, N|1, T], got shape={order.shape}")
    if not np.issubdtype(order.dtype, np.integer):
        raise ValueError(f"expected integers in `query_order`, got dtype={order.dtype}: give query numbers")
    if not np.array_equal(np.sort(order, axis=-1), np.broadcast_to(np.arange(order.shape[-1]), order.shape)):
        raise ValueError(
            f"expected `query_order` to hold each of 0 .. {order.shape[-1] - 1} once (per head), got repeated or "
            "missing numbers: build it with `fgattn_jax.query_order`"
        )
    order = order.astype(np.int32)
    order.setflags(write=False)
    return order


def order_operand(query_order: np.ndarray | None, batch: int, num_queries: int, num_heads: int):
    """The frozen order as `int32[B|1, N|1, T]`, checked against a call's shapes.

    Raises:
        ValueError: Its length is not the number of queries, or its leading axes fit neither the call nor 1.
    """
    if query_order is None:
        return None
    if query_order.shape[-1] != num_queries:
        raise ValueError(
            f"expected {num_queries} queries in `query_order` as in `query`, got {query_order.shape[-1]}: "
            "make the order for this token grid"
        )
    order = query_order if query_order.ndim == 3 else query_order[None, None]
    if order.shape[0] not in (1, batch) or order.shape[1] not in (1, num_heads):
        raise ValueError(
            f"expected `query_order` with leading axes of 1 or batch={batch} and 1 or heads={num_heads}, "
            f"got shape={order.shape}"
        )
    return jnp.asarray(order)


def check_arrays(query: Array, key: Array, lse: Array | None) -> None:
    """Refuse queries, keys and an LSE that do not fit together.

    Raises:
        ValueError: A rank, shape or dtype is wrong.
    """
    for name, array, axes in (("query", query, "[B, T, N, H]"), ("key", key, "[B, S, K, H]")):
        if array.ndim != 4:
            raise ValueError(f"expected `{name}` of shape {axes}, got shape={array.shape}")
        if 0 in array.shape:
            raise ValueError(f"expected no axis of length 0 in `{name}` {axes}, got shape={array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"expected floating point numbers in `{name}`, got dtype={array.dtype}: cast it")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"expected one batch size, got query batch={query.shape[0]} and key batch={key.shape[0]}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"expected one head width, got query width={query.shape[3]} and key width={key.shape[3]}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"expected query heads to be a multiple of key heads, got query heads={query.shape[2]} and "
            f"key heads={key.shape[2]}"
        )
    if lse is not None:
        expected = (query.shape[0], query.shape[2], query.shape[1])
        if lse.shape != expected:
            raise ValueError(f"expected `lse` of shape [B, N, T]={expected}, got shape={lse.shape}")
        if lse.dtype != jnp.float32:
            raise ValueError(f"expected `lse` in float32, got dtype={lse.dtype}: keep it as attention returned it")


def resolve_scale(scale: float | None, width: int):
    """The softmax scale: `1 / sqrt(H)` unless given.

    Raises:
        ValueError: `scale` is not a scalar.
    """
    if scale is None:
        return np.float32(1.0 / math.sqrt(width))
    if np.ndim(scale) != 0:
        raise ValueError(f"expected a scalar `scale`, got shape={np.shape(scale)}: give one number for all heads")
    if isinstance(scale, int | float | np.number) and not math.isfinite(scale):
        raise ValueError(f"expected a finite `scale`, got scale={scale}")
    return jnp.asarray(scale, jnp.float32)


def check_budget(budget: Budget) -> None:
    """Refuse anything that is not a `Budget`.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(budget, Budget):
        raise ValueError(f"expected a `Budget` for `budget`, got {type(budget).__name__}: write Budget(...)")


def check_chunk_bytes(chunk_bytes: int | None) -> None:
    """Refuse a chunk size that holds no score.

    Raises:
        ValueError: It is not None and not a positive integer.
    """
    if chunk_bytes is not None and (isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int)):
        raise ValueError(f"expected an integer or None for `chunk_bytes`, got chunk_bytes={chunk_bytes!r}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"expected `chunk_bytes` >= 1, got chunk_bytes={chunk_bytes}: 4 MiB suits most CPUs")


def queries_of_rows(num_queries: int, query_block: int) -> np.ndarray:
    """Queries that every row holds: `query_block`, less in a ragged last row."""
    starts = np.arange(0, num_queries, query_block)
    return np.minimum(num_queries - starts, query_block).astype(np.int32)
