"""The CUDA kernels that make masks against float64: in their emulation on a CPU, and on a GPU (`-m gpu`)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_emulation.emulator import Emulator
from cuda_emulation.emulator import SelectRule as EmulatedRule
from mask_cases import Scored, make, mean_scores, one_row, unpack

from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor, _select
from fgattn_jax.xla_ffi import masks

NEAR = 1e-4
"""Scores within this of the threshold, in natural logarithms, may fall on either side: sums and products round."""
NEAR_OF_MEANS = 1e-3
"""The same for means: their sums come in another order, and a last bit that differs is one of eight."""
RULES = ("threshold", "top_p", "top_k")
NUM_RANDOM = 400


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The three kernels as functions of a case; each gives kept keys `bool[B, N, R, S]` and counts."""

    exact_mask: Callable
    exact_mass: Callable
    mean_mask: Callable


def unpacked(scored: Scored, result) -> tuple[np.ndarray, np.ndarray]:
    bits, counts = (np.asarray(x) for x in result[:2])
    kept = unpack(bits, scored.key.shape[1])
    np.testing.assert_array_equal(counts, kept.sum(-1))
    return kept, counts


def rule_of(budget: Budget, num_keys: int) -> EmulatedRule:
    (rule,) = [i for i, rule in enumerate(RULES) if getattr(budget, rule) is not None]
    value = 0.0 if rule == 2 else getattr(budget, RULES[rule])
    most = num_keys if budget.max_keys is None else budget.max_keys
    return EmulatedRule(rule, value, budget.top_k or 0, budget.min_keys, most, budget.head_floor)


def select_rule(budget: Budget) -> masks.SelectRule:
    names = (*RULES, "min_keys", "max_keys", "head_floor")
    return masks.SelectRule(**{name: getattr(budget, name) for name in names})


def emulated(emulator: Emulator) -> Kernels:
    def sizes(scored: Scored):
        return {"scale": scored.scale, "query_block": scored.query_block, "num_sms": 2, "seed": 1}

    def exact_mask(scored, limits, *, keep_best=False):
        result = emulator.exact_mask(*scored.arrays, limits, scored.order, keep_best=keep_best, **sizes(scored))
        return unpacked(scored, result)

    def exact_mass(scored, budget, *, heads=None):
        rule, heads = rule_of(budget, scored.key.shape[1]), heads or scored.query.shape[0] * scored.query.shape[2]
        result = emulator.exact_mass(*scored.arrays, scored.order, rule, workspace_heads=heads, **sizes(scored))
        return unpacked(scored, result)

    def mean_mask(scored, keep, *, num_means=1, keep_best=False, heads=None):
        keep = rule_of(keep, scored.key.shape[1]) if isinstance(keep, Budget) else keep
        heads = heads or scored.query.shape[0] * scored.query.shape[2]
        how = {"num_means": num_means, "keep_best": keep_best, "workspace_heads": heads}
        return unpacked(
            scored, emulator.mean_mask(scored.query, scored.key, keep, scored.order, **how, **sizes(scored))
        )

    return Kernels(exact_mask, exact_mass, mean_mask)


def on_gpu() -> Kernels:
    def sizes(scored: Scored):
        return {"scale": jnp.float32(scored.scale), "query_block": scored.query_block}

    def exact_mask(scored, limits, *, keep_best=False):
        arrays = *map(jnp.asarray, scored.arrays), jnp.asarray(limits), scored.order
        return unpacked(scored, masks.exact_mask(*arrays, keep_best=keep_best, **sizes(scored)))

    def exact_mass(scored, budget, *, heads=None):
        rule = select_rule(budget)
        room = {} if heads is None else {"workspace_bytes": 4 * heads * (32 * scored.num_words * scored.num_rows + 4)}
        arrays = *map(jnp.asarray, scored.arrays), scored.order
        return unpacked(scored, masks.exact_mass(*arrays, rule, **sizes(scored), **room))

    def mean_mask(scored, keep, *, num_means=1, keep_best=False, heads=None):
        keep = select_rule(keep) if isinstance(keep, Budget) else jnp.asarray(keep)
        arrays = jnp.asarray(scored.query), jnp.asarray(scored.key), keep, scored.order
        how = {"num_means": num_means, "keep_best": keep_best}
        how |= {} if heads is None else {"workspace_bytes": 4 * heads * (16 * scored.num_words * scored.num_rows + 4)}
        return unpacked(scored, masks.mean_mask(*arrays, **how, **sizes(scored)))

    return Kernels(exact_mask, exact_mass, mean_mask)


