"""Negligible shares, agreement by chance, spread of counts: against loops in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.evaluation.shares import BLOCKS, count_spread, negligible_shares, random_iou


def probabilities(heads=2, queries=256, keys=128, seed=0):
    logits = 3 * np.random.default_rng(seed).standard_normal((heads, queries, keys))
    weights = np.exp(logits)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def naive_share(values, rows, columns, threshold):
    below = total = 0
    for top in range(0, values.shape[0], rows):
        for left in range(0, values.shape[1], columns):
            below += values[top : top + rows, left : left + columns].max() < threshold
            total += 1
    return below / total


def test_shares_are_those_of_a_loop_over_blocks():
    values = probabilities()
    threshold = 3.0 / 128  # high enough that blocks are negligible too
    measured = negligible_shares(jnp.asarray(values), threshold)
    for number, size in enumerate(BLOCKS):
        for head in range(2):
            assert measured.slices[head, number] == pytest.approx(naive_share(values[head], size, 1, threshold))
            assert measured.blocks[head, number] == pytest.approx(naive_share(values[head], size, size, threshold))
    assert 0 < measured.slices[0, 0] < 1


def test_finer_shapes_never_skip_less():
    measured = negligible_shares(jnp.asarray(probabilities(seed=3)), 2.0 / 128)
    for values in measured:
        assert (np.diff(values, axis=-1) <= 0).all()
    assert (measured.blocks <= measured.slices).all()


def test_negligible_means_below_the_threshold():
    """A peak that equals the threshold is not negligible, as for a mask that keeps what is not below it."""
    values = np.full((128, 128), 0.25, np.float32)
    assert negligible_shares(jnp.asarray(values), 0.25).slices[0] == 0
    assert negligible_shares(jnp.asarray(values), 0.2500001).slices[0] == 1


def test_ragged_lengths_are_refused():
    with pytest.raises(ValueError, match="T=200 and S=128"):
        negligible_shares(jnp.zeros((200, 128)), 0.5)


def test_random_iou_is_that_of_random_masks():
    rng = np.random.default_rng(0)
    num_keys, counts, others = 512, np.array([40, 200, 512, 0]), np.array([80, 200, 100, 30])
    both = either = 0
    for _ in range(300):
        for count, other in zip(counts, others, strict=True):
            first = set(rng.choice(num_keys, count, replace=False))
            second = set(rng.choice(num_keys, other, replace=False))
            both += len(first & second)
            either += len(first | second)
    assert random_iou(jnp.asarray(counts), jnp.asarray(others), num_keys) == pytest.approx(both / either, rel=5e-3)


def test_random_iou_of_empty_and_full_masks():
    empty, full = jnp.zeros(4, jnp.int32), jnp.full(4, 100, jnp.int32)
    assert random_iou(empty, empty, 100) == 1
    assert random_iou(full, full, 100) == pytest.approx(1)
    assert random_iou(empty, full, 100) == 0


def test_count_spread_by_hand():
    spread = count_spread(np.array([[10, 10, 10, 10], [10, 30, 10, 30]]))
    assert spread.within_heads == pytest.approx((0 + 0.5) / 2)
    assert spread.between_heads == pytest.approx(5 / 15)
    assert spread.largest_by_mean == pytest.approx((1 + 1.5) / 2)


def test_heads_that_keep_nothing_do_not_count():
    spread = count_spread(np.array([[[4, 4]], [[0, 0]]]))
    assert spread == (0, 0, 1)
    with pytest.raises(ValueError, match="all 0"):
        count_spread(np.zeros((2, 3), np.int32))
