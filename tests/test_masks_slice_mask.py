"""The mask container: its numbers, its conversions, its life under transformations, and what it refuses."""

import copy
import dataclasses
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import masks_oracle as oracle
import numpy as np
import pytest

from fgattn_jax import masks
from fgattn_jax.masks import SliceMask, _bits, slice_mask

CASES = pytest.mark.parametrize("case", oracle.CASES.values(), ids=oracle.CASES.keys())
SMALL = oracle.CASES["odd lengths, smallest slices"]


def make(case, seed=0):
    rows, order = oracle.random_rows(case, seed), oracle.random_order(case, seed)
    mask = masks.from_rows(jnp.asarray(rows), query_block=case.block, num_queries=case.queries, query_order=order)
    return mask, rows, order


@pytest.mark.parametrize("num_keys", [1, 31, 32, 33, 127, 128, 129, 400])
def test_words_are_packed_little_bit_first_in_multiples_of_16_bytes(num_keys):
    rows = np.random.default_rng(num_keys).random((2, 3, num_keys)) < 0.5
    words = _bits.pack_rows(jnp.asarray(rows))
    chex.assert_trees_all_equal(words, oracle.words_of_rows(rows))
    assert words.shape[-1] == _bits.num_words(num_keys) == 4 * -(-num_keys // 128)
    chex.assert_trees_all_equal(_bits.unpack_words(words, num_keys), rows)
    chex.assert_trees_all_equal(_bits.full_words(num_keys), oracle.words_of_rows(np.ones(num_keys, bool)))


@CASES
def test_numbers_of_a_mask(case):
    mask, rows, _ = make(case)
    assert mask.num_rows == case.rows
    chex.assert_trees_all_equal(mask.counts(), rows.sum(-1).astype(np.int32))
    chex.assert_trees_all_close(mask.row_density(), rows.mean(-1, dtype=np.float64).astype(np.float32), rtol=1e-6)
    assert mask.density().dtype == jnp.float32
    np.testing.assert_allclose(mask.density(), rows.mean(), rtol=1e-6)


def test_bytes_count_bits_and_order():
    mask, _, _ = make(SMALL)
    assert mask.nbytes == 4 * 2 * 2 * 5 * 8 + 4 * 2 * 2 * 71
    assert jax.eval_shape(lambda: mask).nbytes == mask.nbytes
    assert mask.with_query_order(None).nbytes == 4 * 2 * 2 * 5 * 8


@CASES
def test_dense_masks_stand_in_the_natural_query_order(case):
    mask, rows, order = make(case)
    chex.assert_trees_all_equal(mask.to_rows(), rows)
    chex.assert_trees_all_equal(mask.to_dense(), oracle.dense_of_rows(case, rows, order))
    chex.assert_trees_all_equal(jax.jit(SliceMask.to_dense)(mask), oracle.dense_of_rows(case, rows, order))


def test_bits_and_order_broadcast_against_each_other():
    case = oracle.Case(2, 3, 70, 40, 16, "own")
    order = oracle.random_order(case)
    rows = oracle.random_rows(case)[:1, :1]
    mask = masks.from_rows(jnp.asarray(rows), query_block=16, num_queries=70, query_order=order).check()
    everywhere = np.broadcast_to(rows, (2, 3, 5, 40))
    chex.assert_trees_all_equal(mask.to_dense(), oracle.dense_of_rows(case, everywhere, order))


@CASES
def test_indices_are_ascending_and_filled_up_with_num_keys(case):
    mask, rows, _ = make(case)
    indices, counts = mask.to_indices()
    assert indices.dtype == counts.dtype == jnp.int32
    assert indices.shape == (*rows.shape[:3], rows.sum(-1).max())
    chex.assert_trees_all_equal(counts, rows.sum(-1).astype(np.int32))
    for place in np.ndindex(rows.shape[:3]):
        kept = np.flatnonzero(rows[place])
        np.testing.assert_array_equal(indices[place][: kept.size], kept)
        np.testing.assert_array_equal(indices[place][kept.size :], case.keys)


def test_indices_of_an_empty_mask_have_no_place():
    indices, counts = masks.empty(query_block=16, num_queries=20, num_keys=9).to_indices()
    assert indices.shape == (1, 1, 2, 0)
    chex.assert_trees_all_equal(counts, np.zeros((1, 1, 2), np.int32))


def test_indices_under_jit_keep_the_first_keys_of_a_row_beyond_the_capacity():
    mask, rows, _ = make(SMALL)
    indices, counts = jax.jit(lambda mask: mask.to_indices(capacity=3))(mask)
    chex.assert_trees_all_equal(counts, np.minimum(rows.sum(-1), 3).astype(np.int32))
    np.testing.assert_array_equal(indices[1, 1, 2], np.flatnonzero(rows[1, 1, 2])[:3])


def test_indices_refuse_a_capacity_that_does_not_fit():
    mask = masks.full(query_block=16, num_queries=20, num_keys=9)
    with pytest.raises(ValueError, match="largest count=9, got capacity=8"):
        mask.to_indices(capacity=8)
    with pytest.raises(ValueError, match="at least 0, got capacity=-1"):
        mask.to_indices(capacity=-1)
    with pytest.raises(ValueError, match="needs a `capacity` under `jit`"):
        jax.jit(lambda mask: mask.to_indices())(mask)


def test_another_query_order_keeps_the_rows():
    case = oracle.Case(2, 2, 71, 133, 16, "own")
    mask, rows, _ = make(case)
    other = np.roll(np.arange(71), 5)
    moved = mask.with_query_order(other).check()
    assert moved.query_order is not None
    assert moved.query_order.shape == (1, 1, 71)
    chex.assert_trees_all_equal(moved.bits, mask.bits)
    chex.assert_trees_all_equal(moved.to_dense(), oracle.dense_of_rows(case, rows, other))
    with pytest.raises(ValueError, match=r"T=71, got shape=\(70,\)"):
        mask.with_query_order(np.arange(70))


def test_builders_are_reached_from_the_class():
    made_from = ["from_rows", "from_dense", "from_indices", "from_blocks"]
    patterns = ["full", "empty", "local_window", "causal", "keep_keys", "keep_lengths"]
    for name in made_from + patterns:
        assert getattr(SliceMask, name) is getattr(masks, name)


# Life under transformations.


def test_flattening_names_the_leaves_and_keeps_the_numbers():
    mask, _, _ = make(SMALL)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(mask)[0]]
    assert paths == [".bits", ".query_order"]
    leaves, structure = jax.tree.flatten(mask)
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert (rebuilt.query_block, rebuilt.num_keys, rebuilt.num_queries) == (16, 133, 71)
    assert jax.tree.structure(mask) == jax.tree.structure(make(SMALL, seed=1)[0])
    assert jax.tree.structure(mask) != jax.tree.structure(mask.with_query_order(None))