@pytest.fixture(params=["emulated", pytest.param("masks", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return on_gpu() if request.param == "masks" else emulated(request.getfixturevalue("emulator"))


CASES = {
    "plain": {"num_queries": 300, "num_keys": 500},
    "one_of_each": {"num_queries": 1, "num_keys": 1, "query_block": 64},
    "rows_of_64": {"num_queries": 300, "num_keys": 1300, "query_block": 64, "heads": (3, 3), "ordered": True},
    "wide": {"num_queries": 300, "num_keys": 600, "head_dim": 128, "dtype": "float16", "batch": 2, "ordered": True},
    "wide_rows_of_64": {"num_queries": 129, "num_keys": 127, "head_dim": 128, "query_block": 64, "heads": (4, 2)},
    "negative_scale": {"num_queries": 65, "num_keys": 129, "scale": -0.2},
    "scale_0": {"num_queries": 65, "num_keys": 129, "scale": 0.0},
    "queries_that_are_none": {"num_queries": 140, "num_keys": 200, "query_block": 64, "empty": range(30, 129)},
    "many_keys": {"num_queries": 40, "num_keys": 2500, "query_block": 64, "heads": (1, 1)},
}
by_case = pytest.mark.parametrize("name", CASES)


def assert_above(kept, scores, thresholds, near=NEAR):
    """`scores > thresholds`, but for those that lie at the threshold, and few do."""
    limits = np.asarray(thresholds)[:, None, None]
    with np.errstate(divide="ignore"):
        at_limit = np.abs(np.log(scores / limits)) < near
    assert not ((kept != (scores > limits)) & ~at_limit).any()
    assert at_limit.sum() <= max(2, 0.01 * at_limit.size)


def assert_best(kept, masses, budget: Budget):
    """The best keys, as many as the budget says, but for masses that are equal up to rounding."""
    scores = np.where(np.isnan(masses), np.inf, masses)
    least, most = np.where(kept, scores, np.inf).min(-1), np.where(kept, -np.inf, scores).max(-1)
    assert (least >= most * (1 - NEAR) - 1e-12).all()
    if budget.top_p is not None:
        total, some = masses.sum(-1), masses.sum(-1) > 0
        share = (kept * masses).sum(-1)[some] / total[some]
        assert (share >= budget.top_p - 1e-5).all()
        if budget.head_floor == 0 and budget.max_keys is None:
            ranked = np.cumsum(-np.sort(-masses, axis=-1), axis=-1)
            fewest = (ranked < (budget.top_p - 1e-5) * total[..., None]).sum(-1) + 1
            more = (ranked < (budget.top_p + 1e-5) * total[..., None]).sum(-1) + 1
            counts = kept.sum(-1)
            assert ((counts >= np.maximum(fewest, budget.min_keys)) & (counts <= np.maximum(more, budget.min_keys)))[
                some
            ].all()
    if budget.top_k is not None:
        assert (kept.sum(-1) == min(budget.top_k, kept.shape[-1])).all()


@by_case
@pytest.mark.parametrize("share", [0.5, 30.0])
def test_the_exact_mask_is_that_of_float64(kernels, name, share):
    scored = make(**CASES[name], seed=len(name))
    thresholds = share / scored.key.shape[1] * np.linspace(0.5, 1, scored.query.shape[2])
    kept, _ = kernels.exact_mask(scored, np.log(thresholds).astype(np.float32))
    assert_above(kept, scored.of_rows(np.max), thresholds)


@pytest.mark.parametrize("name", ["plain", "queries_that_are_none", "wide"])
def test_rows_that_keep_nothing_keep_their_best_key(kernels, name):
    scored = make(**CASES[name])
    kept, counts = kernels.exact_mask(scored, np.zeros(scored.query.shape[2], np.float32), keep_best=True)
    peaks = scored.of_rows(np.max)
    assert (counts == 1).all()
    np.testing.assert_allclose((kept * peaks).sum(-1), peaks.max(-1), rtol=1e-5)
    none = peaks.max(-1) == 0
    assert none.any() == (name == "queries_that_are_none")
    assert kept[none][:, 0].all()


@pytest.mark.parametrize("where", ["key", "query", "lse"])
def test_nan_is_kept_by_the_rows_it_touches_and_no_others(kernels, where):
    scored = make(**CASES["rows_of_64"])
    limits = np.full(3, np.log(30.0 / 1300), np.float32)
    expected, _ = kernels.exact_mask(scored, limits)
    query, key, lse = (x.copy() for x in scored.arrays)
    {"key": key[0, 700, 1], "query": query[0, 77, 1], "lse": lse[0, 1, 77:78]}[where][...] = np.nan
    kept, _ = kernels.exact_mask(dataclasses.replace(scored, query=query, key=key, lse=lse), limits)
    row = int(np.flatnonzero(scored.order[0, 1] == 77)[0]) // 64
    expected[(0, 1, slice(None), 700) if where == "key" else (0, 1, row)] = True
    np.testing.assert_array_equal(kept, expected)


BUDGETS = {
    "top_p": Budget(top_p=0.9),
    "top_p_of_all": Budget(top_p=1.0),
    "top_k": Budget(top_k=37),
    "threshold": Budget(threshold=0.2, min_keys=3, max_keys=20),
    "head_floor": Budget(top_p=0.6, min_keys=9, head_floor=0.9),
    "empty_rows": Budget(threshold=1e6, min_keys=0),
}


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("rows_of_64", "wide", "scale_0")]  # in the emulation


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=list(BUDGETS))
@pytest.mark.parametrize("name", ["plain", *LONG, "queries_that_are_none", "many_keys"])
def test_the_keys_of_most_mass_are_kept(kernels, name, budget):
    scored = make(**CASES[name], seed=7)
    kept, counts = kernels.exact_mass(scored, budget)
    masses = scored.of_rows(np.sum)
    if budget.threshold is None:
        assert_best(kept, masses, budget)
    else:
        wanted = np.minimum(
            np.maximum((masses > budget.threshold).sum(-1), budget.min_keys), budget.max_keys or 1 << 30
        )
        near = (np.abs(masses / budget.threshold - 1) < NEAR).any(-1)
        assert ((counts == wanted) | near).all()
        assert_best(kept, masses, Budget(threshold=0.0))


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=list(BUDGETS))
@pytest.mark.parametrize("name", ["plain", *LONG, "queries_that_are_none", "many_keys"])
def test_masses_are_those_of_float64_and_the_selection_is_that_of_xla(emulator, name, budget):
    scored = make(**CASES[name], seed=7)
    num_keys, num_heads = scored.key.shape[1], scored.query.shape[2]
    bits, _, masses = emulator.exact_mass(
        *scored.arrays, scored.order, rule_of(budget, num_keys), scale=scored.scale, query_block=scored.query_block,
        workspace_heads=num_heads, num_sms=2, seed=3,
    )  # fmt: skip
    kept = unpack(bits, num_keys)[-1]  # the workspace holds the masses of the last heads
    assert not masses[..., num_keys:].any()
    masses = masses[..., :num_keys]
    np.testing.assert_allclose(masses, scored.of_rows(np.sum)[-1], rtol=2e-5, atol=1e-6)
    queries = np.minimum(scored.query_block, scored.query.shape[1] - scored.query_block * np.arange(kept.shape[1]))
    for head in range(num_heads):
        scores, floor = jnp.asarray(masses[head]), None
        if budget.head_floor:
            counted = np.asarray(_select.rule_counts(scores, budget))
            floor = jnp.int32(np.floor(np.float32(budget.head_floor * (counted * queries).sum() / queries.sum())))
        wanted = np.asarray(_select.select(scores, budget, floor))
        if budget.top_p is None:
            np.testing.assert_array_equal(kept[head], wanted)
        else:  # sums in another order: a key more or less where the share is met to the last bit
            assert (np.abs(kept[head].sum(-1) - wanted.sum(-1)) <= 1).all()


