"""One table of attention cases, shared by the tests and the benchmarks, and seeded inputs for them."""

import dataclasses
import zlib
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fgattn_jax.masks import SliceMask, from_rows

MaskKind = Literal["random", "uneven", "runs", "edges", "full", "empty"]


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Shapes, dtype and mask of one call.

    Args:
        name: In words; part of test ids and result rows.
        why: What this case is there to catch or to show.
        batch: `B`.
        num_queries: `T`.
        num_keys: `S`.
        num_heads: `N`.
        num_kv_heads: `K`.
        head_dim: `H`.
        query_block: `M`.
        dtype: Dtype of query, key and value.
        mask: Kind of mask: "random" keeps each slice with probability `density`; "uneven" draws log-normal counts (CV
            0.5 in heads, 0.4 between); "runs" keeps runs of neighbouring keys; "edges" has empty, full and one-key
            rows and counts around multiples of 32; "full"; "empty".
        density: Kept share of all slices (ignored by "edges", "full", "empty").
        mask_batch: Batch axis of the mask, `B` or 1.
        mask_heads: Head axis of the mask, `N` or 1.
        ordered: Give the mask a random query order.
    """

    name: str
    why: str
    batch: int = 1
    num_queries: int = 96
    num_keys: int = 96
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 32
    query_block: int = 32
    dtype: str = "float32"
    mask: MaskKind = "random"
    density: float = 0.3
    mask_batch: int | None = None
    mask_heads: int | None = None
    ordered: bool = False

    @property
    def scale(self) -> float:
        """Default scale of this head width."""
        return self.head_dim**-0.5


SMALL_CASES: tuple[AttentionCase, ...] = (
    AttentionCase("plain", "the simplest call"),
    AttentionCase("odd lengths", "ragged last row, keys no multiple of 32", num_queries=83, num_keys=131,
                  query_block=16),
    AttentionCase("more keys than queries", "cross-attention", num_queries=40, num_keys=300),
    AttentionCase("one query", "shortest query sequence", num_queries=1, num_keys=70),
    AttentionCase("one key", "shortest key sequence", num_keys=1, density=0.6),
    AttentionCase("edge rows", "empty, full, one-key rows, counts around tile sizes", num_queries=300, num_keys=333,
                  query_block=16, mask="edges"),
    AttentionCase("edge rows of 128", "the same at the kernels' row size", num_queries=700, num_keys=550,
                  query_block=128, mask="edges", num_heads=1, num_kv_heads=1),
    AttentionCase("full", "must equal dense attention", mask="full"),
    AttentionCase("empty", "nothing is kept at all", mask="empty"),
    AttentionCase("grouped heads", "several query heads share key/value heads", batch=2, num_heads=6, num_kv_heads=2),
    AttentionCase("shared mask", "mask axes of size 1", batch=2, num_heads=4, num_kv_heads=4, mask_batch=1,
                  mask_heads=1),
    AttentionCase("query order", "rows gathered through an order", batch=2, num_queries=83, query_block=16,
                  ordered=True),
    AttentionCase("shared query order", "order and mask of size 1, grouped heads, ragged", batch=2, num_queries=70,
                  num_heads=4, num_kv_heads=2, mask_batch=1, mask_heads=1, ordered=True),
    AttentionCase("uneven rows", "rows of very different counts in one step", num_queries=256, num_keys=400,
                  query_block=16, mask="uneven"),
    AttentionCase("runs, M=64", "masks as models have them", num_queries=200, num_keys=260, query_block=64,
                  mask="runs"),
    AttentionCase("narrow heads", "head width 16", head_dim=16, density=0.1),
    AttentionCase("wide heads", "head width 256", head_dim=256),
    AttentionCase("head width 80", "no power of two", head_dim=80),
    AttentionCase("bfloat16", "16-bit inputs, float32 sums", dtype="bfloat16", num_queries=130, num_keys=200,
                  head_dim=64, query_block=64),
    AttentionCase("float16", "16-bit inputs with a small range", dtype="float16", num_queries=130, num_keys=200,
                  head_dim=64, query_block=128, ordered=True),
)  # fmt: skip
"""Every feature once, in sizes that the float64 oracle does in milliseconds."""


def _large(name: str, why: str, density: float, **changes: Any) -> AttentionCase:
    facts: dict[str, Any] = {"num_queries": 4096, "num_keys": 4096, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
    facts |= {"query_block": 64} | changes
    return AttentionCase(f"{name}, density {density:g}", why, density=density, **facts)


_DENSITIES = (0.05, 0.1, 0.2, 0.35, 0.5, 1.0)

CPU_BENCHMARK_CASES: tuple[AttentionCase, ...] = (
    *(_large("4096 tokens", "speed against density", density) for density in _DENSITIES),
    *(_large("4096 tokens, M=128", "wider slices", density, query_block=128) for density in (0.05, 0.2)),
    _large("4096 tokens, uneven rows", "load imbalance", 0.2, mask="uneven"),
    _large("4096 tokens, query order", "rows gathered through an order", 0.2, ordered=True),
)
"""What `fgattn bench` measures on a CPU."""

_WAN: dict[str, Any] = {"num_heads": 12, "num_kv_heads": 12, "head_dim": 128, "query_block": 128, "dtype": "bfloat16"}
_WAN |= {"num_queries": 32760, "num_keys": 32760}

GPU_BENCHMARK_CASES: tuple[AttentionCase, ...] = (
    *(_large("Wan 480p", "speed against density", density, **_WAN) for density in (0.1, 0.3, 0.5)),
    _large("Wan 480p, M=64", "narrower slices", 0.3, **(_WAN | {"query_block": 64})),
    _large("DiT 8192", "the shipped model's long clips", 0.3, dtype="bfloat16", num_heads=4, num_kv_heads=4,
           num_queries=8192, num_keys=8192),
)  # fmt: skip
"""What `fgattn bench` measures on a GPU."""


class CaseInputs(NamedTuple):
    """Inputs of a case: arrays, the mask, and the same mask as plain NumPy for the oracle."""

    query: Array
    key: Array
    value: Array
    mask: SliceMask
    rows: np.ndarray
    order: np.ndarray | None


def _edge_rows(rng: np.random.Generator, shape: tuple[int, ...], num_keys: int) -> np.ndarray:
    counts = [0, num_keys, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 288, 289, num_keys - 1]
    rows = np.zeros((int(np.prod(shape)), num_keys), bool)
    for i, row in enumerate(rows):
        row[rng.permutation(num_keys)[: min(max(counts[i % len(counts)], 0), num_keys)]] = True
    return rows.reshape(*shape, num_keys)


def _run_rows(rng: np.random.Generator, shape: tuple[int, ...], num_keys: int, density: float) -> np.ndarray:
    starts = rng.random((*shape, num_keys)) < density / 8
    rows = np.zeros_like(starts)
    for shift in range(min(9, num_keys)):
        rows[..., shift:] |= starts[..., : num_keys - shift]
    return rows


def make_rows(case: AttentionCase, rng: np.random.Generator) -> np.ndarray:
    """Boolean `[B|1, N|1, R, S]` of a case."""
    num_rows = -(-case.num_queries // case.query_block)
    shape = (case.mask_batch or case.batch, case.mask_heads or case.num_heads, num_rows)
    if case.mask in ("full", "empty"):
        return np.full((*shape, case.num_keys), case.mask == "full")
    if case.mask == "edges":
        return _edge_rows(rng, shape, case.num_keys)
    if case.mask == "runs":
        return _run_rows(rng, shape, case.num_keys, case.density)
    density = np.full(shape, case.density)
    if case.mask == "uneven":
        sigma_head, sigma_row = np.sqrt(np.log1p([0.4**2, 0.5**2]))
        density = density * rng.lognormal(-(sigma_head**2) / 2, sigma_head, shape[:2])[..., None]
        density = np.minimum(density * rng.lognormal(-(sigma_row**2) / 2, sigma_row, shape), 1.0)
    return rng.random((*shape, case.num_keys), dtype=np.float32) < density[..., None]


def make_inputs(case: AttentionCase, seed: int = 0) -> CaseInputs:
    """Normally distributed arrays and the mask of a case; the same for the same name and seed."""
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode())])

    def normal(length: int, heads: int) -> Array:
        shape = (case.batch, length, heads, case.head_dim)
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32)).astype(case.dtype)

    query = normal(case.num_queries, case.num_heads)
    key, value = normal(case.num_keys, case.num_kv_heads), normal(case.num_keys, case.num_kv_heads)
    rows = make_rows(case, rng)
    order = None
    if case.ordered:
        heads = (case.mask_batch or case.batch, case.mask_heads or case.num_heads)
        order = np.stack([[rng.permutation(case.num_queries) for _ in range(heads[1])] for _ in range(heads[0])])
        order = order.astype(np.int32)
    mask = from_rows(
        jnp.asarray(rows),
        query_block=case.query_block,
        num_queries=case.num_queries,
        query_order=None if order is None else jnp.asarray(order),
    )
    return CaseInputs(query, key, value, mask, rows, order)