@pytest.mark.parametrize(
    "leaf", [None, 0, "batch", object(), jnp.zeros(3), (1, 2)], ids=["none", "int", "str", "object", "array", "tuple"]
)
def test_leaves_may_become_anything(leaf):
    mask, _, _ = make(SMALL)
    mapped = jax.tree.map(lambda _: leaf, mask)
    assert isinstance(mapped, SliceMask)
    assert mapped.bits is leaf
    assert mapped.num_keys == 133


def test_jit_traces_once_for_masks_of_the_same_sizes():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def half(mask):
        return dataclasses.replace(mask, bits=mask.bits & jnp.uint32(0x55555555))

    for seed in range(3):
        mask, rows, _ = make(SMALL, seed)
        even = rows & (np.arange(133) % 2 == 0)
        chex.assert_trees_all_equal(half(mask).check().to_rows(), even)


def test_vmap_over_a_stack_over_the_batch_and_over_heads():
    mask, rows, order = make(SMALL)
    expected = oracle.dense_of_rows(SMALL, rows, order)
    chex.assert_trees_all_equal(jax.vmap(SliceMask.to_dense)(mask), expected)
    chex.assert_trees_all_equal(jax.vmap(SliceMask.counts, in_axes=1, out_axes=1)(mask), mask.counts())
    inverted = jax.vmap(lambda mask: masks.difference(mask, mask))(mask)
    chex.assert_trees_all_equal(inverted.bits, jnp.zeros_like(mask.bits))
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), mask, make(SMALL, seed=1)[0])
    chex.assert_trees_all_equal(jax.vmap(SliceMask.to_dense)(stack)[0], expected)
    chex.assert_trees_all_equal(stack.to_dense()[0], expected)


