"""Masks from mean queries, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from predictors_oracle import (
    assert_same_but_for_rounding,
    assert_smallest_set,
    best_keys,
    make_inputs,
    probabilities,
    queries_of_rows,
    top_counts,
)

from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor

# Ragged last row (75 = 4 * 16 + 11), keys that fill no word (90), two query heads per key head.
SHAPE = (2, 75, 90, 4, 2, 16)
RTOL = 1e-4
GAIN = 8.0  # means of 16 random queries are a quarter as large


def mean_scores(query, key, query_block, num_means=1, query_order=None, scale=None):
    """Mean over the parts of a row of the softmax of their mean queries: `[B, N, R, S]` in float64."""
    dtype, query = query.dtype, np.asarray(query, np.float64)
    B, T, N, _ = query.shape
    part = query_block // num_means
    order = np.broadcast_to(np.arange(T) if query_order is None else query_order, (B, N, T))
    scores = []
    for b in range(B):
        for n in range(N):
            for row in queries_of_rows(order[b, n], T, query_block):
                means = [query[b, row[start : start + part], n].mean(0) for start in range(0, len(row), part)]
                head = np.array(means).astype(dtype)[None, :, None]
                group = n // (N // key.shape[2])
                scores.append(probabilities(head, key[b : b + 1, :, group : group + 1], scale)[0][0, 0].mean(0))
    return np.array(scores).reshape(B, N, -1, key.shape[1])


def rows_of(mask):
    return np.asarray(mask.check().to_rows())


@pytest.mark.parametrize("chunk_bytes", [None, 800], ids=["one chunk", "two rows and a bit"])
@pytest.mark.parametrize("num_means", [1, 4])
def test_keeps_scores_above_a_tenth_of_the_mean_by_default(num_means, chunk_bytes):
    query, key = make_inputs(SHAPE, gain=2 * GAIN)
    kept = rows_of(MeanQueryPredictor(16, num_means=num_means, chunk_bytes=chunk_bytes)(query, key))
    assert 0.1 < kept.mean() < 0.95
    assert_same_but_for_rounding(kept, mean_scores(query, key, 16, num_means), 0.1 / 90, RTOL)


def test_a_part_for_every_query_is_the_mean_of_their_probabilities():
    query, key = make_inputs(SHAPE, gain=4.0)
    scores = mean_scores(query, key, 16, 16)
    kept = rows_of(MeanQueryPredictor(16, num_means=16, budget=Budget(top_k=20))(query, key))
    mass = rows_of(ExactPredictor(16, statistic="mass", budget=Budget(top_k=20))(query, key))
    np.testing.assert_array_equal(kept, best_keys(scores, np.full(scores.shape[:-1], 20)))
    np.testing.assert_array_equal(kept, mass)


def test_every_head_has_its_own_threshold():
    query, key = make_inputs(SHAPE, gain=GAIN)
    thresholds = (0.1 / 90, 0.5 / 90, 1.0 / 90, 0.0)
    kept = rows_of(MeanQueryPredictor(16, budget=Budget(threshold=thresholds))(query, key))
    for head, threshold in enumerate(thresholds):
        alone = rows_of(MeanQueryPredictor(16, budget=Budget(threshold=threshold))(query, key))
        np.testing.assert_array_equal(kept[:, head], alone[:, head])
    with pytest.raises(ValueError, match="num_heads=4 of them, got 3"):
        MeanQueryPredictor(16, budget=Budget(threshold=(0.1, 0.1, 0.1)))(query, key)


def test_top_k_keeps_the_best_scores():
    query, key = make_inputs(SHAPE, gain=GAIN)
    scores = mean_scores(query, key, 16)
    kept = rows_of(MeanQueryPredictor(16, budget=Budget(top_k=7))(query, key))
    np.testing.assert_array_equal(kept, best_keys(scores, np.full(scores.shape[:-1], 7)))


@pytest.mark.parametrize("num_means", [1, 2])
def test_top_p_keeps_the_smallest_set(num_means):
    query, key = make_inputs(SHAPE, gain=GAIN)
    kept = rows_of(MeanQueryPredictor(16, num_means=num_means, budget=Budget(top_p=0.8))(query, key))
    assert_smallest_set(kept, mean_scores(query, key, 16, num_means), 0.8)


def test_head_floor_and_kept_keys():
    query, key = make_inputs(SHAPE, gain=GAIN)
    scores = mean_scores(query, key, 16)
    counts = top_counts(scores, 0.8)
    floor = np.floor((counts * np.array([16, 16, 16, 16, 11])).sum(-1, keepdims=True) / 75).astype(int)
    expected = best_keys(scores, np.maximum(counts, floor))
    expected[..., -3:] = True
    predictor = MeanQueryPredictor(16, budget=Budget(top_p=0.8, head_floor=1.0, keep=range(-3, 0)))
    np.testing.assert_array_equal(rows_of(predictor(query, key)), expected)


def test_head_floor_weighs_rows_by_queries_and_not_by_parts():
    # The ragged row has 1 of 16 queries but 1 of 4 parts.
    query, key = make_inputs((2, 17, *SHAPE[2:]), gain=GAIN)
    scores = mean_scores(query, key, 16, 4)
    counts = top_counts(scores, 0.8)
    floor = np.floor((counts * np.array([16, 1])).sum(-1, keepdims=True) / 17).astype(int)
    by_parts = np.floor((counts * np.array([4, 1])).sum(-1, keepdims=True) / 5).astype(int)
    assert (np.maximum(counts, floor) != np.maximum(counts, by_parts)).any()
    predictor = MeanQueryPredictor(16, num_means=4, budget=Budget(top_p=0.8, head_floor=1.0))
    np.testing.assert_array_equal(rows_of(predictor(query, key)).sum(-1), np.maximum(counts, floor))


@pytest.mark.parametrize("per_head", [False, True], ids=["one order", "an order per head"])
def test_query_order_groups_the_queries(per_head):
    query, key = make_inputs(SHAPE, gain=GAIN)
    rng = np.random.default_rng(5)
    order = np.stack([rng.permutation(75) for _ in range(4)])[None] if per_head else rng.permutation(75)
    scores = mean_scores(query, key, 16, 2, order)
    mask = MeanQueryPredictor(16, order, num_means=2, budget=Budget(top_k=9))(query, key)
    np.testing.assert_array_equal(rows_of(mask), best_keys(scores, np.full(scores.shape[:-1], 9)))
    np.testing.assert_array_equal(mask.query_order, order if per_head else order[None, None])


def test_bfloat16_means_are_float32():
    query, key = make_inputs(SHAPE, gain=GAIN, dtype=jnp.bfloat16)
    kept = rows_of(MeanQueryPredictor(16, budget=Budget(threshold=0.5 / 90))(jnp.asarray(query), jnp.asarray(key)))
    assert_same_but_for_rounding(kept, mean_scores(query, key.astype(np.float64), 16), 0.5 / 90, RTOL)


def test_logits_of_ten_thousand_keep_the_winner():
    query, key = make_inputs(SHAPE, gain=4e4)
    kept = rows_of(MeanQueryPredictor(16)(query, key))
    scores = mean_scores(query, key, 16)
    assert (kept | (scores < 0.99)).all()
    assert not (kept & (scores < 1e-4)).any()


@pytest.mark.parametrize(("queries", "keys"), [(1, 90), (40, 1)])
def test_one_query_or_one_key(queries, keys):
    query, key = make_inputs((1, queries, keys, 2, 1, 16), gain=GAIN)
    mask = MeanQueryPredictor(128, num_means=8)(query, key)
    assert_same_but_for_rounding(rows_of(mask), mean_scores(query, key, 128, 8), 0.1 / keys, RTOL)


def test_scale_is_used():
    query, key = make_inputs(SHAPE, gain=1.0)
    kept = rows_of(MeanQueryPredictor(16, budget=Budget(threshold=0.5 / 90))(query, key, scale=3.0))
    assert_same_but_for_rounding(kept, mean_scores(query, key, 16, scale=3.0), 0.5 / 90, RTOL)


def test_closes_over_jit_and_cond_and_is_hashable_by_value():
    query, key = make_inputs(SHAPE, gain=GAIN)
    predictor = MeanQueryPredictor(16, np.arange(75)[::-1], budget=Budget(top_k=5))
    expected = predictor(query, key)
    empty = jax.tree.map(jnp.zeros_like, expected)
    run = jax.jit(lambda due, query, key: jax.lax.cond(due, lambda: predictor(query, key), lambda: empty))
    np.testing.assert_array_equal(run(True, query, key).bits, expected.bits)
    assert run(False, query, key).counts().sum() == 0
    assert predictor == MeanQueryPredictor(16, list(range(74, -1, -1)), budget=Budget(top_k=5))
    assert hash(predictor) == hash(MeanQueryPredictor(16, list(range(74, -1, -1)), budget=Budget(top_k=5)))
    assert MeanQueryPredictor(16) != MeanQueryPredictor(16, num_means=2)
    assert MeanQueryPredictor(16) != ExactPredictor(16)


def test_asks_for_no_lse_and_refuses_one():
    query, key = make_inputs(SHAPE)
    assert not MeanQueryPredictor(16).needs_lse
    assert ExactPredictor(16).needs_lse
    with pytest.raises(ValueError, match="expected no `lse`"):
        MeanQueryPredictor(16)(query, key, jnp.zeros((2, 4, 75)))


@pytest.mark.parametrize("budget", [Budget(), Budget(top_p=0.9)], ids=["threshold", "share"])
def test_memory_never_holds_all_scores(budget):
    shape = jax.ShapeDtypeStruct((1, 16384, 2, 64), jnp.float32)
    predictor = MeanQueryPredictor(16, num_means=4, budget=budget)
    memory = jax.jit(predictor).lower(shape, shape).compile().memory_analysis()
    # The scores of all means of one head are 256 MiB.
    assert memory.temp_size_in_bytes < 48 << 20


WRONG = {
    "blocks of 48": ({"query_block": 48}, r"one of \(16, 32, 64, 128\), got query_block=48"),
    "no means": ({"num_means": 0}, "`num_means` >= 1, got num_means=0"),
    "boolean means": ({"num_means": True}, "`num_means` >= 1, got num_means=True"),
    "three means of 16": ({"num_means": 3}, "divide query_block=16, got num_means=3"),
    "text for a budget": ({"budget": "0.5"}, "`Budget` for `budget`, got str"),
    "no chunk": ({"chunk_bytes": 0}, "`chunk_bytes` >= 1, got chunk_bytes=0"),
    "order with repeats": ({"query_order": [0, 0, 2]}, r"each of 0 \.\. 2 once"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_settings(case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        MeanQueryPredictor(**({"query_block": 16} | changes))


WRONG_CALLS = {
    "query of rank 3": ((20, 4, 16), (2, 30, 2, 16), {}, r"`query` of shape .* got shape=\(20, 4, 16\)"),
    "other width": ((2, 20, 4, 16), (2, 30, 2, 32), {}, "query width=16 and key width=32"),
    "order of 16 queries": (
        (2, 20, 4, 16),
        (2, 30, 2, 16),
        {"query_order": np.arange(16)},
        "expected 20 queries .* got 16",
    ),
    "more than the keys": (
        (2, 20, 4, 16),
        (2, 30, 2, 16),
        {"budget": Budget(top_k=31)},
        "num_keys=30, got top_k=31",
    ),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_refuses_calls(case):
    query_shape, key_shape, settings, message = WRONG_CALLS[case]
    with pytest.raises(ValueError, match=message):
        MeanQueryPredictor(16, **settings)(np.zeros(query_shape, np.float32), np.zeros(key_shape, np.float32))