def test_heads_are_done_in_turns_where_the_workspace_holds_few(kernels):
    scored, budget = make(300, 700, heads=(3, 3), seed=2), Budget(top_p=0.8, head_floor=0.5)
    whole, turns = (kernels.exact_mass(scored, budget, heads=heads)[0] for heads in (3, 2))
    np.testing.assert_array_equal(whole, turns)


@pytest.mark.parametrize("budget", [Budget(top_k=99), Budget(top_p=0.7, head_floor=0.8)], ids=["top_k", "head_floor"])
def test_means_of_several_heads_are_ranked_as_those_of_one(kernels, budget):
    scored = make(300, 700, heads=(6, 3), batch=2, query_block=64, ordered=True, seed=4)
    whole, some, one = (kernels.mean_mask(scored, budget, num_means=2, heads=heads)[0] for heads in (12, 5, 1))
    np.testing.assert_array_equal(whole, some)
    np.testing.assert_array_equal(whole, one)
    assert_best_of_means(whole, whole.sum(-1), mean_scores(scored, 2), budget)


@by_case
@pytest.mark.parametrize("num_means", [1, 4])
def test_the_mask_of_mean_queries_is_that_of_float64(kernels, name, num_means):
    scored = make(**CASES[name], seed=len(name) + 1)
    thresholds = 0.9 / scored.key.shape[1] * np.linspace(0.9, 1, scored.query.shape[2])
    kept, _ = kernels.mean_mask(scored, np.log(thresholds).astype(np.float32), num_means=num_means)
    assert_above(kept, mean_scores(scored, num_means), thresholds, near=NEAR_OF_MEANS)


