"""Random shapes, masks, orders and scales, always the same thousand: on a GPU the kernel, on a CPU the generator."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_cases import edge_counts, rows_with_counts

from fgattn_jax.attention import attention_with_lse
from fgattn_jax.masks import SliceMask, from_rows

NUM_CASES = 1000
SEED = 20250918

# The largest |output - oracle| for normal values: two roundings of the weights and the output to 16 bits.
CEILING = {"bfloat16": 3e-2, "float16": 4e-3}
LSE_CEILING = 1e-3


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_block: int
    dtype: str
    scale: float


class Call(NamedTuple):
    shape: Shape
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    rows: np.ndarray
    order: np.ndarray | None
    with_work_order: bool


def random_shape(rng: np.random.Generator) -> Shape:
    query_block = int(rng.choice([64, 128]))
    num_kv_heads = int(rng.integers(1, 4))
    # Half of the lengths lie at borders of rows, words and tiles.
    lengths = [
        max(1, int(rng.choice([32, 64, 96, 128, 160, 256, 384, 512, 1024])) + int(rng.integers(-1, 2)))
        if rng.random() < 0.5
        else int(np.exp(rng.uniform(0, np.log(limit))))
        for limit in (700, 1500)
    ]
    return Shape(
        batch=int(rng.integers(1, 3)),
        num_queries=min(lengths[0], 700),
        num_keys=lengths[1],
        num_heads=num_kv_heads * int(rng.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=int(rng.choice([64, 128])),
        query_block=query_block,
        dtype=str(rng.choice(["bfloat16", "float16"])),
        scale=float(rng.choice([0.125, 0.02, 0.0, -0.125, 0.3])),
    )


def random_rows(rng: np.random.Generator, shape: tuple[int, int, int], num_keys: int) -> np.ndarray:
    kind = rng.integers(5)
    if kind == 0:  # one density for all
        return rng.random((*shape, num_keys)) < rng.choice([0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
    if kind == 1:  # counts around tile borders, with empty and full rows
        counts = rng.choice(edge_counts(num_keys), int(np.prod(shape)))
        return rows_with_counts(counts.tolist(), num_keys, rng).reshape(*shape, num_keys)
    if kind == 2:  # every row its own density
        return rng.random((*shape, num_keys)) < rng.random(shape)[..., None] ** 2
    if kind == 3:  # runs
        starts = rng.random((*shape, num_keys)) < 0.04
        rows = np.zeros_like(starts)
        for shift in range(min(9, num_keys)):
            rows[..., shift:] |= starts[..., : num_keys - shift]
        return rows
    first, last = np.sort(rng.integers(0, num_keys + 1, (2, *shape)), axis=0)  # one window, often empty
    places = np.arange(num_keys)
    return (places >= first[..., None]) & (places < last[..., None])


def random_call(number: int) -> Call:
    """Call `number` of the fixed list; the same on every machine."""
    rng = np.random.default_rng([SEED, number])
    s = random_shape(rng)
    num_rows = -(-s.num_queries // s.query_block)
    front = [int(rng.choice([1, s.batch])), int(rng.choice([1, s.num_heads]))]
    rows = random_rows(rng, (*front, num_rows), s.num_keys)
    order = None
    if rng.random() < 0.5:
        heads = [int(rng.choice([1, s.batch])), int(rng.choice([1, s.num_heads]))]
        order = rng.permuted(
            np.broadcast_to(np.arange(s.num_queries, dtype=np.int32), (*heads, s.num_queries)), axis=-1
        )

    def normal(length: int, heads: int) -> np.ndarray:
        numbers = rng.standard_normal((s.batch, length, heads, s.head_dim), dtype=np.float32)
        return np.asarray(jnp.asarray(numbers).astype(s.dtype))

    query = normal(s.num_queries, s.num_heads)
    key, value = normal(s.num_keys, s.num_kv_heads), normal(s.num_keys, s.num_kv_heads)
    return Call(s, query, key, value, rows, order, bool(rng.random() < 0.5))


def mask_of(call: Call) -> SliceMask:
    s = call.shape
    mask = from_rows(
        jnp.asarray(call.rows), query_block=s.query_block, num_queries=s.num_queries, query_order=call.order
    )
    return mask.with_work_order() if call.with_work_order else mask


def oracle(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Float64 over whole score matrices: for a thousand cases, one query at a time would take too long."""
    s = call.shape
    output, lse = np.zeros(call.query.shape), np.full((s.batch, s.num_heads, s.num_queries), -np.inf)
    rows = np.broadcast_to(call.rows, (s.batch, s.num_heads, *call.rows.shape[2:]))
    query, key, value = (np.asarray(x, np.float64) for x in (call.query, call.key, call.value))
    order = np.arange(s.num_queries) if call.order is None else call.order
    order = np.broadcast_to(order, (s.batch, s.num_heads, s.num_queries))
    for b, n in np.ndindex(s.batch, s.num_heads):
        row = np.empty(s.num_queries, int)
        row[order[b, n]] = np.arange(s.num_queries) // s.query_block
        kept = rows[b, n][row]
        kv = n // (s.num_heads // s.num_kv_heads)
        scores = np.where(kept, query[b, :, n] @ key[b, :, kv].T * s.scale, -np.inf)
        some = kept.any(-1)
        largest = scores[some].max(-1, keepdims=True)
        weights = np.exp(scores[some] - largest)
        total = weights.sum(-1, keepdims=True)
        output[b, some, n] = weights @ value[b, :, kv] / total
        lse[b, n, some] = (largest + np.log(total))[:, 0]
    return output, lse