def test_scan_over_stacked_layers_hands_out_one_mask_each():
    layers = [make(SMALL, seed) for seed in range(4)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[mask for mask, _, _ in layers])
    assert stack.bits.shape == (4, 2, 2, 5, 8)

    def layer(carry, mask):
        assert mask.bits.shape == (2, 2, 5, 8)
        return masks.union(carry, mask.with_query_order(None)), mask.to_dense()

    first = masks.empty(**SMALL.sizes, batch=2, num_heads=2)
    union, dense = jax.jit(lambda first, stack: jax.lax.scan(layer, first, stack))(first, stack)
    for index, (_, rows, order) in enumerate(layers):
        chex.assert_trees_all_equal(dense[index], oracle.dense_of_rows(SMALL, rows, order))
    chex.assert_trees_all_equal(union.to_rows(), functools.reduce(np.logical_or, [rows for _, rows, _ in layers]))


def test_a_stack_made_by_the_constructor_is_accepted():
    mask, _, order = make(SMALL)
    stack = SliceMask(jnp.stack([mask.bits] * 3), jnp.stack([jnp.asarray(order)] * 3), **SMALL.sizes)
    assert stack.check().counts().shape == (3, 2, 2, 5)
    np.testing.assert_allclose(stack.density(), mask.density(), rtol=1e-6)


def test_eval_shape_gives_an_abstract_mask():
    mask, _, _ = make(SMALL)
    abstract = jax.eval_shape(lambda mask: masks.union(mask, mask), mask)
    assert isinstance(abstract, SliceMask)
    assert abstract.bits.shape == (2, 2, 5, 8)
    assert abstract.bits.dtype == jnp.uint32


def test_a_donated_mask_gives_its_memory_to_the_result():
    mask, rows, _ = make(SMALL)
    where = mask.bits.unsafe_buffer_pointer()
    doubled = jax.jit(lambda mask: jax.tree.map(lambda leaf: leaf, masks.union(mask, mask)), donate_argnums=0)(mask)
    assert mask.bits.is_deleted()
    assert doubled.bits.unsafe_buffer_pointer() == where
    chex.assert_trees_all_equal(doubled.to_rows(), rows)


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_are_the_same_mask(through):
    mask, _, _ = make(SMALL)
    again = through(mask)
    chex.assert_trees_all_equal(again, mask)
    assert jax.tree.structure(again) == jax.tree.structure(mask)


def test_a_function_of_a_mask_is_exported():
    mask, _, _ = make(SMALL)
    exported = jax.export.export(jax.jit(lambda mask: masks.union(mask, mask)))(jax.eval_shape(lambda: mask))
    chex.assert_trees_all_equal(exported.call(mask), mask)


def test_the_numbers_of_an_exported_mask_come_back_from_bytes():
    structure = jax.tree.structure(make(SMALL)[0])
    _, static = structure.node_data() or (None, None)
    assert static == (16, 133, 71)
    assert slice_mask._static_from_bytes(slice_mask._static_to_bytes((np.int64(16), 133, 71))) == static