@pytest.mark.parametrize("num_means", [1, 2])
@pytest.mark.parametrize("name", ["plain", "wide"])
def test_means_that_keep_nothing_keep_their_best_key(kernels, name, num_means):
    scored = make(**CASES[name])
    limits = np.zeros(scored.query.shape[2], np.float32)
    kept, counts = kernels.mean_mask(scored, limits, num_means=num_means, keep_best=True)
    assert (counts == 1).all()
    scores = mean_scores(scored, num_means)
    np.testing.assert_allclose((kept * scores).sum(-1), scores.max(-1), rtol=1e-4)


MEAN_BUDGETS = {
    "top_p": Budget(top_p=0.9),
    "top_p_of_all": Budget(top_p=1.0),
    "top_k": Budget(top_k=37),
    "threshold": Budget(threshold=0.002, min_keys=3, max_keys=200),
    "head_floor": Budget(top_p=0.6, min_keys=9, head_floor=0.9),
    "empty_rows": Budget(threshold=0.999, min_keys=0, max_keys=7),
}


@pytest.mark.parametrize("num_means", [1, 8])
@pytest.mark.parametrize("budget", MEAN_BUDGETS.values(), ids=list(MEAN_BUDGETS))
@pytest.mark.parametrize("name", ["plain", *LONG, "many_keys"])
def test_the_best_keys_of_mean_queries_are_kept(kernels, name, budget, num_means):
    scored = make(**CASES[name], seed=3)
    assert_best_of_means(
        *kernels.mean_mask(scored, budget, num_means=num_means), mean_scores(scored, num_means), budget
    )


def assert_best_of_means(kept, counts, scores, budget: Budget):
    """The best keys of probabilities that were rounded down to 10 bits of mantissa, as many as the budget says."""
    least, most = np.where(kept, scores, np.inf).min(-1), np.where(kept, -np.inf, scores).max(-1)
    assert (least >= most * (1 - 2**-10 - NEAR_OF_MEANS)).all()
    fewest = np.full(counts.shape, budget.min_keys)
    most_keys = fewest
    if budget.top_k is not None:
        fewest = most_keys = np.full(counts.shape, min(budget.top_k, scores.shape[-1]))
    elif budget.top_p is not None:
        assert ((kept * scores).sum(-1) >= min(budget.top_p, 1 - 1e-6)).all()
        ranked = np.cumsum(-np.sort(-scores, axis=-1), axis=-1)
        shares = budget.top_p - 1e-5, budget.top_p / (1 - 2**-10) + 1e-5
        fewest, most_keys = (np.minimum((ranked < share).sum(-1) + 1, scores.shape[-1]) for share in shares)
    else:
        threshold = np.asarray(budget.threshold, np.float64)
        limits = threshold * (1 + NEAR_OF_MEANS), threshold * (1 - 2**-10 - NEAR_OF_MEANS)
        fewest, most_keys = ((scores > limit).sum(-1) for limit in limits)
        fewest = (scores > threshold * (1 + 2**-9)).sum(-1)
    cap = scores.shape[-1] if budget.max_keys is None else budget.max_keys
    fewest = np.minimum(np.maximum(fewest, budget.min_keys), cap)
    most_keys = np.minimum(np.maximum(most_keys, budget.min_keys), cap)
    if budget.head_floor:
        floors = counts.min(-1)
        assert (floors >= np.floor(budget.head_floor * fewest.mean(-1) * 0.9)).all()
        most_keys = np.maximum(most_keys, floors[..., None])
    assert ((counts >= fewest) & (counts <= most_keys)).all()


