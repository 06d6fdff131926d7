"""Calls of the emulated kernel in plain NumPy, what must come out of them, and random ones."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from cuda_emulation.emulator import Emulator, Forward

from fgattn_jax.evaluation.cases import AttentionCase, make_inputs
from fgattn_jax.evaluation.oracle import attention_oracle

ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # of one number, relative


@dataclasses.dataclass
class Call:
    """Arguments of one call.

    Args:
        query: `[B, T, N, H]`, bfloat16 or float16.
        key: `[B, S, K, H]`.
        value: `[B, S, K, H]`.
        rows: Boolean `[B|1, N|1, R, S]`, True keeps.
        query_block: 64 or 128.
        order: int32 `[B|1, N|1, T]` or None.
        scale: Factor of the scores.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    rows: np.ndarray
    query_block: int
    order: np.ndarray | None = None
    scale: float = 0.125

    @property
    def num_keys(self) -> int:
        return self.key.shape[1]

    @property
    def bits(self) -> np.ndarray:
        """uint32 `[B|1, N|1, R, W]` as docs/mask_format.md has it."""
        missing = -self.num_keys % 128
        padded = np.pad(self.rows, [(0, 0)] * 3 + [(0, missing)])
        return np.ascontiguousarray(np.packbits(padded, axis=-1, bitorder="little")).view(np.uint32)

    @property
    def work_order(self) -> np.ndarray:
        """int32 `[B|1, N|1, R, 2]`: (row, kept keys), most keys first, ties by lower row."""
        counts = self.rows.sum(-1)
        row = np.argsort(-counts, axis=-1, kind="stable")
        return np.stack([row, np.take_along_axis(counts, row, -1)], -1).astype(np.int32)

    @property
    def kept_lines(self) -> np.ndarray:
        """Boolean `[B, S, K]`: keys that at least one row of one of their query heads keeps."""
        batch, _, num_heads, _ = self.query.shape
        kept = np.broadcast_to(self.rows.any(2), (batch, num_heads, self.num_keys))
        grouped = kept.reshape(batch, self.key.shape[2], -1, self.num_keys).any(2)
        return np.ascontiguousarray(grouped.transpose(0, 2, 1))


def from_case(case: AttentionCase) -> Call:
    """A case of the shared table (or like it) as a call."""
    inputs = make_inputs(case)
    query, key, value = (np.asarray(x) for x in (inputs.query, inputs.key, inputs.value))
    return Call(query, key, value, inputs.rows, case.query_block, inputs.order, case.scale)


def random_arrays(
    rng: np.random.Generator, *, num_queries: int, num_keys: int, head_dim: int = 64, dtype: str = "bfloat16",
    batch: int = 1, num_heads: int = 1, num_kv_heads: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Normally distributed query, key and value."""

    def normal(length: int, heads: int) -> np.ndarray:
        return rng.standard_normal((batch, length, heads, head_dim), dtype=np.float32).astype(jnp.dtype(dtype))

    return normal(num_queries, num_heads), normal(num_keys, num_kv_heads), normal(num_keys, num_kv_heads)


def make_call(rows: np.ndarray, query_block: int, *, seed: int = 0, missing: int = 0, **sizes: Any) -> Call:
    """One head with `rows` `[R, S]`; the last row lacks `missing` queries."""
    rng = np.random.default_rng(seed)
    num_rows, num_keys = rows.shape
    arrays = random_arrays(rng, num_queries=num_rows * query_block - missing, num_keys=num_keys, **sizes)
    return Call(*arrays, rows[None, None], query_block, scale=arrays[0].shape[-1] ** -0.5)


def random_rows(num_rows: int, num_keys: int, density: float, *, overlap: float = 0.0, seed: int = 0) -> np.ndarray:
    """Boolean `[R, S]`; of its neighbour's keys, an odd row has the share `overlap`, besides some of its own."""
    rng = np.random.default_rng(seed)
    rows = rng.random((num_rows, num_keys)) < density
    same = rng.random((num_rows, num_keys)) < overlap
    rows[1::2] = np.where(same[1::2], rows[: num_rows - 1 : 2], rows[1::2])
    return rows


def run(emulator: Emulator, call: Call, *, strict: bool = True, **changes: Any) -> Forward:
    """Runs a call. `strict`: keys that no row keeps must not be read. `changes`: other arguments, or options."""
    facts = {"bits": call.bits, "query_order": call.order, "work_order": call.work_order, "scale": call.scale}
    facts |= {"query_block": call.query_block, "readable": call.kept_lines if strict else None}
    return emulator.forward(call.query, call.key, call.value, **(facts | changes))


def assert_right(call: Call, result: Forward, *, loose: float = 1e-4) -> None:
    """Compares with the float64 oracle.

    A weight and an output are rounded to the inputs' dtype once each: together the bound is the rounding of a number
    times what the same weights give for absolute values, and again times the output. `loose` is what float32 sums,
    scores and powers may add, in units of the largest value.
    """
    facts: dict[str, Any] = {"query_block": call.query_block, "scale": call.scale, "order": call.order}
    with np.errstate(invalid="ignore"):
        expected, expected_lse = attention_oracle(call.query, call.key, call.value, call.rows, **facts)
        magnitude, _ = attention_oracle(call.query, call.key, np.abs(call.value), call.rows, **facts)
    rounding = ROUNDING[str(call.query.dtype)]
    output = result.output.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(output), np.isnan(expected))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(output[~finite & ~np.isnan(expected)], expected[~finite & ~np.isnan(expected)])
    with np.errstate(invalid="ignore"):
        excess = np.abs(output - expected) - rounding * (1.02 * magnitude + np.abs(expected))
    largest = np.abs(np.asarray(call.value, np.float64)[np.isfinite(call.value.astype(np.float32))]).max(initial=1.0)
    assert excess[finite].max(initial=0.0) <= loose * largest
    assert (output[np.isneginf(expected_lse).transpose(0, 2, 1)] == 0).all()
    np.testing.assert_array_equal(np.isneginf(result.lse), np.isneginf(expected_lse))
    sure = np.isfinite(expected_lse)
    np.testing.assert_allclose(result.lse[sure], expected_lse[sure], atol=3e-5 + loose / 4, rtol=1e-5)


