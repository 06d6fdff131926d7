"""Oracle of the predictors in float64 NumPy: dense softmax, selection by sorting; imports nothing of ours."""

import numpy as np


def make_inputs(shape, *, seed=0, gain=2.0, dtype=np.float32):
    """Random queries and keys for `shape = (B, T, S, N, K, H)`."""
    B, T, S, N, K, H = shape
    rng = np.random.default_rng(seed)
    query = (gain * rng.normal(size=(B, T, N, H))).astype(dtype)
    key = rng.normal(size=(B, S, K, H)).astype(dtype)
    return query, key


def probabilities(query, key, scale=None):
    """Dense softmax and its LSE: `[B, N, T, S]`, `[B, N, T]`."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = np.einsum("btnh,bsnh->bnts", query, key) * scale
    largest = logits.max(-1)
    lse = largest + np.log(np.exp(logits - largest[..., None]).sum(-1))
    return np.exp(logits - lse[..., None]), lse


def queries_of_rows(query_order, num_queries, query_block):
    """The query numbers of every row for one head."""
    order = np.arange(num_queries) if query_order is None else np.asarray(query_order)
    return [order[start : start + query_block] for start in range(0, num_queries, query_block)]


def row_scores(probability, query_block, statistic, query_order=None):
    """Statistic of the probabilities of the queries of every row: `[B, N, R, S]`."""
    B, N, T, _ = probability.shape
    scores, rows = [], []
    for b in range(B):
        for n in range(N):
            order = query_order
            if order is not None and np.ndim(order) == 3:
                order = order[b % len(order), n % order.shape[1]]
            rows = queries_of_rows(order, T, query_block)
            scores.append([getattr(np, statistic)(probability[b, n, row], axis=0) for row in rows])
    return np.array(scores).reshape(B, N, len(rows), -1)


def top_counts(scores, top_p):
    """The least number of best keys that hold the share `top_p` of a row."""
    best = -np.sort(-scores, axis=-1)
    held = np.cumsum(best, axis=-1)
    return np.where(held[..., -1] > 0, (held < top_p * held[..., -1:]).sum(-1) + 1, 0)


def best_keys(scores, counts):
    """The best `counts` keys of every row, the lower key first among equals."""
    ranks = np.argsort(np.argsort(-scores, axis=-1, kind="stable"), axis=-1, kind="stable")
    return ranks < counts[..., None]


def assert_same_but_for_rounding(kept, scores, threshold, rtol):
    """`kept` is `scores > threshold`, but for scores within `rtol` of the threshold, which must be rare."""
    near = np.abs(scores - threshold) <= rtol * threshold
    assert near.mean() < 0.01
    np.testing.assert_array_equal(kept | near, (scores > threshold) | near)


def assert_smallest_set(kept, scores, top_p, tol=1e-5):
    """Every row of `kept` holds `top_p` of its score, no key less would do, and no skipped key beats a kept one."""
    total = scores.sum(-1)
    held = np.where(kept, scores, 0).sum(-1)
    least = np.where(kept, scores, np.inf).min(-1)
    assert (held >= (top_p - tol) * total).all()
    assert (held - least < (top_p + tol) * total).all()
    assert (np.where(kept, -np.inf, scores).max(-1) <= least * (1 + 1e-4)).all()
