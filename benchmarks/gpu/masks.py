"""Masks of the benchmark, as bits `uint32[N, R, W]`, made on the host: all contestants and the oracle read the same.

Every head has its own seed, so that heads can be made in threads and a mask does not depend on how many there are.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Int32, UInt32

WORD_BITS = 32
_ROW_ALIGN_WORDS = 4
_CV_ROWS, _CV_HEADS = 0.5, 0.4
_ROWS_AT_A_TIME = 64


def pack(rows: Bool[np.ndarray, "R S"]) -> UInt32[np.ndarray, "R W"]:
    """Booleans to words, little bit first, rows padded with zeros to a multiple of 16 bytes (docs/mask_format.md)."""
    num_rows, num_keys = rows.shape
    words = -(-num_keys // WORD_BITS)
    words = -(-words // _ROW_ALIGN_WORDS) * _ROW_ALIGN_WORDS
    packed = np.zeros((num_rows, words * 4), np.uint8)
    packed[:, : -(-num_keys // 8)] = np.packbits(rows, axis=1, bitorder="little")
    return packed.view("<u4").astype(np.uint32, copy=False)


def unpack(bits: UInt32[np.ndarray, "... W"], num_keys: int) -> Bool[np.ndarray, "... S"]:
    """Words to booleans over the first `num_keys` keys."""
    packed = np.ascontiguousarray(bits.astype("<u4", copy=False)).view(np.uint8)
    return np.unpackbits(packed, axis=-1, count=num_keys, bitorder="little").astype(bool)


def count_kept(bits: UInt32[np.ndarray, "N R W"]) -> Int32[np.ndarray, "N R"]:
    """Kept keys of every row."""
    return np.bitwise_count(bits).sum(axis=-1, dtype=np.int32)


def density(bits: UInt32[np.ndarray, "N R W"], num_queries: int, num_keys: int, query_block: int) -> float:
    """Kept share of all pairs of a query and a key; a last row with fewer queries counts for what it holds."""
    queries = np.full(bits.shape[1], query_block)
    queries[-1] = num_queries - (bits.shape[1] - 1) * query_block
    return float((count_kept(bits) * queries).sum() / (bits.shape[0] * num_queries * num_keys))


def _by_head(num_heads: int, seed: int, make: Callable[[np.random.Generator, int], np.ndarray]) -> np.ndarray:
    with ThreadPoolExecutor(min(num_heads, os.cpu_count() or 1)) as pool:
        return np.stack(list(pool.map(lambda head: make(np.random.default_rng([seed, head]), head), range(num_heads))))


def _draw(rng: np.random.Generator, chance: np.ndarray, num_keys: int) -> UInt32[np.ndarray, "R W"]:
    """Rows that keep each key with the row's chance, to 1 part in 65536; 1 keeps all."""
    parts = []
    for start in range(0, len(chance), _ROWS_AT_A_TIME):  # a head of 75600 x 75600 would take gigabytes otherwise
        limit = np.round(chance[start : start + _ROWS_AT_A_TIME] * 65536).astype(np.uint32)
        drawn = rng.integers(0, 65536, (len(limit), num_keys), dtype=np.uint16)
        parts.append(pack(drawn < limit[:, None]))
    return np.concatenate(parts)


def random_mask(num_heads: int, num_rows: int, num_keys: int, share: float, seed: int) -> np.ndarray:
    """Each slice kept with chance `share`, another draw for every head and row."""
    return _by_head(num_heads, seed, lambda rng, _: _draw(rng, np.full(num_rows, share), num_keys))


def uneven_mask(num_heads: int, num_rows: int, num_keys: int, share: float, seed: int) -> np.ndarray:
    """Log-normal counts with CV 0.5 over the rows of a head and 0.4 over heads, at mean density `share`.

    What the limit of one whole row cuts off, and what a draw of few heads lies off the mean, is scaled away, so that
    the mask has the slices of the even one.
    """
    sigma_row, sigma_head = np.sqrt(np.log1p([_CV_ROWS**2, _CV_HEADS**2]))
    rng = np.random.default_rng([seed, 1 << 20])
    heads = np.exp(sigma_head * _standard(rng.standard_normal((num_heads, 1))))
    chance = heads * np.exp(sigma_row * rng.standard_normal((num_heads, num_rows)))
    scale = share / chance.mean()
    for _ in range(20):
        scale *= share / np.minimum(scale * chance, 1.0).mean()
    chance = np.minimum(scale * chance, 1.0)
    return _by_head(num_heads, seed, lambda rng, head: _draw(rng, chance[head], num_keys))


