"""Masks from exact probabilities, against float64 NumPy."""

import dataclasses

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
    row_scores,
    top_counts,
)

from fgattn_jax.masks import SliceMask
from fgattn_jax.predictors import Budget, ExactPredictor

# Ragged last row (75 = 4 * 16 + 11), keys that fill no word (90), two query heads per key head.
SHAPE = (2, 75, 90, 4, 2, 16)
RTOL = 1e-4  # of a float32 probability: about exp of the rounding of its logit


def rows_of(mask):
    assert isinstance(mask, SliceMask)
    return np.asarray(mask.check().to_rows())


def lse_of(query, key, scale=None):
    return jnp.asarray(probabilities(query, key, scale)[1], jnp.float32)


@pytest.mark.parametrize(
    ("chunk_bytes", "with_lse"),
    [(None, True), (None, False), (1, False), (2_000, True), (15_000, False)],
    ids=["one chunk, lse given", "one chunk", "one query at a time", "parts of a row, lse given", "two rows and a bit"],
)
def test_peak_keeps_what_some_query_of_the_row_attends_to(chunk_bytes, with_lse):
    query, key = make_inputs(SHAPE, gain=4.0)
    scores = row_scores(probabilities(query, key)[0], 16, "max")
    predictor = ExactPredictor(16, chunk_bytes=chunk_bytes)
    kept = rows_of(predictor(query, key, lse_of(query, key) if with_lse else None))
    assert 0.1 < kept.mean() < 0.95
    assert_same_but_for_rounding(kept, scores, 0.5 / 90, RTOL)


@pytest.mark.parametrize(
    ("chunk_bytes", "with_lse"),
    [(None, True), (None, False), (2_000, False)],
    ids=["one chunk, lse given", "one chunk", "parts of a row"],
)
def test_mass_keeps_the_smallest_set(chunk_bytes, with_lse):
    query, key = make_inputs(SHAPE, gain=4.0)
    scores = row_scores(probabilities(query, key)[0], 16, "sum")
    predictor = ExactPredictor(16, statistic="mass", chunk_bytes=chunk_bytes)
    kept = rows_of(predictor(query, key, lse_of(query, key) if with_lse else None))
    assert_smallest_set(kept, scores, 0.95)
    assert (np.abs(kept.sum(-1) - top_counts(scores, 0.95)) <= 1).all()


@pytest.mark.parametrize("floor", [0.0, 0.9])
@pytest.mark.parametrize("statistic", ["peak", "mass"])
def test_every_head_has_its_own_threshold(statistic, floor):
    query, key = make_inputs(SHAPE, gain=4.0)
    thresholds = np.array([0.1, 0.5, 1.0, 4.0]) / 90
    budget = Budget(threshold=thresholds, head_floor=floor)
    kept = rows_of(ExactPredictor(16, statistic=statistic, budget=budget)(query, key))
    for head, threshold in enumerate(thresholds):
        alone = ExactPredictor(16, statistic=statistic, budget=Budget(threshold=threshold, head_floor=floor))
        np.testing.assert_array_equal(kept[:, head], rows_of(alone(query, key))[:, head])
    assert len({float(density) for density in kept.mean((0, 2, 3))}) == 4