# What the constructor and `check` refuse.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_block": 24}, r"one of \(16, 32, 64, 128\), got query_block=24"),
        ({"query_block": 64}, "R=2 rows for num_queries=71 and query_block=64, got R=5"),
        ({"num_queries": 0}, "`num_queries` to be at least 1, got num_queries=0"),
        ({"num_queries": 81}, "R=6 rows for num_queries=81"),
        ({"num_queries": 72}, "T=num_queries=72 positions, got T=71"),
        ({"num_keys": -3}, "`num_keys` to be at least 1, got num_keys=-3"),
        ({"num_keys": 133.0}, r"Python integer known at trace time, got num_keys=133\.0"),
        ({"num_keys": 257}, "W=12 words for num_keys=257 .*, got W=8"),
        ({"bits": jnp.zeros((2, 5, 8), jnp.uint32)}, r"rank 4 \[B, N, R, W\].*got shape=\(2, 5, 8\)"),
        ({"bits": jnp.zeros((2, 2, 5, 8), jnp.int32)}, "dtype uint32, got dtype=int32"),
        ({"query_order": jnp.arange(71, dtype=jnp.int32)}, r"`query_order` of rank 3.*got shape=\(71,\)"),
        ({"query_order": jnp.zeros((3, 2, 71), jnp.int32)}, r"1 or those of `bits`, got shape=\(3, 2, 71\)"),
        ({"query_order": jnp.zeros((2, 2, 71), jnp.float32)}, "dtype int32, got dtype=float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_constructor_names_what_does_not_fit(change, message):
    mask, _, _ = make(SMALL)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(mask, **change)


def test_a_right_mask_passes_its_check():
    mask, _, _ = make(SMALL)
    assert mask.check() is mask


def test_check_names_a_bit_past_the_last_key():
    mask, _, _ = make(SMALL)
    stray = dataclasses.replace(mask, bits=mask.bits.at[1, 0, 3, 4].set(jnp.uint32(1 << 9)))
    with pytest.raises(ValueError, match=r"past num_keys=133 to be zero, got key=137 set in `bits`\[1, 0, 3\]"):
        stray.check()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (71, r"query 0\.\.70 once, got query=71 out of range in `query_order`\[0, 1\]"),
        (-1, r"query 0\.\.70 once, got query=-1 out of range in `query_order`\[0, 1\]"),
        (None, r"query 0\.\.70 once, got query=\d+ more than once in `query_order`\[0, 1\]"),
    ],
    ids=["past the end", "negative", "twice"],
)
def test_check_names_an_order_that_is_no_permutation(value, message):
    mask, _, order = make(SMALL)
    wrong = order.copy()
    wrong[0, 1, 7] = order[0, 1, 8] if value is None else value
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(mask, query_order=jnp.asarray(wrong)).check()


def test_check_refuses_traced_and_abstract_masks():
    mask, _, _ = make(SMALL)
    with pytest.raises(ValueError, match="outside `jit`"):
        jax.jit(SliceMask.check)(mask)
    with pytest.raises(ValueError, match="outside `jit`"):
        jax.eval_shape(lambda: mask).check()


# The work order.


def expected_work_order(rows):
    counts = rows.sum(-1)
    work = np.zeros((*counts.shape, 2), np.int32)
    for place in np.ndindex(counts.shape[:-1]):
        line = counts[place]
        ordered = sorted(range(line.size), key=lambda row, line=line: (-line[row], row))
        work[place] = [(row, line[row]) for row in ordered]
    return work


@CASES
def test_work_order_is_most_keys_first_and_ties_by_lower_row(case):
    mask, rows, _ = make(case)
    rows[:, :, -1] = rows[:, :, 0]  # at least one tie
    mask = masks.from_rows(
        jnp.asarray(rows), query_block=case.block, num_queries=case.queries, query_order=mask.query_order
    )
    ordered = mask.with_work_order().check()
    assert ordered.work_order.dtype == jnp.int32
    chex.assert_trees_all_equal(ordered.work_order, expected_work_order(rows))
    chex.assert_trees_all_equal((ordered.bits, ordered.query_order), (mask.bits, mask.query_order))
    chex.assert_trees_all_equal(jax.jit(SliceMask.with_work_order)(mask), ordered)


