"""Slice masks in plain NumPy: the oracle of the mask tests. Imports nothing of the package."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """Sizes of a mask; `order` is "raster", "shared" ([T]) or "own" ([B, N, T])."""

    batch: int
    heads: int
    queries: int
    keys: int
    block: int
    order: str

    @property
    def rows(self):
        return -(-self.queries // self.block)

    @property
    def sizes(self):
        return {"query_block": self.block, "num_queries": self.queries, "num_keys": self.keys}


CASES = {
    "whole rows and words": Case(2, 3, 128, 256, 64, "raster"),
    "odd lengths, smallest slices": Case(2, 2, 71, 133, 16, "own"),
    "keys end in a word": Case(1, 2, 96, 100, 32, "shared"),
    "keys end at a word": Case(1, 1, 130, 160, 128, "raster"),
    "fewer queries than a row": Case(2, 1, 5, 129, 128, "own"),
    "one query, one key": Case(1, 1, 1, 1, 16, "raster"),
    "more queries than keys": Case(1, 3, 257, 31, 64, "own"),
}


def random_dense(case, seed=0, density=0.1):
    """Random booleans [B, N, T, S], with an empty first query and a full last one."""
    dense = np.random.default_rng(seed).random((case.batch, case.heads, case.queries, case.keys)) < density
    dense[:, :, 0] = False
    dense[:, :, -1] = True
    return dense


def random_rows(case, seed=0, density=0.2):
    """Random booleans [B, N, R, S], with an empty first row and a full last one."""
    rows = np.random.default_rng(seed).random((case.batch, case.heads, case.rows, case.keys)) < density
    rows[:, :, 0] = False
    rows[:, :, -1] = True
    return rows


def random_order(case, seed=0):
    """What a caller passes as `query_order`."""
    generator = np.random.default_rng(seed)
    if case.order == "raster":
        return None
    if case.order == "shared":
        return generator.permutation(case.queries).astype(np.int32)
    lines = [generator.permutation(case.queries) for _ in range(case.batch * case.heads)]
    return np.array(lines, np.int32).reshape(case.batch, case.heads, case.queries)


def full_order(case, order):
    """The order of every batch entry and head, [B, N, T]."""
    order = np.arange(case.queries) if order is None else order
    return np.broadcast_to(order, (case.batch, case.heads, case.queries))


def row_queries(case, order):
    """Yields (batch, head, row, the queries of that row)."""
    orders = full_order(case, order)
    for b in range(case.batch):
        for n in range(case.heads):
            for r in range(case.rows):
                yield b, n, r, orders[b, n, r * case.block : (r + 1) * case.block]


def rows_of_dense(case, dense, order, how=np.any):
    """Rows [B, N, R, S] of booleans [B, N, T, S]."""
    dense = np.broadcast_to(dense, (case.batch, case.heads, case.queries, case.keys))
    rows = np.zeros((case.batch, case.heads, case.rows, case.keys), bool)
    for b, n, r, queries in row_queries(case, order):
        rows[b, n, r] = how(dense[b, n, queries], axis=0)
    return rows


def dense_of_rows(case, rows, order):
    """Booleans [B, N, T, S] in the natural query order, of rows [B, N, R, S]."""
    dense = np.zeros((case.batch, case.heads, case.queries, case.keys), bool)
    for b, n, r, queries in row_queries(case, order):
        dense[b, n, queries] = rows[b, n, r]
    return dense


def words_of_rows(rows):
    """Words uint32[..., W] of booleans [..., S]: little bit first, rows filled up to 128 keys."""
    num_keys = rows.shape[-1]
    padded = np.zeros((*rows.shape[:-1], -(-num_keys // 128) * 128), bool)
    padded[..., :num_keys] = rows
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4").astype(np.uint32)