BUDGETS = {
    "count": ("peak", Budget(top_k=12)),
    "share with a minimum": ("mass", Budget(top_p=0.5, min_keys=20)),
    "threshold with a cap": ("mass", Budget(threshold=0.2, max_keys=25)),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_budget_rules_the_kept_count(case):
    statistic, budget = BUDGETS[case]
    query, key = make_inputs(SHAPE, gain=4.0)
    scores = row_scores(probabilities(query, key)[0], 16, {"peak": "max", "mass": "sum"}[statistic])
    kept = rows_of(ExactPredictor(16, statistic=statistic, budget=budget)(query, key))
    if budget.top_k is not None:
        counts = np.full(scores.shape[:-1], budget.top_k)
    elif budget.top_p is not None:
        counts = np.maximum(top_counts(scores, budget.top_p), budget.min_keys)
    else:
        counts = np.clip((scores > budget.threshold).sum(-1), 1, budget.max_keys)
    np.testing.assert_array_equal(kept.sum(-1), counts)
    np.testing.assert_array_equal(kept, best_keys(scores, counts))


def test_head_floor_is_a_share_of_the_mean_count_over_the_queries_of_the_head():
    query, key = make_inputs(SHAPE, gain=4.0)
    query[0, :16, 0] *= 4  # one row of one head that needs few keys
    scores = row_scores(probabilities(query, key)[0], 16, "sum")
    counts = top_counts(scores, 0.75)
    queries = np.array([16, 16, 16, 16, 11])
    floor = np.floor(0.9 * (counts * queries).sum(-1, keepdims=True) / 75)
    expected = np.maximum(counts, floor).astype(int)
    assert (expected > counts).any()
    budget = Budget(top_p=0.75, head_floor=0.9)
    kept = rows_of(ExactPredictor(16, statistic="mass", budget=budget, chunk_bytes=15_000)(query, key))
    np.testing.assert_array_equal(kept.sum(-1), expected)
    np.testing.assert_array_equal(kept, best_keys(scores, expected))


def test_kept_keys_are_in_every_row_and_scale_is_used():
    query, key = make_inputs(SHAPE, gain=4.0)
    scores = row_scores(probabilities(query, key, 0.7)[0], 16, "max")
    kept = rows_of(ExactPredictor(16, budget=Budget(threshold=0.3, keep=(0, -1)))(query, key, scale=0.7))
    assert kept[..., [0, -1]].all()
    assert_same_but_for_rounding(kept[..., 1:-1], scores[..., 1:-1], 0.3, RTOL)


@pytest.mark.parametrize("per_head", [False, True], ids=["one order", "an order per head"])
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse given", "lse computed"])
def test_query_order_groups_the_queries(per_head, with_lse):
    query, key = make_inputs(SHAPE, gain=4.0)
    rng = np.random.default_rng(5)
    order = np.stack([rng.permutation(75) for _ in range(4)])[None] if per_head else rng.permutation(75)
    scores = row_scores(probabilities(query, key)[0], 16, "max", order)
    mask = ExactPredictor(16, order)(query, key, lse_of(query, key) if with_lse else None)
    assert_same_but_for_rounding(rows_of(mask), scores, 0.5 / 90, RTOL)
    np.testing.assert_array_equal(mask.query_order, order if per_head else order[None, None])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_are_scored_in_float32(dtype):
    query, key = make_inputs(SHAPE, gain=4.0, dtype=dtype)
    scores = row_scores(probabilities(query, key)[0], 16, "max")
    kept = rows_of(ExactPredictor(16)(jnp.asarray(query), jnp.asarray(key)))
    assert_same_but_for_rounding(kept, scores, 0.5 / 90, RTOL)


@pytest.mark.parametrize("statistic", ["peak", "mass"])
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse given", "lse computed"])
def test_logits_of_ten_thousand(statistic, with_lse):
    # One key per query takes all: its logit leads by more than float32 can tell apart from certainty.
    query, key = make_inputs(SHAPE, gain=1e4)
    lse = lse_of(query, key)
    assert float(jnp.max(lse)) > 1e4
    probability = probabilities(query, key)[0]
    kept = rows_of(ExactPredictor(16, statistic=statistic)(query, key, lse if with_lse else None))
    winners = row_scores((probability > 0.99).astype(float), 16, "max") > 0
    losers = row_scores(probability, 16, "sum") < 1e-4
    assert kept.any(-1).all()
    assert not (kept & losers).any()
    if statistic == "peak":
        assert kept[winners].all()


@pytest.mark.parametrize("statistic", ["peak", "mass"])
def test_queries_with_an_lse_of_minus_infinity_count_as_nothing(statistic):
    query, key = make_inputs(SHAPE, gain=4.0)
    lse = lse_of(query, key).at[:, :, 3:20].set(-jnp.inf)  # 13 queries of row 0, 4 of row 1
    lse = lse.at[1, 2, 32:48].set(-jnp.inf)  # all of row 2
    probability = probabilities(query, key)[0]
    probability[np.isneginf(np.asarray(lse))] = 0
    kept = rows_of(ExactPredictor(16, statistic=statistic, budget=Budget(min_keys=0))(query, key, lse))
    assert not kept[1, 2, 2].any()
    if statistic == "peak":
        assert_same_but_for_rounding(kept, row_scores(probability, 16, "max"), 0.5 / 90, RTOL)
    else:
        counts = top_counts(row_scores(probability, 16, "sum"), 0.95)
        assert (np.abs(kept.sum(-1) - counts) <= 1).all()


def test_equal_probabilities():
    query, key = make_inputs((1, 32, 64, 1, 1, 16))
    assert rows_of(ExactPredictor(16)(0 * query, key)).all()
    half = rows_of(ExactPredictor(16, statistic="mass", budget=Budget(top_p=0.5))(0 * query, key))
    assert [np.flatnonzero(row).tolist() for row in half[0, 0]] == [list(range(32))] * 2


@pytest.mark.parametrize(
    ("queries", "keys", "statistic"), [(1, 90, "peak"), (1, 90, "mass"), (40, 1, "peak"), (1, 1, "mass")]
)
def test_one_query_or_one_key(queries, keys, statistic):
    query, key = make_inputs((1, queries, keys, 2, 1, 16), gain=4.0)
    mask = ExactPredictor(128, statistic=statistic)(query, key)
    assert mask.bits.shape == (1, 2, 1, 4)
    kept = rows_of(mask)
    probability = probabilities(query, key)[0]
    if statistic == "peak":
        np.testing.assert_array_equal(kept, row_scores(probability, 128, "max") > 0.5 / keys)
    else:
        assert_smallest_set(kept, row_scores(probability, 128, "sum"), 0.95)


def test_nothing_is_empty_where_no_probability_exceeds_the_threshold():
    query, key = make_inputs(SHAPE)
    counts = ExactPredictor(16, budget=Budget(threshold=1.0))(query, key).counts()
    assert (counts == 1).all()


@pytest.mark.parametrize("chunk_bytes", [None, 2_000], ids=["one chunk", "parts of a row"])
@pytest.mark.parametrize("statistic", ["peak", "mass"])
def test_nan_in_a_query_keeps_its_row_and_touches_no_other(statistic, chunk_bytes):
    query, key = make_inputs(SHAPE, gain=4.0)
    predictor = ExactPredictor(16, statistic=statistic, chunk_bytes=chunk_bytes)
    clean = rows_of(predictor(query, key))
    query[1, 20, 3, 5] = np.nan
    kept = rows_of(predictor(query, key))
    assert kept[1, 3, 1].all()
    others = np.ones(kept.shape[:3], bool)
    others[1, 3, 1] = False
    np.testing.assert_array_equal(kept[others], clean[others])


def test_a_missing_query_of_a_ragged_row_counts_as_nothing():
    query, key = make_inputs((1, 17, 90, 1, 1, 16), gain=4.0)
    last = rows_of(ExactPredictor(16, statistic="mass")(query, key))[0, 0, 1]
    alone = rows_of(ExactPredictor(16, statistic="mass")(query[:, 16:], key))[0, 0, 0]
    np.testing.assert_array_equal(last, alone)


def test_closes_over_jit_scan_and_cond():
    query, key = make_inputs(SHAPE, gain=4.0)
    predictor = ExactPredictor(16, np.random.default_rng(5).permutation(75))
    expected = predictor(query, key)

    @jax.jit
    def run(query, key):
        def step(mask, number):
            make = lambda: predictor(query, key)  # noqa: E731
            return jax.lax.cond(number == 1, make, lambda: mask), mask.density()

        empty = jax.tree.map(jnp.zeros_like, expected)
        return jax.lax.scan(step, empty, jnp.arange(3))

    mask, densities = run(query, key)
    np.testing.assert_array_equal(mask.bits, expected.bits)
    np.testing.assert_array_equal(mask.query_order, expected.query_order)
    assert densities.tolist()[:2] == [0.0, 0.0]


def test_is_hashable_by_value_and_traced_once():
    query, key = make_inputs(SHAPE)
    traces = []

    def make(predictor, query, key):
        traces.append(predictor)
        return predictor(query, key)

    make = jax.jit(make, static_argnums=0)
    order = np.random.default_rng(5).permutation(75)
    for copy in (order, list(order), jnp.asarray(order)):
        make(ExactPredictor(16, copy), query, key)
    assert len(traces) == 1
    assert ExactPredictor(16, order) != ExactPredictor(16, order[::-1])
    assert ExactPredictor(16) != ExactPredictor(16, statistic="mass")
    assert hash(ExactPredictor(16, order)) == hash(ExactPredictor(16, order.copy()))


def test_the_frozen_order_is_a_copy():
    order = np.arange(75)
    predictor = ExactPredictor(16, order)
    order[:2] = 0
    assert predictor.query_order.tolist() == list(range(75))
    with pytest.raises(ValueError, match="read-only"):
        predictor.query_order[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        predictor.query_block = 32  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("statistic", ["peak", "mass"])
def test_vmap_is_a_loop(statistic):
    query, key = make_inputs((3, 40, 90, 2, 2, 16), gain=4.0)
    predictor = ExactPredictor(16, statistic=statistic)
    mapped = jax.vmap(lambda query, key: predictor(query[None], key[None]).bits)(query, key)
    np.testing.assert_array_equal(mapped[:, 0], predictor(query, key).bits)


def test_gradients_pass_by_the_mask():
    query, key = make_inputs((1, 40, 48, 1, 1, 16))

    def loss(query):
        mask = ExactPredictor(16, statistic="mass")(query, key)
        return jnp.sum(query**2) * mask.density()

    gradient = jax.jit(jax.grad(loss))(query)
    density = ExactPredictor(16, statistic="mass")(query, key).density()
    np.testing.assert_allclose(gradient, 2 * query * density, rtol=1e-6)


def test_eval_shape_tells_the_mask():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 75, 4, 16), (2, 90, 2, 16))]
    mask = jax.eval_shape(ExactPredictor(32), *shapes)
    assert (mask.bits.shape, mask.num_rows, mask.num_keys) == ((2, 4, 3, 4), 3, 90)


