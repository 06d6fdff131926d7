"""Attention under a row mask in float64 NumPy, one query at a time: what everything else is compared with.

It imports nothing of ours and knows neither bits nor tiles.
"""

from typing import NamedTuple

import numpy as np


class OracleGradients(NamedTuple):
    """Float64 gradients of `sum(output * d_output) + sum(lse * d_lse)`; empty rows count for nothing."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


def _row_of_query(num_queries: int, query_block: int, order: np.ndarray | None) -> np.ndarray:
    row = np.empty(num_queries, np.int64)
    row[np.arange(num_queries) if order is None else order] = np.arange(num_queries) // query_block
    return row


def kept_keys(rows: np.ndarray, query_block: int, order: np.ndarray | None, num_queries: int) -> np.ndarray:
    """Boolean `[T, S]` of one head: row mask `[R, S]` spread over the queries, in their natural order."""
    return rows[_row_of_query(num_queries, query_block, order)]


def _heads(query, key, value, rows, order):
    """Yields batch, head, key/value head and the float64 arrays of each head."""
    batch, _, num_heads, _ = query.shape
    groups = num_heads // key.shape[2]
    rows = np.broadcast_to(rows, (batch, num_heads, *rows.shape[2:]))
    if order is not None:
        order = np.broadcast_to(order, (batch, num_heads, order.shape[2]))
    for b in range(batch):
        for n in range(num_heads):
            arrays = (
                np.asarray(query[b, :, n], np.float64),
                *(np.asarray(x[b, :, n // groups], np.float64) for x in (key, value)),
            )
            yield b, n, n // groups, arrays, rows[b, n], None if order is None else order[b, n]


def attention_oracle(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    rows: np.ndarray,
    *,
    query_block: int,
    scale: float,
    order: np.ndarray | None = None,
    queries: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Output `[B, T, N, H]` and LSE `[B, N, T]` in float64.

    Args:
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, H]`.
        rows: Boolean `[B|1, N|1, R, S]`, True keeps.
        query_block: Queries per row.
        scale: Factor of the scores.
        order: `[B|1, N|1, T]`, which query stands where; None is raster.
        queries: Only these query numbers are computed (for large sizes); the others stay 0 and -inf.
    """
    batch, num_queries, num_heads, _ = query.shape
    output = np.zeros(query.shape)
    lse = np.full((batch, num_heads, num_queries), -np.inf)
    for b, n, _, (q, k, v), row_mask, head_order in _heads(query, key, value, rows, order):
        row = _row_of_query(num_queries, query_block, head_order)
        for t in range(num_queries) if queries is None else queries:
            kept = row_mask[row[t]]
            if kept.any():
                scores = k[kept] @ q[t] * scale
                largest = scores.max()
                weights = np.exp(scores - largest)
                lse[b, n, t] = largest + np.log(weights.sum())
                output[b, t, n] = weights @ v[kept] / weights.sum()
    return output, lse


def gradient_oracle(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    rows: np.ndarray,
    d_output: np.ndarray,
    d_lse: np.ndarray,
    *,
    query_block: int,
    scale: float,
    order: np.ndarray | None = None,
) -> OracleGradients:
    """Gradients in float64; arguments as in `attention_oracle`, cotangents in the shapes of output and LSE."""
    grads = OracleGradients(*(np.zeros(x.shape) for x in (query, key, value)))
    num_queries = query.shape[1]
    for b, n, kv, (q, k, v), row_mask, head_order in _heads(query, key, value, rows, order):
        row = _row_of_query(num_queries, query_block, head_order)
        for t in range(num_queries):
            kept = row_mask[row[t]]
            if not kept.any():
                continue
            scores = k[kept] @ q[t] * scale
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            d_out = np.asarray(d_output[b, t, n], np.float64)
            d_weights = v[kept] @ d_out
            d_scores = weights * (d_weights - weights @ d_weights + float(d_lse[b, n, t])) * scale
            grads.query[b, t, n] = d_scores @ k[kept]
            grads.key[b, kept, kv] += np.outer(d_scores, q[t])
            grads.value[b, kept, kv] += np.outer(weights, d_out)
    return grads
