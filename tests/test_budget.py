"""The budget: its values, and exactly which keys it keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from predictors_oracle import best_keys, top_counts

from fgattn_jax.predictors import Budget
from fgattn_jax.predictors._select import rule_counts, select

_select = jax.jit(select, static_argnums=1)


def keep(scores, budget, floor=None):
    floor = None if floor is None else jnp.int32(floor)
    return np.asarray(_select(jnp.asarray(scores, jnp.float32), budget, floor))


def dyadic_scores(rows=7, keys=200, levels=64, seed=0):
    """Multiples of 1/64: sums are exact in float32 and many scores tie."""
    return np.random.default_rng(seed).integers(0, levels, size=(rows, keys)) / 64.0


CASES = {
    "threshold": {"threshold": 0.75},
    "threshold of zero keeps all but zeros": {"threshold": 0.0},
    "threshold above all keeps the best key": {"threshold": 2.0},
    "threshold above all, empty rows allowed": {"threshold": 2.0, "min_keys": 0},
    "threshold lifted by the minimum": {"threshold": 0.75, "min_keys": 60},
    "threshold cut by the cap": {"threshold": 0.75, "max_keys": 9, "min_keys": 0},
    "half of the score": {"top_p": 0.5},
    "half of the score, some rows lifted": {"top_p": 0.5, "min_keys": 60},
    "half of the score, cut": {"top_p": 0.5, "max_keys": 9},
    "all of the score": {"top_p": 1.0},
    "one key": {"top_k": 1},
    "37 keys": {"top_k": 37},
    "all keys": {"top_k": 200},
}


@pytest.mark.parametrize("case", CASES)
def test_keeps_exactly_the_best_keys_with_ties_to_the_lower_key(case):
    budget = Budget(**CASES[case])
    scores = dyadic_scores()
    if budget.threshold is not None:
        counts = (scores > CASES[case]["threshold"]).sum(-1)
    elif budget.top_p is not None:
        counts = top_counts(scores, budget.top_p)
    else:
        counts = np.full(len(scores), budget.top_k)
    counts = np.clip(counts, budget.min_keys, budget.max_keys)
    np.testing.assert_array_equal(keep(scores, budget), best_keys(scores, counts))


@pytest.mark.parametrize("top_p", [0.5, 0.999])
def test_top_p_of_scores_over_many_binades_is_the_smallest_set(top_p):
    # Scores like those of attention: 1e-30 to 1, no ties. The last key is within rounding of a float32 sum.
    scores = np.exp(np.random.default_rng(1).normal(-12, 8, size=(6, 500)).clip(-69, 0)).astype(np.float32)
    kept = keep(scores, Budget(top_p=top_p))
    np.testing.assert_array_equal(kept, best_keys(scores, kept.sum(-1)))
    wide = scores.astype(np.float64)
    assert (np.abs(kept.sum(-1) - top_counts(wide, top_p)) <= 1).all()


def test_hand_made_ties():
    scores = np.array([[0.25, 0.5, 0.25, 0.5, 0.25, 0.25]])
    for count, keys in ((1, [1]), (4, [0, 1, 2, 3])):
        assert np.flatnonzero(keep(scores, Budget(top_k=count))[0]).tolist() == keys
    # Half of the score is exactly the two large keys; an eighth more takes the first of the small ones.
    assert np.flatnonzero(keep(scores, Budget(top_p=0.5))[0]).tolist() == [1, 3]
    assert np.flatnonzero(keep(scores, Budget(top_p=0.625))[0]).tolist() == [0, 1, 3]


def test_a_threshold_is_strict():
    scores = np.array([[0.5, 0.25, 0.125]])
    assert keep(scores, Budget(threshold=0.25)).tolist() == [[True, False, False]]


@pytest.mark.parametrize("rule", [{"threshold": 0.1}, {"top_p": 0.9}, {"top_k": 1}])
def test_one_key_is_kept(rule):
    assert keep(np.array([[0.5], [0.0]]), Budget(**rule)).tolist() == [[True], [True]]


@pytest.mark.parametrize("rule", [{"threshold": 0.1}, {"top_p": 0.5}])
def test_rows_of_zeros_keep_the_first_keys_up_to_the_minimum(rule):
    scores = np.zeros((2, 40))
    assert keep(scores, Budget(**rule, min_keys=0)).sum() == 0
    assert np.flatnonzero(keep(scores, Budget(**rule, min_keys=3))[1]).tolist() == [0, 1, 2]


def test_equal_scores_share_the_mass_equally():
    scores = np.full((1, 64), 1 / 64)
    assert np.flatnonzero(keep(scores, Budget(top_p=0.5))[0]).tolist() == list(range(32))


@pytest.mark.parametrize("budget", [Budget(threshold=0.5), Budget(top_p=0.5), Budget(top_k=1), Budget(threshold=2.0)])
def test_nan_is_kept_first(budget):
    scores = np.array([[0.25, np.nan, 0.75, 0.0]], np.float32)
    assert keep(scores, budget)[0, 1]
    assert keep(np.full((1, 3), -np.nan, np.float32), budget).any()


def test_a_row_of_nan_is_kept_whole_by_share_and_threshold():
    scores = np.full((1, 9), np.nan)
    assert keep(scores, Budget(top_p=0.5)).all()
    assert keep(scores, Budget(threshold=0.5)).all()


def test_floor_lifts_short_rows_and_the_cap_wins():
    scores = np.array([[0.5, 0.25, 0.125, 0.0625], [0.5, 0.5, 0.5, 0.5]])
    assert keep(scores, Budget(threshold=0.3), floor=3).sum(-1).tolist() == [3, 4]
    assert keep(scores, Budget(threshold=0.3, max_keys=2), floor=3).sum(-1).tolist() == [2, 2]
    assert keep(scores, Budget(threshold=0.3), floor=99).sum(-1).tolist() == [4, 4]


def test_rule_counts_hold_the_minimum_but_not_the_cap():
    scores = np.array([[0.5, 0.25, 0.125], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]], np.float32)
    counts = rule_counts(jnp.asarray(scores), Budget(threshold=0.2, min_keys=1, max_keys=2))
    assert counts.tolist() == [2, 1, 3]


def test_kept_keys_are_added_to_every_row_and_not_counted():
    scores = np.array([[0.5, 0.25, 0.125, 0.0], [0.0, 0.0, 0.0, 1.0]])
    kept = keep(scores, Budget(top_k=1, max_keys=1, keep=(2, -1)))
    assert kept.tolist() == [[True, False, True, True], [False, False, True, True]]
    assert keep(scores, Budget(threshold=2.0, min_keys=0, keep=[1])).tolist() == [[False, True, False, False]] * 2


def test_selection_is_the_same_under_vmap():
    scores = jnp.asarray(dyadic_scores().reshape(7, 1, 200), jnp.float32)
    for budget in (Budget(threshold=0.5), Budget(top_p=0.5, min_keys=60)):
        mapped = jax.jit(jax.vmap(lambda block, budget=budget: select(block, budget)))(scores)
        np.testing.assert_array_equal(mapped[:, 0], keep(scores[:, 0], budget))


def test_is_hashable_by_value_and_static_under_jit():
    assert Budget(top_p=0.5, keep=range(3)) == Budget(top_p=0.5, keep=np.arange(3))
    assert hash(Budget(top_p=0.5, keep=range(3))) == hash(Budget(top_p=0.5, keep=[2, 1, 0, 0]))
    assert Budget(top_k=np.int64(3)).top_k == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget().min_keys = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_thresholds_of_heads_are_numbers_by_value():
    budget = Budget(threshold=np.array([0.5, 0.25]))
    assert budget == Budget(threshold=(0.5, 0.25))
    assert hash(budget) == hash(Budget(threshold=[0.5, 0.25]))
    np.testing.assert_array_equal(budget.thresholds(2), [0.5, 0.25])
    np.testing.assert_array_equal(Budget(threshold=0.5).thresholds(3), np.full(3, 0.5))
    assert Budget(top_k=2).thresholds(3) is None


def test_with_default_fills_only_a_missing_rule():
    assert Budget(min_keys=4).with_default(threshold=0.5) == Budget(threshold=0.5, min_keys=4)
    assert Budget(top_k=4).with_default(threshold=0.5) == Budget(top_k=4)


def test_kept_keys_resolve_from_the_end():
    assert Budget(keep=range(-3, 2)).kept_keys(10) == (0, 1, 7, 8, 9)
    assert Budget().kept_keys(10) == ()


WRONG = {
    "two rules": ({"threshold": 0.1, "top_p": 0.9}, "at most one of .* got threshold=0.1, top_p=0.9"),
    "three rules": ({"threshold": 0.1, "top_p": 0.9, "top_k": 3}, "top_k=3"),
    "NaN threshold": ({"threshold": float("nan")}, "got threshold=nan"),
    "infinite threshold": ({"threshold": float("inf")}, "got threshold=inf"),
    "negative threshold": ({"threshold": -0.5}, "got threshold=-0.5"),
    "threshold as text": ({"threshold": "0.5"}, "number for `threshold`, got threshold='0.5'"),
    "table of thresholds": ({"threshold": np.ones((2, 3))}, r"one per head for `threshold`, got shape=\(2, 3\)"),
    "no thresholds": ({"threshold": ()}, r"one per head for `threshold`, got shape=\(0,\)"),
    "a negative threshold of a head": ({"threshold": (0.1, -0.5)}, r"got threshold=\(0.1, -0.5\)"),
    "NaN threshold of a head": ({"threshold": (0.1, float("nan"))}, "got threshold=nan"),
    "share of zero": ({"top_p": 0.0}, "0 < `top_p` <= 1, got top_p=0.0"),
    "share above one": ({"top_p": 1.5}, "got top_p=1.5"),
    "NaN share": ({"top_p": float("nan")}, "got top_p=nan"),
    "no top keys": ({"top_k": 0}, "`top_k` >= 1, got top_k=0"),
    "half a key": ({"top_k": 2.5}, "integer for `top_k`, got top_k=2.5"),
    "negative minimum": ({"min_keys": -1}, "`min_keys` >= 0, got min_keys=-1"),
    "boolean minimum": ({"min_keys": True}, "integer for `min_keys`, got min_keys=True"),
    "cap of zero": ({"max_keys": 0}, "`max_keys` >= 1, got max_keys=0"),
    "minimum above cap": ({"min_keys": 9, "max_keys": 4}, "got min_keys=9 and max_keys=4"),
    "top keys above cap": ({"top_k": 9, "max_keys": 4}, "got top_k=9 and max_keys=4"),
    "floor above one": ({"head_floor": 1.5}, "got head_floor=1.5"),
    "negative floor": ({"head_floor": -0.1}, "got head_floor=-0.1"),
    "NaN floor": ({"head_floor": float("nan")}, "got head_floor=nan"),
    "one number to keep": ({"keep": 3}, "got keep=3"),
    "booleans to keep": ({"keep": np.ones(3, bool)}, "got booleans"),
    "fractions to keep": ({"keep": [0.5]}, "integers, for instance"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case):
    values, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        Budget(**values)


def test_refuses_a_traced_threshold():
    with pytest.raises(ValueError, match="known before tracing for `threshold`"):
        jax.jit(lambda threshold: keep(np.ones((1, 4)), Budget(threshold=threshold)))(0.5)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(min_keys=11), "`min_keys` <= num_keys=10, got min_keys=11"),
        (Budget(top_k=11), "`top_k` <= num_keys=10, got top_k=11"),
        (Budget(keep=[10]), r"-10 \.\. 9, got 10 for num_keys=10"),
        (Budget(keep=[-11]), r"-10 \.\. 9, got -11 for num_keys=10"),
        (Budget(threshold=[0.1] * 3), "or num_heads=2 of them, got 3"),
    ],
)
def test_refuses_more_than_there_are_keys(budget, message):
    with pytest.raises(ValueError, match=message):
        budget.check_fits(10, 2)