def test_work_order_of_equal_rows_is_their_order():
    mask = masks.full(query_block=16, num_queries=16 * 37, num_keys=9).with_work_order()
    chex.assert_trees_all_equal(mask.work_order[0, 0], np.stack([np.arange(37), np.full(37, 9)], -1).astype(np.int32))


def test_work_order_counts_only_keys_that_exist():
    bits = jnp.full((1, 1, 2, 4), 0xFFFFFFFF, jnp.uint32).at[0, 0, 0].set(jnp.array([7, 0, 0, 0], jnp.uint32))
    mask = SliceMask(bits, query_block=16, num_keys=33, num_queries=20).with_work_order()
    assert mask.work_order.tolist() == [[[[1, 33], [0, 3]]]]


def test_work_order_of_stacked_and_mapped_masks():
    every = [make(SMALL, seed)[0] for seed in range(3)]
    expected = jnp.stack([mask.with_work_order().work_order for mask in every])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *every)
    chex.assert_trees_all_equal(stacked.with_work_order().check().work_order, expected)
    chex.assert_trees_all_equal(jax.vmap(SliceMask.with_work_order)(stacked).work_order, expected)
    with_orders = stacked.with_work_order()
    _, scanned = jax.lax.scan(lambda carry, mask: (carry, mask.work_order), 0, with_orders)
    chex.assert_trees_all_equal(scanned, expected)


def test_work_order_is_a_third_leaf_only_where_it_is():
    mask, _, _ = make(SMALL)
    ordered = mask.with_work_order()
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(ordered)[0]]
    assert paths == [".bits", ".query_order", ".work_order"]
    assert jax.tree.structure(ordered) != jax.tree.structure(mask)
    assert ordered.nbytes == mask.nbytes + 4 * 2 * 2 * 5 * 2
    assert pickle.loads(pickle.dumps(ordered)).work_order.shape == (2, 2, 5, 2)


def test_other_bits_rows_or_orders_have_no_work_order():
    mask = make(SMALL)[0].with_work_order()
    made = (
        masks.union(mask, mask), masks.intersection(mask, mask), masks.difference(mask, mask),
        masks.regroup(mask, query_block=32, query_order=None), mask.with_query_order(None),
    )  # fmt: skip
    assert [other.work_order for other in made] == [None] * 5


def test_check_finds_a_work_order_of_other_bits():
    mask, _, _ = make(SMALL)
    work = mask.with_work_order().work_order
    (row, count), (next_row, next_count) = work[1, 0, :2].tolist()
    swapped = dataclasses.replace(mask, work_order=work.at[1, 0, 0].set(work[1, 0, 1]))
    message = (
        rf"`work_order`\[1, 0, 0\] .* to be row={row} with count={count}, got row={next_row} with count={next_count}"
    )
    with pytest.raises(ValueError, match=message):
        swapped.check()
    counted = dataclasses.replace(mask, work_order=work.at[0, 1, 2, 1].add(1))
    with pytest.raises(ValueError, match=r"`work_order`\[0, 1, 2\] .*make it anew with `with_work_order`"):
        counted.check()


@pytest.mark.parametrize(
    ("work_order", "message"),
    [
        (jnp.zeros((2, 2, 4, 2), jnp.int32), r"shape=\(2, 2, 5, 2\), .* got shape=\(2, 2, 4, 2\)"),
        (jnp.zeros((1, 2, 5, 2), jnp.int32), r"shape=\(2, 2, 5, 2\), .* got shape=\(1, 2, 5, 2\)"),
        (jnp.zeros((2, 2, 5), jnp.int32), r"got shape=\(2, 2, 5\)"),
        (jnp.zeros((2, 2, 5, 2), jnp.uint32), "of dtype int32, got dtype=uint32"),
    ],
)
def test_a_work_order_of_another_shape_is_refused(work_order, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make(SMALL)[0], work_order=work_order)