_run = jax.jit(attention_with_lse, static_argnames=("scale", "implementation"))


def check(number: int, implementation: str) -> None:
    call = random_call(number)
    # On the CPU, whatever the test is about: every shape makes a GPU compile the many small steps of a mask.
    with jax.default_device(jax.devices("cpu")[0]):
        mask = mask_of(call)
    output, lse = _run(call.query, call.key, call.value, mask, scale=call.shape.scale, implementation=implementation)
    expected, expected_lse = oracle(call)
    where = f"case {number}: {call.shape}"
    assert np.abs(np.asarray(output, np.float64) - expected).max() < CEILING[call.shape.dtype], where
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse), err_msg=where)
    finite = np.isfinite(expected_lse)
    assert np.abs(np.asarray(lse, np.float64)[finite] - expected_lse[finite]).max(initial=0) < LSE_CEILING, where


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(NUM_CASES))
@pytest.mark.parametrize("kernel", ["cuda", "pallas"])
def test_random_calls_match_the_oracle(kernel, number):
    check(number, kernel)
    if number % 50 == 49:
        jax.clear_caches()  # every case is a program of its own


@pytest.mark.parametrize("number", [*range(2), *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 20))])
def test_the_first_calls_match_the_oracle_with_xla(number):
    check(number, "xla")


@pytest.mark.parametrize("number", [*range(10), *(pytest.param(n, marks=pytest.mark.slow) for n in range(10, 40))])
def test_the_first_calls_match_the_oracle_through_the_handlers(host_kernel, number):
    check(number, "cuda")


def test_the_list_is_fixed_and_covers_what_it_should():
    first, again = random_call(7), random_call(7)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    shapes = [random_shape(np.random.default_rng([SEED, number])) for number in range(NUM_CASES)]
    for name, wanted in (
        ("head_dim", {64, 128}), ("query_block", {64, 128}), ("dtype", {"bfloat16", "float16"}), ("batch", {1, 2}),
        ("num_heads", {1, 2, 3, 4, 6}), ("scale", {0.125, 0.02, 0.0, -0.125, 0.3}),
    ):  # fmt: skip
        seen = [getattr(shape, name) for shape in shapes]
        assert set(seen) == wanted
        assert min(seen.count(value) for value in wanted) >= NUM_CASES // 15
    assert sum(shape.num_keys % 32 != 0 for shape in shapes) > NUM_CASES // 3
    assert sum(shape.num_queries % shape.query_block != 0 for shape in shapes) > NUM_CASES // 3
    assert len({(shape.num_queries, shape.num_keys) for shape in shapes}) > NUM_CASES // 2
