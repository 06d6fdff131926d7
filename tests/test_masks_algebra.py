"""Union, intersection, difference, and regrouping."""

import chex
import jax
import jax.numpy as jnp
import masks_oracle as oracle
import numpy as np
import pytest

from fgattn_jax import masks

CASES = pytest.mark.parametrize("case", oracle.CASES.values(), ids=oracle.CASES.keys())
SMALL = oracle.CASES["odd lengths, smallest slices"]
OPERATIONS = pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (masks.union, np.logical_or),
        (masks.intersection, np.logical_and),
        (masks.difference, lambda a, b: a & ~b),
    ],
    ids=["union", "intersection", "difference"],
)


def make(case, seed, order):
    rows = oracle.random_rows(case, seed, density=0.5)
    return masks.from_rows(rows, query_block=case.block, num_queries=case.queries, query_order=order), rows


@CASES
@OPERATIONS
def test_operations_work_slice_by_slice_and_leave_the_padding_empty(case, operation, expected):
    order = oracle.random_order(case)
    (first, first_rows), (second, second_rows) = make(case, 0, order), make(case, 1, order)
    result = jax.jit(operation)(first, second).check()
    chex.assert_trees_all_equal(result.bits, oracle.words_of_rows(expected(first_rows, second_rows)))
    chex.assert_trees_all_equal(result.query_order, first.query_order)
    chex.assert_trees_all_equal(operation(first, second), result)


@CASES
def test_the_complement_is_the_difference_from_full(case):
    mask, rows = make(case, 0, None)
    complement = masks.difference(masks.full(**case.sizes), mask).check()
    chex.assert_trees_all_equal(complement.bits, oracle.words_of_rows(~rows))
    assert int(masks.intersection(mask, complement).counts().sum()) == 0


@OPERATIONS
def test_batch_and_heads_of_size_one_are_broadcast(operation, expected):
    rows = oracle.random_rows(oracle.Case(2, 3, 70, 40, 16, "raster"))
    sizes = {"query_block": 16, "num_queries": 70}
    per_head = masks.from_rows(rows[:1], **sizes)
    per_entry = masks.from_rows(rows[:, 1:2], **sizes)
    result = operation(per_head, per_entry).check()
    chex.assert_trees_all_equal(result.to_rows(), expected(rows[:1], rows[:, 1:2]))


def test_orders_that_broadcast_to_the_same_are_the_same():
    order = np.random.default_rng(0).permutation(71)
    shared, _ = make(SMALL, 0, order)
    own, _ = make(SMALL, 1, np.broadcast_to(order, (2, 2, 71)))
    for union in (masks.union(shared, own), masks.union(own, shared), jax.jit(masks.union)(shared, own)):
        chex.assert_trees_all_equal(union.query_order, own.query_order)


@OPERATIONS
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"query_block": 32}, "same `query_block`, got query_block=16 and 32.*`regroup`"),
        ({"num_queries": 70}, "same `num_queries`, got num_queries=71 and 70"),
        ({"num_keys": 134}, "same `num_keys`, got num_keys=133 and 134"),
        ({"batch": 3}, r"equal or 1, got `bits` of shape=\(2, 2, 5, 8\) and shape=\(3, 1, 5, 8\)"),
        ({"query_order": np.arange(71)[::-1]}, r"got query_order=None \(raster\) and an order of shape=\(1, 1, 71\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_masks_that_do_not_fit_are_refused(operation, expected, other, message):
    del expected
    mask, _ = make(SMALL, 0, None)
    with pytest.raises(ValueError, match=message):
        operation(mask, masks.full(**(SMALL.sizes | other)))


def test_stacked_and_single_masks_are_not_combined_by_chance():
    mask, _ = make(SMALL, 0, None)
    stack = jax.tree.map(lambda leaf: leaf[None], mask)
    with pytest.raises(ValueError, match=r"shape=\(1, 2, 2, 5, 8\) and shape=\(2, 2, 5, 8\)"):
        masks.union(stack, mask)


def test_different_orders_are_refused_where_their_values_are_known():
    order = np.random.default_rng(0).permutation(71)
    first, _ = make(SMALL, 0, order)
    second, _ = make(SMALL, 1, np.roll(order, 1))
    with pytest.raises(ValueError, match=r"same query order, .* one `query_order`"):
        masks.union(first, second)
    chex.assert_trees_all_equal(jax.jit(masks.union)(first, second).query_order, first.query_order)


# Regrouping.


@CASES
@pytest.mark.parametrize(("query_block", "to"), [(16, "own"), (128, "raster"), (64, "shared")])
def test_regrouped_rows_keep_what_any_of_their_queries_kept(case, query_block, to):
    order = oracle.random_order(case)
    mask, rows = make(case, 0, order)
    new_case = case._replace(block=query_block, order=to)
    new_order = oracle.random_order(new_case, seed=5)
    regroup = jax.jit(lambda mask, order: masks.regroup(mask, query_block=query_block, query_order=order))
    result = regroup(mask, new_order).check()
    dense = oracle.dense_of_rows(case, rows, order)
    chex.assert_trees_all_equal(result.bits, oracle.words_of_rows(oracle.rows_of_dense(new_case, dense, new_order)))
    assert result.query_block == query_block


def test_regrouping_into_parts_of_rows_changes_no_pair():
    mask, _ = make(SMALL._replace(block=64), 0, None)
    parts = masks.regroup(mask, query_block=16, query_order=None)
    chex.assert_trees_all_equal(parts.to_dense(), mask.to_dense())
    chex.assert_trees_all_equal(masks.regroup(parts, query_block=64, query_order=None), mask)


def test_regrouping_refuses_what_does_not_fit():
    mask, _ = make(SMALL, 0, None)
    with pytest.raises(ValueError, match="got query_block=48"):
        masks.regroup(mask, query_block=48, query_order=None)
    with pytest.raises(ValueError, match=r"T=71, got shape=\(72,\)"):
        masks.regroup(mask, query_block=16, query_order=jnp.arange(72))
