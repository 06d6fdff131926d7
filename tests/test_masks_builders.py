"""Masks from rows, dense masks, indices and blocks; full and empty ones."""

import chex
import jax
import masks_oracle as oracle
import numpy as np
import pytest

from fgattn_jax import masks

CASES = pytest.mark.parametrize("case", oracle.CASES.values(), ids=oracle.CASES.keys())
SMALL = oracle.CASES["odd lengths, smallest slices"]
SIZES_OF_BLOCKS = [(128, 128), (256, 64), (64, 40), (16, 1), (8, 7)]


@CASES
def test_rows_become_words(case):
    rows, order = oracle.random_rows(case), oracle.random_order(case)
    mask = masks.from_rows(rows, query_block=case.block, num_queries=case.queries, query_order=order).check()
    chex.assert_trees_all_equal(mask.bits, oracle.words_of_rows(rows))
    assert (mask.query_block, mask.num_queries, mask.num_keys) == (case.block, case.queries, case.keys)
    if case.order == "raster":
        assert mask.query_order is None
    else:
        lines = np.asarray(mask.query_order)
        np.testing.assert_array_equal(
            np.broadcast_to(lines, (case.batch, case.heads, case.queries)), oracle.full_order(case, order)
        )


def test_rows_of_rank_2_are_shared_by_batch_and_heads():
    rows = oracle.random_rows(SMALL)[0, 0]
    mask = masks.from_rows(rows, query_block=16, num_queries=71)
    assert mask.bits.shape == (1, 1, 5, 8)
    chex.assert_trees_all_equal(mask.to_rows()[0, 0], rows)


@CASES
@pytest.mark.parametrize(("mixed", "how"), [("keep", np.any), ("skip", np.all)])
def test_dense_masks_are_grouped_by_query_order(case, mixed, how):
    dense, order = oracle.random_dense(case, density=0.7), oracle.random_order(case)
    build = jax.jit(
        lambda dense, order: masks.from_dense(dense, query_block=case.block, query_order=order, mixed=mixed)
    )
    mask = build(dense, order).check()
    chex.assert_trees_all_equal(mask.bits, oracle.words_of_rows(oracle.rows_of_dense(case, dense, order, how)))


def test_a_dense_mask_of_equal_queries_per_row_is_kept_exactly():
    rows, order = oracle.random_rows(SMALL), oracle.random_order(SMALL)
    dense = oracle.dense_of_rows(SMALL, rows, order)
    mask = masks.from_dense(dense, query_block=16, query_order=order, mixed="error")
    chex.assert_trees_all_equal(mask.to_dense(), dense)
    dense[1, 0, 17, 40] ^= True
    row = int(np.flatnonzero(order[1, 0] == 17)[0]) // 16
    with pytest.raises(ValueError, match=rf"key=40 kept by only some queries of row={row} \(batch and head \[1, 0\]\)"):
        masks.from_dense(dense, query_block=16, query_order=order, mixed="error")