MANY = 9001  # keys: more than are listed at once, so that a sample of them says where the cut lies


def not_sampled(num_words: int, num_sampled: int) -> np.ndarray:
    """Words of a row that select_bracket.cuh does not look at when it samples."""
    stretch = np.arange(num_sampled, dtype=np.int64)
    first, behind = stretch * num_words // num_sampled, (stretch + 1) * num_words // num_sampled
    hashed = (stretch * 2654435761 % 2**32) >> 16
    left = np.ones(num_words, bool)
    left[first + (hashed * (behind - first) >> 16)] = False
    return np.flatnonzero(left)


def not_sampled_for_bands() -> np.ndarray:
    """Keys of a row of `MANY` that mean_sums_kernel leaves in no sample (`take_sample` of mean_kernel.cuh)."""
    tile, lane = np.divmod(np.arange(MANY // 128 * 4, dtype=np.int64), 4)
    choice = (tile * 2654435761 % 2**32) >> (20 + 2 * lane)
    near = np.where(choice % 2 == 1, 8, 49)
    far = np.where(choice // 2 % 2 == 1, 88, 97)
    first = 128 * tile + 2 * lane
    left = np.ones(MANY, bool)
    left[np.concatenate([first + near, first + far])] = False
    return np.flatnonzero(left)


def rows_of_scores() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    plain, heavy = rng.standard_normal(MANY), rng.standard_normal(MANY)
    heavy[[17, 5000]] = 9, 11
    # Keys that the sample misses: the guess must be found wrong, from above and from below.
    keys_missed, words_missed = not_sampled(MANY, 2048), not_sampled((MANY + 1) // 2, 1024)
    high, low = plain / 4, plain / 4
    high[keys_missed] += 5
    low[keys_missed] -= 5
    high[np.minimum(2 * words_missed + 1, MANY - 1)] += 2
    bands_high, bands_low = plain / 4, plain / 4
    bands_high[not_sampled_for_bands()] += 2
    bands_low[not_sampled_for_bands()] -= 2
    return {
        "plain": 2 * plain,
        "narrow": plain / 100,
        "sorted": np.sort(2 * plain),
        "falling": -np.sort(2 * plain),
        "all_equal": np.zeros(MANY),
        "two_values": np.where(rng.random(MANY) < 0.3, 1.0, 0.0),
        "periodic": 3 * np.sin(np.arange(MANY) * 2 * np.pi / 16),
        "two_keys_hold_most": heavy,
        "missed_keys_are_high": high,
        "missed_keys_are_low": low,
        "keys_missed_for_bands_are_high": bands_high,
        "keys_missed_for_bands_are_low": bands_low,
    }


ROWS = rows_of_scores()
ROW_BUDGETS = {
    "few": Budget(top_k=30),
    "half": Budget(top_k=MANY // 2),
    "nearly_all": Budget(top_k=MANY - 2),
    "most_mass": Budget(top_p=0.9),
    "all_mass_but_some": Budget(top_p=0.999),
    "mass_with_a_cap": Budget(top_p=0.9, max_keys=100),
    "mass_with_a_floor": Budget(top_p=0.1, min_keys=8500),
    "threshold_with_a_floor": Budget(threshold=1e-3, min_keys=700),
}


# In the emulation: what asks for one look, for more, or for none but ties; the rest is slow.
QUICK_ROWS = ("narrow", "all_equal", "missed_keys_are_high", "keys_missed_for_bands_are_low")
QUICK_BUDGETS = ("half", "most_mass", "mass_with_a_floor")
ROW_CASES = [
    pytest.param(row, budget, marks=() if row in QUICK_ROWS and budget in QUICK_BUDGETS else pytest.mark.slow)
    for row in ROWS
    for budget in ROW_BUDGETS
]


@pytest.mark.parametrize(("name", "budget"), ROW_CASES)
def test_the_cut_is_found_wherever_the_best_keys_lie(kernels, name, budget):
    scored, budget = one_row(ROWS[name]), ROW_BUDGETS[budget]
    masses, scores = scored.of_rows(np.sum)[0, 0, 0], scored.key[0, :, 0, 0].astype(np.float64)
    for kept, counts in (kernels.exact_mass(scored, budget), kernels.mean_mask(scored, budget)):
        assert counts.shape == (1, 1, 1)
        kept, (count,) = kept[0, 0, 0], counts[0, 0]
        # 10 bits of mantissa in a ranked mean: what is closer than that may change places.
        assert scores[kept].min() >= scores[~kept].max(initial=-np.inf) - 2**-10 - NEAR_OF_MEANS
        for score in np.unique(scores)[:50] if name != "two_values" else np.unique(scores):
            equal = kept[scores == score]
            assert (np.diff(equal.astype(int)) <= 0).all(), "of equal keys the first ones are kept"
        if budget.top_k is not None:
            assert count == budget.top_k
            continue
        if budget.top_p is None:
            wanted = int((masses > budget.threshold).sum()), int((masses * (1 + 2e-3) > budget.threshold).sum())
        else:
            ranked = np.cumsum(-np.sort(-masses))
            shares = budget.top_p - 1e-5, budget.top_p / (1 - 2**-10) + 1e-5
            wanted = tuple(min(int((ranked < share).sum()) + 1, MANY) for share in shares)
        most = MANY if budget.max_keys is None else budget.max_keys
        fewest, most = (min(max(number, budget.min_keys), most) for number in wanted)
        assert fewest <= count <= most


@pytest.mark.parametrize(
    ("name", "budget", "flagged"),
    [
        *(
            (name, budget, 0)
            for name in ("plain", "narrow", "two_keys_hold_most")
            for budget in ("half", "few", "most_mass", "all_mass_but_some", "mass_with_a_cap", "mass_with_a_floor")
        ),
        ("all_equal", "half", 1),
        ("all_equal", "most_mass", 1),
        ("keys_missed_for_bands_are_high", "few", 1),
        ("keys_missed_for_bands_are_low", "half", 1),
        ("keys_missed_for_bands_are_low", "most_mass", 1),
    ],
)
def test_the_cut_lies_among_candidates_unless_the_sample_misleads(emulator, name, budget, flagged):
    scored = one_row(ROWS[name])
    sizes = {"scale": scored.scale, "query_block": scored.query_block, "num_sms": 2, "seed": 1}
    rule = rule_of(ROW_BUDGETS[budget], MANY)
    *_, workspace = emulator.mean_mask(scored.query, scored.key, rule, scored.order, **sizes)
    assert workspace[-1] == flagged


@pytest.mark.parametrize(
    ("head_dim", "dtype", "query_block"),
    [(64, "bfloat16", 64), pytest.param(128, "float16", 128, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("budget", [Budget(top_k=1290), Budget(top_p=0.8)], ids=["top_k", "top_p"])
def test_candidates_of_all_heads(kernels, head_dim, dtype, query_block, budget):
    how = {"head_dim": head_dim, "dtype": dtype, "query_block": query_block, "ordered": True, "scale": head_dim**-0.5}
    scored = make(query_block + 9, 4300, heads=(2, 1), batch=2, seed=6, **how)
    kept, counts = kernels.mean_mask(scored, budget, heads=3)  # in two turns
    assert_best_of_means(kept, counts, mean_scores(scored), budget)


@pytest.mark.parametrize("num_keys", [700, MANY])
def test_a_nan_ranks_first_and_a_share_of_it_is_everything(kernels, num_keys):
    scored = one_row(np.random.default_rng(3).standard_normal(num_keys))
    scored.key[0, 77, 0, 0] = np.nan
    best, share = Budget(top_k=30), Budget(top_p=0.5)
    kept, _ = kernels.exact_mass(scored, best)
    others = np.delete(np.arange(num_keys), 77)
    least = np.sort(scored.probabilities[0, 0, 0, others])[-29]
    assert kept[0, 0, 0, 77]
    assert (kept[0, 0, 0, others] == (scored.probabilities[0, 0, 0, others] >= least)).all()
    assert kernels.exact_mass(scored, share)[0].all()
    # The LSE of a mean is that of all keys: each of its probabilities is NaN.
    kept, _ = kernels.mean_mask(scored, best)
    np.testing.assert_array_equal(np.flatnonzero(kept), np.arange(30))
    assert kernels.mean_mask(scored, share)[0].all()


def test_a_nan_shows_in_the_rows_whose_means_hold_it(kernels):
    scored, limits = make(**CASES["rows_of_64"]), np.full(3, np.log(1.2 / 1300), np.float32)
    expected, _ = kernels.mean_mask(scored, limits)
    query = scored.query.copy()
    query[0, 77, 1, 3] = np.nan
    kept, _ = kernels.mean_mask(dataclasses.replace(scored, query=query), limits)
    expected[0, 1, int(np.flatnonzero(scored.order[0, 1] == 77)[0]) // 64] = True
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["masks"])
@pytest.mark.parametrize("number", range(NUM_RANDOM))
def test_random_calls_match_float64(kernel, number):
    rng = np.random.default_rng([20261121, number])
    kv_heads = int(rng.integers(1, 4))
    scored = make(
        int(np.exp(rng.uniform(0, np.log(900)))), int(np.exp(rng.uniform(0, np.log(3000)))),
        heads=(kv_heads * int(rng.integers(1, 3)), kv_heads), head_dim=int(rng.choice([64, 128])),
        query_block=int(rng.choice([64, 128])), dtype=str(rng.choice(["bfloat16", "float16"])),
        batch=int(rng.integers(1, 3)), ordered=bool(rng.integers(2)), scale=float(rng.choice([0.125, 0.02, 0.3, -0.1])),
        seed=number,
    )  # fmt: skip
    gpu, num_keys, num_heads = on_gpu(), scored.key.shape[1], scored.query.shape[2]
    thresholds = float(rng.choice([0.5, 5.0, 50.0])) / num_keys * np.linspace(0.7, 1, num_heads)
    limits = np.log(thresholds).astype(np.float32)
    assert_above(gpu.exact_mask(scored, limits)[0], scored.of_rows(np.max), thresholds)
    num_means = int(rng.choice([1, 1, 2, 4, 8]))
    means = mean_scores(scored, num_means)
    assert_above(gpu.mean_mask(scored, limits, num_means=num_means)[0], means, thresholds, near=NEAR_OF_MEANS)
    budget = Budget(top_p=float(rng.choice([0.3, 0.9, 0.99]))) if rng.integers(2) else Budget(top_k=1 + num_keys // 3)
    assert_best(gpu.exact_mass(scored, budget)[0], scored.of_rows(np.sum), budget)
    assert_best_of_means(*gpu.mean_mask(scored, budget, num_means=num_means), means, budget)
    if number % 50 == 49:
        jax.clear_caches()


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["masks"])
@pytest.mark.parametrize(
    "predictor",
    [
        ExactPredictor(128, budget=Budget(threshold=0.01, keep=range(-5, 0))),
        ExactPredictor(64, statistic="mass", budget=Budget(top_k=77, keep=(0, 3))),
        ExactPredictor(128, statistic="mass"),
        MeanQueryPredictor(128, budget=Budget(threshold=0.002)),
        MeanQueryPredictor(64, num_means=4, budget=Budget(top_p=0.8, min_keys=20, head_floor=0.5, keep=(1, 2))),
        MeanQueryPredictor(128, budget=Budget(top_k=200)),
    ],
    ids=["peak", "mass_top_k", "mass", "mean", "mean_top_p", "mean_top_k"],
)
def test_predictors_take_the_kernels_and_xla_makes_nearly_the_same_mask(kernel, predictor, monkeypatch):
    from fgattn_jax.predictors import _hopper

    scored = make(700, 900, head_dim=128, heads=(4, 2), query_block=predictor.query_block, seed=5)
    arrays = [jnp.asarray(x) for x in scored.arrays[: 3 if predictor.needs_lse else 2]]
    found = predictor(*arrays)
    assert "fgattn_" in jax.jit(lambda *x: predictor(*x).bits).lower(*arrays).as_text()
    monkeypatch.setattr(_hopper, "_runs_here", lambda *arguments: False)
    jax.clear_caches()
    expected = predictor(*arrays)
    differing = int(jax.lax.population_count(found.bits ^ expected.bits).sum())
    # Ranked means have 10 bits of mantissa.
    share = 3e-3 if isinstance(predictor, MeanQueryPredictor) else 2e-4
    assert differing <= share * scored.probabilities.shape[1] * expected.bits.shape[2] * 900
    assert (found.counts() >= 1).all()