@pytest.mark.parametrize(
    "predictor",
    [ExactPredictor(128), ExactPredictor(128, statistic="mass", budget=Budget(top_p=0.9, head_floor=1.0))],
    ids=["peak", "mass with floor"],
)
def test_memory_holds_chunks_and_never_all_scores(predictor):
    shape = jax.ShapeDtypeStruct((1, 16384, 2, 64), jnp.float32)
    lse = jax.ShapeDtypeStruct((1, 2, 16384), jnp.float32)
    memory = jax.jit(predictor).lower(shape, shape, lse).compile().memory_analysis()
    # One head's scores are 1 GiB. A few chunks of 4 MiB and copies of a head's queries and keys.
    assert memory.temp_size_in_bytes < 40 << 20


GOOD = {"query_block": 16}
WRONG = {
    "blocks of 48": ({"query_block": 48}, r"one of \(16, 32, 64, 128\), got query_block=48"),
    "boolean block": ({"query_block": True}, "got query_block=True"),
    "unknown statistic": ({"statistic": "mean"}, "'peak' or 'mass', got statistic='mean'"),
    "number for a budget": ({"budget": 0.5}, "`Budget` for `budget`, got float"),
    "no chunk": ({"chunk_bytes": 0}, "`chunk_bytes` >= 1, got chunk_bytes=0"),
    "half a byte": ({"chunk_bytes": 0.5}, "integer or None for `chunk_bytes`, got chunk_bytes=0.5"),
    "order of rank two": ({"query_order": np.zeros((2, 3), int)}, r"\[T\] or .* got shape=\(2, 3\)"),
    "order of fractions": ({"query_order": np.arange(3.0)}, "integers in `query_order`, got dtype=float64"),
    "order with repeats": ({"query_order": [0, 0, 2]}, r"each of 0 \.\. 2 once"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_settings(case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        ExactPredictor(**(GOOD | changes))


def test_refuses_a_traced_order():
    with pytest.raises(ValueError, match="`query_order` to be known before tracing"):
        jax.jit(lambda order: ExactPredictor(16, order).query_block)(jnp.arange(16))


def wrong_call(predictor=None, **changes):
    query, key = np.zeros((2, 20, 4, 16), np.float32), np.zeros((2, 30, 2, 16), np.float32)
    arguments = {"query": query, "key": key, "lse": None, "scale": None} | changes
    return (predictor or ExactPredictor(16))(
        arguments["query"], arguments["key"], arguments["lse"], scale=arguments["scale"]
    )


F32 = np.float32
WRONG_CALLS = {
    "query of rank 3": ({"query": np.zeros((20, 4, 16), F32)}, r"`query` of shape \[B, T, N, H\], got shape=\(20, 4"),
    "key of rank 3": ({"key": np.zeros((30, 2, 16), F32)}, r"`key` of shape \[B, S, K, H\], got shape=\(30, 2, 16\)"),
    "no queries": ({"query": np.zeros((2, 0, 4, 16), F32)}, r"length 0 in `query`.* got shape=\(2, 0, 4, 16\)"),
    "no keys": ({"key": np.zeros((2, 0, 2, 16), F32)}, r"length 0 in `key`.* got shape=\(2, 0, 2, 16\)"),
    "integer query": ({"query": np.zeros((2, 20, 4, 16), np.int32)}, "in `query`, got dtype=int32"),
    "integer key": ({"key": np.zeros((2, 30, 2, 16), np.int8)}, "in `key`, got dtype=int8"),
    "other batch": ({"key": np.zeros((3, 30, 2, 16), F32)}, "query batch=2 and key batch=3"),
    "other width": ({"key": np.zeros((2, 30, 2, 32), F32)}, "query width=16 and key width=32"),
    "three key heads": ({"key": np.zeros((2, 30, 3, 16), F32)}, "query heads=4 and key heads=3"),
    "lse in another layout": ({"lse": np.zeros((2, 20, 4), F32)}, r"=\(2, 4, 20\), got shape=\(2, 20, 4\)"),
    "lse in half precision": ({"lse": jnp.zeros((2, 4, 20), jnp.bfloat16)}, "float32, got dtype=bfloat16"),
    "scale per head": ({"scale": np.ones(4)}, r"scalar `scale`, got shape=\(4,\)"),
    "infinite scale": ({"scale": float("inf")}, "finite `scale`, got scale=inf"),
    "order of 16 queries": ({"predictor": ExactPredictor(16, np.arange(16))}, "expected 20 queries .* got 16"),
    "order for three heads": (
        {"predictor": ExactPredictor(16, np.tile(np.arange(20), (1, 3, 1)))},
        r"heads=4, got shape=\(1, 3, 20\)",
    ),
    "minimum above the keys": (
        {"predictor": ExactPredictor(16, budget=Budget(min_keys=31))},
        "num_keys=30, got min_keys=31",
    ),
    "kept key that is none": (
        {"predictor": ExactPredictor(16, budget=Budget(keep=[30]))},
        "got 30 for num_keys=30",
    ),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_refuses_calls(case):
    changes, message = WRONG_CALLS[case]
    with pytest.raises(ValueError, match=message):
        wrong_call(**changes)