def test_vmap_builds_one_mask_per_entry():
    dense = np.stack([oracle.random_dense(SMALL, seed) for seed in range(3)])
    stack = jax.vmap(lambda dense: masks.from_dense(dense, query_block=16))(dense)
    assert stack.bits.shape == (3, 2, 2, 5, 8)
    chex.assert_trees_all_equal(stack.bits, masks.from_dense(dense, query_block=16).bits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dense": np.ones((20, 9), np.int32)}, "`dense` to be an array of booleans .*got dtype=int32"),
        ({"dense": [[True]]}, "`dense` to be an array of booleans .*got list"),
        ({"dense": np.ones((3, 20, 9), bool)}, r"\[B\|1, N\|1, T, S\], got shape=\(3, 20, 9\)"),
        ({"query_block": 12}, "got query_block=12"),
        ({"query_order": np.arange(19)}, r"with T=20, got shape=\(19,\)"),
        ({"query_order": np.arange(20.0)}, "`query_order` to hold integers, got dtype=float64"),
        ({"query_order": np.arange(20) + 2**31}, r"numbers below 2\*\*31, got query_order=2147483648"),
        ({"query_order": np.zeros((3, 2, 20), np.int32)}, r"got shape=\(3, 2, 20\)"),
        ({"mixed": "drop"}, "got mixed='drop'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_dense_masks_that_do_not_fit_are_refused(arguments, message):
    good = {"dense": np.ones((2, 2, 20, 9), bool), "query_block": 16}
    with pytest.raises(ValueError, match=message):
        masks.from_dense(**(good | arguments))


def test_exactness_cannot_be_asked_for_under_jit():
    with pytest.raises(ValueError, match='mixed="error" reads values: call it outside `jit`'):
        jax.jit(lambda dense: masks.from_dense(dense, query_block=16, mixed="error"))(np.ones((20, 9), bool))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": np.ones((2, 9), np.float32)}, "`rows` to be an array of booleans .*got dtype=float32"),
        ({"rows": np.ones((2, 2, 9), bool)}, r"\[B\|1, N\|1, R, S\], got shape=\(2, 2, 9\)"),
        ({"rows": np.ones((3, 9), bool)}, "R=2 rows for num_queries=20 and query_block=16, got R=3"),
        ({"rows": np.ones((2, 0), bool)}, "got num_keys=0"),
        ({"num_queries": 33}, "R=3 rows for num_queries=33"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rows_that_do_not_fit_are_refused(arguments, message):
    good = {"rows": np.ones((2, 9), bool), "query_block": 16, "num_queries": 20}
    with pytest.raises(ValueError, match=message):
        masks.from_rows(**(good | arguments))


# Indices.


def shuffled_indices(rows, capacity, seed=0):
    """Kept keys of every row, shuffled, each row's first key twice, filled up with nonsense."""
    generator = np.random.default_rng(seed)
    indices = np.full((*rows.shape[:-1], capacity), -7, np.int32)
    counts = np.zeros(rows.shape[:-1], np.int32)
    for place in np.ndindex(rows.shape[:-1]):
        kept = generator.permutation(np.flatnonzero(rows[place]))
        kept = np.concatenate([kept, kept[:1]])
        indices[place][: kept.size] = kept
        counts[place] = kept.size
    return indices, counts


@CASES
def test_indices_in_any_order_and_twice_become_the_mask(case):
    rows, order = oracle.random_rows(case), oracle.random_order(case)
    indices, counts = shuffled_indices(rows, case.keys + 3)
    mask = masks.from_indices(indices, counts, **case.sizes, query_order=order).check()
    chex.assert_trees_all_equal(mask.bits, oracle.words_of_rows(rows))


def test_indices_come_back_from_a_mask():
    mask = masks.from_rows(oracle.random_rows(SMALL), query_block=16, num_queries=71)
    chex.assert_trees_all_equal(masks.from_indices(*mask.to_indices(), **SMALL.sizes), mask)
    again = jax.jit(lambda mask: masks.from_indices(*mask.to_indices(133), **SMALL.sizes))(mask)
    chex.assert_trees_all_equal(again, mask)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint32])
def test_indices_of_any_integer_dtype_without_counts(dtype):
    mask = masks.from_indices(np.array([[3, 1, 3], [0, 100, 2]], dtype), query_block=16, num_queries=20, num_keys=300)
    assert np.flatnonzero(mask.to_rows()[0, 0, 0]).tolist() == [1, 3]
    assert np.flatnonzero(mask.to_rows()[0, 0, 1]).tolist() == [0, 2, 100]


def test_indices_out_of_range_are_dropped_under_jit():
    build = jax.jit(lambda i, c: masks.from_indices(i, c, query_block=16, num_queries=20, num_keys=9))
    mask = build(np.array([[-1, 9, 4], [10**9, 0, 1]]), np.array([3, 99])).check()
    assert np.flatnonzero(mask.to_rows()[0, 0, 0]).tolist() == [4]
    assert np.flatnonzero(mask.to_rows()[0, 0, 1]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": np.array([[0, 1], [2, 9]])}, r"from 0 to num_keys-1=8, got key=9 at \[0, 0, 1, 1\]"),
        ({"indices": np.array([[0, -1], [2, 3]])}, r"from 0 to num_keys-1=8, got key=-1 at \[0, 0, 0, 1\]"),
        ({"indices": np.array([[0, 2**32], [2, 3]])}, "below 2\\*\\*31, got indices=4294967296"),
        ({"indices": np.zeros((2, 2))}, "`indices` to hold integers, got dtype=float64"),
        ({"indices": np.zeros((3, 2), int)}, r"R=2 for num_queries=20 and query_block=16, got shape=\(1, 1, 3, 2\)"),
        ({"indices": np.zeros((1, 2, 2), int)}, r"\[R, C\] or \[B\|1, N\|1, R, C\].*got shape=\(1, 2, 2\)"),
        ({"counts": np.array([3, 0])}, r"`counts` from 0 to C=2, got count=3 at \[0, 0, 0\]"),
        ({"counts": np.array([0, -1])}, r"`counts` from 0 to C=2, got count=-1 at \[0, 0, 1\]"),
        ({"counts": np.array([1, 1, 1])}, r"`counts` of shape=\(1, 1, 2\).*got shape=\(1, 1, 3\)"),
        ({"counts": np.array([1.0, 1.0])}, "`counts` to hold integers, got dtype=float64"),
    ],
    ids=[
        "past the end", "negative", "64 bits", "float", "rows", "rank", "count large", "count negative", "counts shape",
        "counts dtype",
    ],
)  # fmt: skip
def test_indices_that_do_not_fit_are_refused(arguments, message):
    good = {"indices": np.array([[0, 1], [2, 3]]), "counts": np.array([2, 2])}
    with pytest.raises(ValueError, match=message):
        masks.from_indices(**(good | arguments), query_block=16, num_queries=20, num_keys=9)


