"""Random queries and keys, and what float64 makes of them: for the kernels that make masks."""

import dataclasses

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Scored:
    """Queries, keys and what float64 makes of them."""

    query: np.ndarray
    key: np.ndarray
    lse: np.ndarray
    order: np.ndarray | None
    scale: float
    query_block: int
    probabilities: np.ndarray  # [B, N, T, S]; 0 of queries that count as nothing

    def of_rows(self, combine) -> np.ndarray:
        """`[B, N, R, S]`: `combine` over the queries of every row."""
        batch, num_heads, num_queries, num_keys = self.probabilities.shape
        block = self.query_block
        result = np.zeros((batch, num_heads, -(-num_queries // block), num_keys))
        for b, n, r in np.ndindex(*result.shape[:3]):
            order = np.arange(num_queries)
            if self.order is not None:
                order = self.order[b % self.order.shape[0], n % self.order.shape[1]]
            result[b, n, r] = combine(self.probabilities[b, n, order[r * block : (r + 1) * block]], axis=0)
        return result

    @property
    def num_rows(self) -> int:
        return -(-self.query.shape[1] // self.query_block)

    @property
    def num_words(self) -> int:
        return 4 * -(-self.key.shape[1] // 128)

    @property
    def arrays(self):
        return self.query, self.key, self.lse


def make(
    num_queries, num_keys, *, heads=(2, 1), head_dim=64, query_block=128, dtype="bfloat16", batch=1, ordered=False,
    scale=0.125, seed=0, empty=(),
) -> Scored:  # fmt: skip
    rng = np.random.default_rng(seed)
    num_heads, num_kv_heads = heads
    kind = np.dtype(dtype) if dtype == "float16" else ml_dtypes.bfloat16
    query = (2 * rng.standard_normal((batch, num_queries, num_heads, head_dim))).astype(kind)
    key = rng.standard_normal((batch, num_keys, num_kv_heads, head_dim)).astype(kind)
    wide = np.repeat(key.astype(np.float64), num_heads // num_kv_heads, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", query.astype(np.float64), wide) * scale
    lse = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
    lse[..., list(empty)] = -np.inf
    with np.errstate(over="ignore"):
        probabilities = np.where(np.isneginf(lse)[..., None], 0, np.exp(scores - lse[..., None]))
    order = None
    if ordered:
        order = np.stack([rng.permutation(num_queries).astype(np.int32) for _ in range(num_heads)])[None]
    return Scored(query, key, np.ascontiguousarray(lse, np.float32), order, scale, query_block, probabilities)


def one_row(scores: np.ndarray) -> Scored:
    """One query, whose score of every key is given: as far as float16 holds it."""
    query, key = np.zeros((1, 1, 1, 64), np.float16), np.zeros((1, scores.size, 1, 64), np.float16)
    query[..., 0], key[0, :, 0, 0] = 1, scores
    scores = key[0, :, 0, 0].astype(np.float64)
    lse = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
    probabilities = np.exp(scores - lse)[None, None, None]
    return Scored(query, key, np.full((1, 1, 1), lse, np.float32), None, 1.0, 64, probabilities)


def unpack(bits: np.ndarray, num_keys: int) -> np.ndarray:
    rows = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), axis=-1, bitorder="little").astype(bool)
    assert not rows[..., num_keys:].any()
    return rows[..., :num_keys]


def mean_scores(scored: Scored, num_means: int = 1) -> np.ndarray:
    """Softmax over all keys of every row's means, averaged: float64 `[B, N, R, S]`."""
    batch, num_queries, num_heads, _ = scored.query.shape
    block, group = scored.query_block, num_heads // scored.key.shape[2]
    result = np.zeros((batch, num_heads, -(-num_queries // block), scored.key.shape[1]))
    for b, n, r in np.ndindex(*result.shape[:3]):
        order = np.arange(num_queries)
        if scored.order is not None:
            order = scored.order[b % scored.order.shape[0], n % scored.order.shape[1]]
        row = order[r * block : (r + 1) * block]
        for part in np.split(row, range(block // num_means, len(row), block // num_means)):
            mean = scored.query[b, part, n].astype(np.float32).mean(0).astype(scored.query.dtype)
            logits = scored.key[b, :, n // group].astype(np.float64) @ mean.astype(np.float64) * scored.scale
            weights = np.exp(logits - logits.max())
            result[b, n, r] += weights / weights.sum()
        result[b, n, r] /= -(-len(row) // (block // num_means))
    return result
