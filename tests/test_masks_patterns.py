"""Local windows, causal masks, keys that every row keeps."""

import chex
import jax
import jax.numpy as jnp
import masks_oracle as oracle
import numpy as np
import pytest

from fgattn_jax import masks

CASES = pytest.mark.parametrize("case", oracle.CASES.values(), ids=oracle.CASES.keys())
ALIGN = pytest.mark.parametrize("align", ["start", "end"])
SIZES = {"query_block": 16, "num_queries": 40, "num_keys": 70}


def distances(case, align):
    """Place of every key minus that of every query, [T, S]."""
    offset = case.keys - case.queries if align == "end" else 0
    return np.arange(case.keys) - (np.arange(case.queries)[:, None] + offset)


def everywhere(case, bits):
    return np.broadcast_to(bits, (case.batch, case.heads, *bits.shape[2:]))


@CASES
@ALIGN
def test_a_window_reaches_before_and_after_every_query(case, align):
    order = oracle.random_order(case)
    dense = (distances(case, align) >= -9) & (distances(case, align) <= 4)
    mask = masks.local_window(before=9, after=4, **case.sizes, align=align, query_order=order).check()
    expected = oracle.words_of_rows(oracle.rows_of_dense(case, dense, order))
    chex.assert_trees_all_equal(everywhere(case, mask.bits), expected)


@CASES
@ALIGN
def test_causal_masks_keep_the_keys_up_to_the_last_query_of_a_row(case, align):
    order = oracle.random_order(case)
    dense = distances(case, align) <= 0
    mask = masks.causal(**case.sizes, align=align, query_order=order).check()
    expected = oracle.words_of_rows(oracle.rows_of_dense(case, dense, order))
    chex.assert_trees_all_equal(everywhere(case, mask.bits), expected)
    assert (np.asarray(mask.to_dense()) >= dense).all()


def test_causal_masks_see_less_than_a_slice_beyond_the_diagonal():
    mask = masks.causal(query_block=16, num_queries=64, num_keys=64)
    keys_seen = np.asarray(mask.to_dense()[0, 0]).sum(-1)
    np.testing.assert_array_equal(keys_seen, np.repeat([16, 32, 48, 64], 16))


def test_a_window_without_reach_keeps_the_own_keys_of_a_row():
    mask = masks.local_window(before=0, after=0, query_block=16, num_queries=40, num_keys=40)
    assert np.asarray(mask.counts()).tolist() == [[[16, 16, 8]]]


def test_patterns_are_built_under_jit_with_a_traced_order():
    order = np.random.default_rng(0).permutation(40).astype(np.int32)
    build = jax.jit(lambda order: masks.local_window(before=3, after=3, **SIZES, query_order=order))
    chex.assert_trees_all_equal(build(order), masks.local_window(before=3, after=3, **SIZES, query_order=order))


def test_no_dense_array_is_made_on_the_way():
    build = jax.jit(lambda: masks.local_window(before=99, after=99, query_block=128, num_queries=4096, num_keys=4096))
    assert build.lower().compile().memory_analysis().temp_size_in_bytes < 4096 * 4096 / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"before": -1}, "`before` to be at least 0, got before=-1"),
        ({"after": -2}, "`after` to be at least 0, got after=-2"),
        ({"align": "middle"}, "got align='middle'"),
        ({"query_block": 100}, "got query_block=100"),
        ({"query_order": np.arange(41)}, r"T=40, got shape=\(41,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_windows_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        masks.local_window(**({"before": 1, "after": 1} | SIZES | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"), [({"align": ""}, "got align=''"), ({"num_keys": 0}, "got num_keys=0")]
)
def test_causal_masks_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        masks.causal(**(SIZES | arguments))


# Keys that every row keeps.


@CASES
def test_boolean_keys_are_kept_by_every_row(case):
    keys = np.random.default_rng(0).random((case.batch, case.keys)) < 0.3
    mask = masks.keep_keys(keys, **case.sizes).check()
    assert mask.bits.shape[:3] == (case.batch, 1, case.rows)
    dense = np.broadcast_to(keys[:, None, None], (case.batch, case.heads, case.queries, case.keys))
    expected = oracle.words_of_rows(oracle.rows_of_dense(case, dense, None))
    chex.assert_trees_all_equal(everywhere(case, mask.bits), expected)


def test_key_numbers_are_kept_by_every_row():
    mask = masks.keep_keys([0, 69, 3, 3], **SIZES).check()
    assert mask.bits.shape[:2] == (1, 1)
    for row in np.asarray(mask.to_rows())[0, 0]:
        assert np.flatnonzero(row).tolist() == [0, 3, 69]


def test_key_numbers_of_each_batch_entry_under_jit_drop_what_is_out_of_range():
    build = jax.jit(lambda keys: masks.keep_keys(keys, **SIZES))
    mask = build(np.array([[1, 70], [-1, 5]], np.int32)).check()
    assert [np.flatnonzero(row).tolist() for row in np.asarray(mask.to_rows())[:, 0, 2]] == [[1], [5]]


def test_no_key_number_keeps_no_key():
    assert float(masks.keep_keys(np.zeros(0, np.int32), **SIZES).density()) == 0.0


def test_the_first_keys_of_each_length_are_kept():
    mask = masks.keep_lengths(np.array([0, 33, 70]), **SIZES).check()
    assert mask.bits.shape == (3, 1, 3, 4)
    expected = np.arange(70) < np.array([0, 33, 70])[:, None, None, None]
    chex.assert_trees_all_equal(mask.to_rows(), np.broadcast_to(expected, (3, 1, 3, 70)))
    chex.assert_trees_all_equal(masks.keep_lengths(33, **SIZES).bits, mask.bits[1:2])


def test_lengths_out_of_range_are_cut_under_jit():
    counts = jax.jit(lambda lengths: masks.keep_lengths(lengths, **SIZES).counts())(jnp.array([-4, 99]))
    chex.assert_trees_all_equal(counts[:, 0, 0], np.array([0, 70], np.int32))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (np.ones(71, bool), r"S=num_keys=70, got shape=\(71,\)"),
        (np.ones((1, 2, 70), bool), r"rank 1 .* or 2 \[B, ...\], got shape=\(1, 2, 70\)"),
        (np.array([70]), "from 0 to num_keys-1=69, got key=70"),
        (np.array([[3, -1]]), "from 0 to num_keys-1=69, got key=-1"),
        (np.array([0.5]), "`keys` to hold integers, got dtype=float64"),
    ],
    ids=["too many", "rank", "past the end", "negative", "float"],
)
def test_keys_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        masks.keep_keys(keys, **SIZES)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (np.array([3, 71]), "from 0 to num_keys=70, got length=71"),
        (np.array([-1]), "from 0 to num_keys=70, got length=-1"),
        (np.array([[3]]), r"`lengths` of shape \[B\], or one number, got shape=\(1, 1\)"),
        (np.array([3.0]), "`lengths` to hold integers, got dtype=float64"),
    ],
    ids=["too long", "negative", "rank", "float"],
)
def test_lengths_that_do_not_fit_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        masks.keep_lengths(lengths, **SIZES)