# Blocks.


BLOCK_CASES = [
    *((query_block, sizes, (301, 135)) for query_block in (16, 32, 64, 128) for sizes in SIZES_OF_BLOCKS),
    (64, (128, 128), (256, 256)),
    (32, (8, 7), (5, 3)),
    (128, (256, 64), (5, 3)),
]


@pytest.mark.parametrize(("query_block", "block_sizes", "lengths"), BLOCK_CASES)
def test_block_masks_come_in_as_they_are_or_as_a_superset(query_block, block_sizes, lengths):
    (num_queries, num_keys), (block_queries, block_keys) = lengths, block_sizes
    shape = (2, 1, -(-num_queries // block_queries), -(-num_keys // block_keys))
    blocks = np.random.default_rng(0).random(shape) < 0.3
    dense = blocks.repeat(block_queries, axis=2).repeat(block_keys, axis=3)[:, :, :num_queries, :num_keys]
    case = oracle.Case(2, 1, num_queries, num_keys, query_block, "raster")
    mask = masks.from_blocks(blocks, block_sizes=block_sizes, **case.sizes)
    chex.assert_trees_all_equal(mask.bits, oracle.words_of_rows(oracle.rows_of_dense(case, dense, None)))
    if block_queries % query_block == 0:
        chex.assert_trees_all_equal(mask.check().to_dense(), dense)


def test_blocks_of_queries_are_blocks_of_positions():
    order = np.random.default_rng(0).permutation(100)
    blocks = np.random.default_rng(1).random((4, 3)) < 0.5
    build = jax.jit(
        lambda blocks: masks.from_blocks(
            blocks, block_sizes=(32, 50), query_block=32, num_queries=100, num_keys=150, query_order=order
        )
    )
    dense = np.zeros((100, 150), bool)
    dense[order] = blocks.repeat(32, axis=0)[:100].repeat(50, axis=1)
    chex.assert_trees_all_equal(build(blocks).check().to_dense()[0, 0], dense)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": np.ones((2, 2), np.uint8)}, "`blocks` to be an array of booleans .*got dtype=uint8"),
        ({"blocks": np.ones((2, 3), bool)}, r"`blocks` to be \(2, 2\).*got shape=\(1, 1, 2, 3\)"),
        ({"blocks": np.ones((1, 2, 2), bool)}, r"\[B\|1, N\|1, U, V\], got shape=\(1, 2, 2\)"),
        ({"block_sizes": (48, 64)}, r"query_block=32, got block_sizes=\(48, 64\)"),
        ({"block_sizes": (0, 64)}, r"query_block=32, got block_sizes=\(0, 64\)"),
        ({"block_sizes": (64, 0)}, r"at least 1 key per block, got block_sizes=\(64, 0\)"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(arguments, message):
    good = {"blocks": np.ones((2, 2), bool), "block_sizes": (64, 64)}
    with pytest.raises(ValueError, match=message):
        masks.from_blocks(**(good | arguments), query_block=32, num_queries=100, num_keys=100)


# Full and empty.


@CASES
def test_full_and_empty_masks(case):
    order = oracle.random_order(case)
    full = masks.full(**case.sizes, batch=case.batch, num_heads=case.heads, query_order=order).check()
    empty = masks.empty(**case.sizes, batch=case.batch, num_heads=case.heads, query_order=order).check()
    assert full.bits.shape == empty.bits.shape == (case.batch, case.heads, case.rows, 4 * -(-case.keys // 128))
    assert np.asarray(full.to_rows()).all()
    assert not np.asarray(empty.bits).any()
    assert float(full.density()) == 1.0
    assert float(empty.density()) == 0.0


@pytest.mark.parametrize("build", [masks.full, masks.empty])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_block": 8}, "got query_block=8"),
        ({"num_queries": 0}, "got num_queries=0"),
        ({"num_keys": True}, "got num_keys=True"),
        ({"batch": 0}, "`batch` to be at least 1, got batch=0"),
        ({"num_heads": -2}, "`num_heads` to be at least 1, got num_heads=-2"),
        ({"batch": 2, "query_order": np.zeros((3, 1, 20), np.int32)}, r"got shape=\(3, 1, 20\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_full_and_empty_masks_refuse_wrong_sizes(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**({"query_block": 16, "num_queries": 20, "num_keys": 9} | arguments))
