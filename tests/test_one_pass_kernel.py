"""The CUDA kernel that attends and finds a mask, against float64: emulated on a CPU, and on a GPU (`-m gpu`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_emulation.calls import Call, assert_right
from cuda_emulation.emulator import Emulator, Forward
from mask_cases import Scored, make, unpack
from test_mask_kernels import CASES, assert_above

from fgattn_jax import attention_with_lse
from fgattn_jax.predictors import Budget, ExactPredictor, one_pass_refresh
from fgattn_jax.xla_ffi import one_pass

NUM_RANDOM = 150


@dataclasses.dataclass(frozen=True)
class Found:
    """What a call gives; `kept` is `bool[B, N, R, S]`."""

    kept: np.ndarray
    counts: np.ndarray
    output: np.ndarray
    lse: np.ndarray


def values_of(scored: Scored, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(scored.key.shape).astype(scored.key.dtype)


def emulated(emulator: Emulator):
    def run(scored, limits, *, keep_best=False, value=None, seed=1):
        value = values_of(scored) if value is None else value
        result = emulator.one_pass(
            scored.query, scored.key, value, scored.lse, limits, scored.order,
            scale=scored.scale, query_block=scored.query_block, keep_best=keep_best, num_sms=2, seed=seed,
        )  # fmt: skip
        return Found(unpack(result.bits, scored.key.shape[1]), result.counts, result.output, result.lse)

    return run


def on_gpu():
    def run(scored, limits, *, keep_best=False, value=None, seed=1):
        del seed
        value = values_of(scored) if value is None else value
        arrays = *map(jnp.asarray, (scored.query, scored.key, value, scored.lse, limits)), scored.order
        sizes = {"scale": scored.scale, "query_block": scored.query_block, "keep_best": keep_best}
        output, lse, bits, counts = map(np.asarray, one_pass.attention_and_mask(*arrays, **sizes))
        return Found(unpack(bits, scored.key.shape[1]), counts, output, lse)

    return run


@pytest.fixture(params=["emulated", pytest.param("masks", marks=pytest.mark.gpu)])
def kernel(request: pytest.FixtureRequest):
    return on_gpu() if request.param == "masks" else emulated(request.getfixturevalue("emulator"))


POSITIVE = {name: case for name, case in CASES.items() if case.get("scale", 1) >= 0}
ONE_PASS = POSITIVE | {
    "one_key_more_than_tiles": {"num_queries": 65, "num_keys": 97, "head_dim": 128},
    "whole_tiles": {"num_queries": 128, "num_keys": 768, "head_dim": 128, "heads": (1, 1)},
    "whole_batches": {"num_queries": 192, "num_keys": 2048, "query_block": 64, "heads": (1, 1)},
}


def assert_dense(scored: Scored, found: Found, value=None) -> None:
    """Output and LSE are those of dense attention, whatever the LSE that was given."""
    rows = np.ones((1, 1, scored.num_rows, scored.key.shape[1]), bool)
    value = values_of(scored) if value is None else value
    call = Call(scored.query, scored.key, value, rows, scored.query_block, scored.order, scored.scale)
    assert_right(call, Forward(found.output, found.lse, 0))


def limits_of(scored: Scored, share: float) -> tuple[np.ndarray, np.ndarray]:
    thresholds = share / scored.key.shape[1] * np.linspace(0.5, 1, scored.query.shape[2])
    return thresholds, np.log(thresholds).astype(np.float32)


@pytest.mark.parametrize("name", ONE_PASS)
@pytest.mark.parametrize("share", [0.5, 30.0])
def test_attention_is_dense_and_the_mask_that_of_float64(kernel, name, share):
    scored = make(**ONE_PASS[name], seed=len(name))
    thresholds, limits = limits_of(scored, share)
    found = kernel(scored, limits)
    assert_above(found.kept, scored.of_rows(np.max), thresholds)
    np.testing.assert_array_equal(found.counts, found.kept.sum(-1))
    assert_dense(scored, found)


def test_the_lse_of_another_step_moves_the_threshold(kernel):
    scored = make(**CASES["rows_of_64"])
    shift = np.random.default_rng(0).uniform(-1, 1, scored.lse.shape).astype(np.float32)
    earlier = dataclasses.replace(
        scored,
        lse=scored.lse + shift,
        probabilities=scored.probabilities * np.exp(-shift.astype(np.float64))[..., None],
    )
    thresholds, limits = limits_of(scored, 30.0)
    found = kernel(earlier, limits)
    assert_above(found.kept, earlier.of_rows(np.max), thresholds)
    assert (found.kept != kernel(scored, limits).kept).mean() > 0.01
    assert_dense(scored, found)


@pytest.mark.parametrize("name", ["rows_of_64", "wide"])
@pytest.mark.parametrize("shift", [-300.0, -40.0, 40.0, 300.0])
def test_an_lse_far_from_the_steps_own_changes_the_mask_alone(kernel, name, shift):
    """Weights measured from the threshold would be too large or too small: scores are compared instead."""
    scored = make(**CASES[name])
    earlier = dataclasses.replace(
        scored, lse=np.where(np.isinf(scored.lse), scored.lse, scored.lse + np.float32(shift))
    )
    _, limits = limits_of(scored, 30.0)
    found = kernel(earlier, limits)
    assert found.kept.all() if shift < 0 else not found.kept.any()
    assert_dense(scored, found)


@pytest.mark.parametrize("name", ["plain", "queries_that_are_none", "wide"])
def test_rows_that_keep_nothing_keep_their_best_key(kernel, name):
    scored = make(**CASES[name])
    found = kernel(scored, np.zeros(scored.query.shape[2], np.float32), keep_best=True)
    peaks = scored.of_rows(np.max)
    assert (found.counts == 1).all()
    np.testing.assert_array_equal(found.kept.sum(-1), 1)
    np.testing.assert_allclose((found.kept * peaks).sum(-1), peaks.max(-1), rtol=1e-5)
    assert found.kept[peaks.max(-1) == 0][:, 0].all()


@pytest.mark.parametrize("where", ["key", "query", "lse"])
def test_nan_is_kept_by_the_rows_it_touches_and_no_others(kernel, where):
    scored = make(**CASES["rows_of_64"])
    _, limits = limits_of(scored, 30.0)
    expected = kernel(scored, limits).kept
    query, key, lse = (x.copy() for x in scored.arrays)
    {"key": key[0, 700, 1], "query": query[0, 77, 1], "lse": lse[0, 1, 77:78]}[where][...] = np.nan
    found = kernel(dataclasses.replace(scored, query=query, key=key, lse=lse), limits)
    row = int(np.flatnonzero(scored.order[0, 1] == 77)[0]) // 64
    expected[(0, 1, slice(None), 700) if where == "key" else (0, 1, row)] = True
    np.testing.assert_array_equal(found.kept, expected)
    of_head = np.isnan(found.output[0, :, 1]).all(-1)
    np.testing.assert_array_equal(of_head, {"key": True, "query": np.arange(300) == 77, "lse": False}[where])


def test_rows_whose_queries_count_as_nothing_keep_nothing_even_of_a_key_that_is_nan(kernel):
    scored = make(**CASES["queries_that_are_none"])  # row 1 of 64 queries
    key = scored.key.copy()
    key[:, 5] = np.nan
    found = kernel(dataclasses.replace(scored, key=key), np.full(2, -30.0, np.float32))
    assert not found.kept[:, :, 1].any()
    assert found.kept[:, :, [0, 2]].all()


def test_infinite_values_of_the_last_key_show_as_they_are(kernel):
    scored = make(**CASES["plain"])
    value = values_of(scored)
    value[:, -1] = np.inf
    found = kernel(scored, np.zeros(2, np.float32), value=value)
    assert np.isposinf(found.output.astype(np.float32)).all()


@pytest.mark.parametrize("name", ["plain", "wide"])
def test_scores_far_above_those_of_the_first_tile_are_compared_too(kernel, name):
    """The first tile holds the last keys; a row's maximum then rises by more than a weight may."""
    scored = make(**CASES[name], scale=0.125 if name == "wide" else 0.5)
    key = scored.key.copy()
    key[:, : key.shape[1] // 2] *= 40
    raised = dataclasses.replace(scored, key=key)
    wide = np.repeat(key.astype(np.float64), scored.query.shape[2] // key.shape[2], axis=2)
    scores = np.einsum("btnh,bsnh->bnts", scored.query.astype(np.float64), wide) * scored.scale
    lse = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
    raised = dataclasses.replace(
        raised, lse=np.ascontiguousarray(lse, np.float32), probabilities=np.exp(scores - lse[..., None])
    )
    found = kernel(raised, np.full(scored.query.shape[2], -3.0, np.float32))
    peaks = raised.of_rows(np.max)
    with np.errstate(divide="ignore"):
        near = np.abs(np.log(peaks) + 3) < 1e-3  # scores of hundreds round to this
    assert not ((found.kept != (peaks > np.exp(-3))) & ~near).any()
    assert near.mean() < 0.01
    assert_dense(raised, found)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_things_happen_changes_nothing(emulator, seed):
    scored = make(500, 2100, heads=(1, 1), head_dim=128, seed=3)
    _, limits = limits_of(scored, 30.0)
    run = emulated(emulator)
    np.testing.assert_array_equal(run(scored, limits, seed=10 + seed).kept, run(scored, limits, seed=1).kept)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["masks"])
@pytest.mark.parametrize("number", range(NUM_RANDOM))
def test_random_calls_of_one_pass_match_float64(kernel, number):
    rng = np.random.default_rng([20261122, number])
    kv_heads = int(rng.integers(1, 4))
    scored = make(
        int(np.exp(rng.uniform(0, np.log(900)))), int(np.exp(rng.uniform(0, np.log(3000)))),
        heads=(kv_heads * int(rng.integers(1, 3)), kv_heads), head_dim=int(rng.choice([64, 128])),
        query_block=int(rng.choice([64, 128])), dtype=str(rng.choice(["bfloat16", "float16"])),
        batch=int(rng.integers(1, 3)), ordered=bool(rng.integers(2)), scale=float(rng.choice([0.125, 0.02, 0.3])),
        seed=number,
    )  # fmt: skip
    thresholds, limits = limits_of(scored, float(rng.choice([0.5, 5.0, 50.0])))
    found = on_gpu()(scored, limits)
    assert_above(found.kept, scored.of_rows(np.max), thresholds)
    np.testing.assert_array_equal(found.counts, found.kept.sum(-1))
    assert_dense(scored, found)
    if number % 50 == 49:
        jax.clear_caches()


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["masks"])
@pytest.mark.parametrize("scale", [0.125, -0.1])
def test_one_pass_and_two_make_nearly_the_same_on_a_gpu(kernel, scale, monkeypatch):
    from fgattn_jax.predictors import _hopper

    scored = make(700, 900, head_dim=128, heads=(4, 2), seed=5, scale=scale)
    predictor = ExactPredictor(128, budget=Budget(threshold=0.01, keep=range(-5, 0)))
    arrays = [jnp.asarray(x) for x in (scored.query, scored.key, values_of(scored), scored.lse)]
    found = one_pass_refresh(predictor, *arrays, scale=scale)
    text = jax.jit(lambda *x: one_pass_refresh(predictor, *x, scale=scale)).lower(*arrays).as_text()
    assert "fgattn_one_pass" in text
    monkeypatch.setattr(_hopper, "_runs_here", lambda *arguments: False)
    jax.clear_caches()
    expected = one_pass_refresh(predictor, *arrays, scale=scale)
    differing = int(jax.lax.population_count(found.mask.bits ^ expected.mask.bits).sum())
    assert differing <= 2e-4 * 4 * expected.mask.bits.shape[2] * 900
    output, lse = attention_with_lse(*arrays[:3], scale=scale)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found.output, output)), atol=0.03)
    np.testing.assert_allclose(found.lse, lse, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["masks"])
def test_the_gradient_of_one_pass_is_that_of_dense_attention(kernel):
    scored = make(200, 300, head_dim=64, heads=(4, 2))
    arrays = [jnp.asarray(x) for x in (scored.query, scored.key, values_of(scored))]
    predictor, lse = ExactPredictor(64), jnp.asarray(scored.lse)
    cotangents = (
        jax.random.normal(jax.random.key(0), scored.query.shape, scored.query.dtype),
        jax.random.normal(jax.random.key(1), lse.shape),
    )
    found = jax.vjp(lambda *x: one_pass_refresh(predictor, *x, lse)[:2], *arrays)[1](cotangents)
    expected = jax.vjp(lambda *x: tuple(attention_with_lse(*x)), *arrays)[1](cotangents)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=0.05, rtol=0.02)
