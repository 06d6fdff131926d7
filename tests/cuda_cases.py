"""The shared case table in the dtypes, head widths and row sizes that the CUDA kernel takes, and what is its alone."""

import dataclasses
import itertools

import numpy as np

from fgattn_jax.evaluation.cases import SMALL_CASES, AttentionCase

DTYPES, HEAD_DIMS, QUERY_BLOCKS = ("bfloat16", "float16"), (64, 128), (64, 128)


def for_cuda(
    case: AttentionCase, *, dtype: str | None = None, head_dim: int | None = None, query_block: int | None = None
) -> AttentionCase:
    """The case with as many rows and the same raggedness, in what the kernel takes; unchanged where it fits as it is.

    Where nothing is asked for: bfloat16 for float32, the next head width and row size that is not smaller.
    """
    dtype = dtype or (case.dtype if case.dtype in DTYPES else "bfloat16")
    head_dim = head_dim or (64 if case.head_dim <= 64 else 128)
    query_block = query_block or max(64, case.query_block)
    full_rows, rest = divmod(case.num_queries, case.query_block)
    num_queries = full_rows * query_block + (-(-rest * query_block // case.query_block) - 1 if rest > 1 else rest)
    return dataclasses.replace(
        case, dtype=dtype, head_dim=head_dim, query_block=query_block, num_queries=max(1, num_queries)
    )


def variants(case: AttentionCase) -> list[AttentionCase]:
    """The case in both dtypes, head widths and row sizes."""
    return [
        dataclasses.replace(for_cuda(case, dtype=d, head_dim=h, query_block=m), name=f"{case.name}, {d}, H={h}, M={m}")
        for d, h, m in itertools.product(DTYPES, HEAD_DIMS, QUERY_BLOCKS)
    ]


ALL_VARIANTS = [variant for case in SMALL_CASES for variant in variants(case)]

TILES = (64, 96, 128)
"""Keys per tile of the kernel's forms: counts at their multiples, and one more or less, are where tails go wrong."""


def edge_counts(num_keys: int) -> list[int]:
    """Counts of kept keys per row: none, one, all, and around multiples of every tile and of words and decode steps."""
    steps = sorted({*TILES, 32, 160, 176, 1024})
    near = {step * times + more for step in steps for times in (1, 2, 3, 4, 5) for more in (-1, 0, 1)}
    counts = {0, 1, 2, num_keys - 1, num_keys} | near
    return sorted(c for c in counts if 0 <= c <= num_keys)


def rows_with_counts(counts: list[int], num_keys: int, rng: np.random.Generator) -> np.ndarray:
    """Boolean `[R, S]`, row `r` with `counts[r]` keys in random places."""
    rows = np.zeros((len(counts), num_keys), bool)
    for row, count in zip(rows, counts, strict=True):
        row[rng.permutation(num_keys)[:count]] = True
    return rows