def _random_row(rng: np.random.Generator, num_keys: int) -> np.ndarray:
    kind = rng.integers(7)
    row = np.zeros(num_keys, bool)
    if kind == 0:  # empty, full, or almost
        row[:] = rng.random() < 0.5
        row[rng.integers(num_keys)] ^= rng.random() < 0.5
    elif kind == 1:  # around a multiple of a tile
        count = rng.integers(1, 9) * 64 + rng.integers(-1, 2)
        row[rng.permutation(num_keys)[:count]] = True
    elif kind == 2:  # a stretch
        first, last = np.sort(rng.integers(0, num_keys + 1, 2))
        row[first:last] = True
    elif kind == 3:  # few keys
        row[rng.permutation(num_keys)[: rng.integers(1, 5)]] = True
    elif kind == 4:  # words
        row[:] = np.repeat(rng.random(-(-num_keys // 32)) < rng.random(), 32)[:num_keys]
    else:
        row[:] = rng.random(num_keys) < rng.random() ** 2
    return row


def random_call(rng: np.random.Generator, *, most_keys: int = 700) -> Call:
    """Any shape, mask, order and magnitude of the scores that the kernel takes, in sizes of a second or so."""
    query_block = int(rng.choice([64, 128]))
    batch, num_kv_heads, group = (int(n) for n in rng.choice([1, 1, 1, 2], 3))
    num_heads = num_kv_heads * group
    num_rows = int(rng.integers(1, 8 // (batch * num_heads) + 2))
    num_queries = num_rows * query_block - int(rng.choice([0, 1, 63, rng.integers(query_block)]))
    num_keys = int(rng.choice([1, 32, 128, *rng.integers(1, most_keys, 5), most_keys]))
    head_dim, dtype = int(rng.choice([64, 64, 64, 128])), str(rng.choice(["bfloat16", "float16"]))
    query, key, value = random_arrays(
        rng, num_queries=num_queries, num_keys=num_keys, head_dim=head_dim, dtype=dtype, batch=batch,
        num_heads=num_heads, num_kv_heads=num_kv_heads,
    )  # fmt: skip
    heads = [(size, 1)[int(rng.integers(2))] for size in (batch, num_heads)]
    rows = np.empty((*heads, num_rows, num_keys), bool)
    for index in np.ndindex(*rows.shape[:3]):
        rows[index] = _random_row(rng, num_keys)
        # Neighbours that share keys, so that pairs of them run as one.
        if index[2] % 2 and rng.random() < 0.6:
            rows[index] = rows[(*index[:2], index[2] - 1)] ^ (rng.random(num_keys) < rng.choice([0, 0.02, 0.2]))
    order = None
    if rng.random() < 0.4:
        heads = [(size, 1)[int(rng.integers(2))] for size in (batch, num_heads)]
        order = np.stack([[rng.permutation(num_queries) for _ in range(heads[1])] for _ in range(heads[0])])
        order = order.astype(np.int32)
    scale = float(rng.choice([0.0, 0.02, 0.125, 0.125, 1.0, 3.0]))
    return Call(query, key, value, rows, query_block, order, scale)