def _standard(values: np.ndarray) -> np.ndarray:
    # The spread between a dozen heads would otherwise be whatever the seed gave.
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else values * 0


def overlap_mask(
    num_heads: int, num_rows: int, num_keys: int, share: float, overlap: float, seed: int
) -> UInt32[np.ndarray, "N R W"]:
    """Rows of density `share` of which each shares the part `overlap` of its keys with the row before.

    A chain over rows: a kept key stays with chance `overlap`, a skipped one enters with the chance that keeps the
    density. `overlap=share` makes neighbours independent.

    Raises:
        ValueError: No chain has this density and overlap.
    """
    enter = share * (1 - overlap) / (1 - share) if share < 1 else 0.0
    if not (0 < share < 1 and 0 <= overlap <= 1 and enter <= 1):
        raise ValueError(f"expected a density between 0 and 1 and a fitting overlap, got {share=} {overlap=}")

    def head_rows(rng: np.random.Generator, _: int) -> np.ndarray:
        rows = np.empty((num_rows, num_keys), bool)
        rows[0] = rng.random(num_keys, np.float32) < share
        for row in range(1, num_rows):
            rows[row] = rng.random(num_keys, np.float32) < np.where(rows[row - 1], overlap, enter)
        return pack(rows)

    return _by_head(num_heads, seed, head_rows)


def video_mask(
    grid: tuple[int, int, int],
    num_heads: int,
    query_block: int,
    share: float,
    seed: int,
    order: Int32[np.ndarray, " T"] | None = None,
) -> UInt32[np.ndarray, "N R W"]:
    """Masks as video transformers have them: windows around the row's tokens in time and space, with frayed edges.

    Every head has its own window, from flat (one frame) to long (one place in all frames), its own noise, and a few
    keys that every row keeps. Each row keeps its `share` nearest keys.

    Args:
        grid: Tokens per axis: (frames, height, width).
        num_heads: `N`.
        query_block: `M`.
        share: Kept share of the keys of every row.
        seed: Of shapes and noise.
        order: Which query stands where before grouping; None is raster.
    """
    tokens = int(np.prod(grid))
    places = np.stack(np.unravel_index(np.arange(tokens), grid), axis=1).astype(np.float32)
    queries = places if order is None else places[order]
    num_rows, kept = -(-tokens // query_block), max(1, round(share * tokens))

    def head_rows(rng: np.random.Generator, _: int) -> np.ndarray:
        stretch = np.exp(rng.normal(0, 0.8, 3)).astype(np.float32) / np.array(grid, np.float32)
        noise = np.float32(rng.uniform(0.02, 0.3))
        sinks = rng.random(tokens, np.float32) < 0.002
        parts = []
        for row in range(num_rows):
            block = queries[row * query_block : (row + 1) * query_block]
            low, high = block.min(axis=0), block.max(axis=0)
            outside = np.maximum(np.maximum(low - places, places - high), 0) * stretch
            score = np.sqrt((outside**2).sum(axis=1)) + noise * rng.random(tokens, np.float32)
            score[sinks] = -1
            parts.append(pack((score <= np.partition(score, kept - 1)[kept - 1])[None]))
        return np.concatenate(parts)

    return _by_head(num_heads, seed, head_rows)


def block_mask(
    num_heads: int, num_rows: int, num_blocks: int, share: float, seed: int
) -> Int32[np.ndarray, "N R kept"]:
    """Ascending numbers of the kept key blocks, equally many in every row: what kernels of whole blocks take."""
    kept = max(1, round(share * num_blocks))
    return _by_head(
        num_heads,
        seed,
        lambda rng, _: np.sort(np.argsort(rng.random((num_rows, num_blocks)), axis=1)[:, :kept], axis=1),
    ).astype(np.int32)


def neighbour_overlap(bits: UInt32[np.ndarray, "N R W"]) -> float:
    """Share of a row's keys that the row before keeps as well, over all neighbours."""
    both = np.bitwise_count(bits[:, 1:] & bits[:, :-1]).sum(dtype=np.int64)
    return float(both / max(1, np.bitwise_count(bits[:, 1:]).sum(dtype=np.int64)))
