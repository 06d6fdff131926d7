import functools

import chex
import dit_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.models.dit import layers, load_pretrained, sample, sampling
from fgattn_jax.models.dit.scenes import make_scene
from fgattn_jax.predictors import Budget, ExactPredictor, RefreshPolicy
from fgattn_jax.query_order import cubes

STEPS = 5
LABEL = jnp.array([0, 2])
PREDICTOR = ExactPredictor(16, cubes((4, 4, 4), (2, 2, 4)), statistic="mass", budget=Budget(top_p=0.8))
POLICY = RefreshPolicy(every=2, dense_first=1)  # dense, refresh, cached, refresh, cached


@pytest.fixture(scope="module")
def model():
    return dit_cases.make_model()


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(4), (2, 4, 16, 16, 3))


@pytest.fixture(scope="module")
def predict(model):
    return jax.jit(lambda x, t, label: model(x, t, label, predictor=PREDICTOR))


def times(step):
    return jnp.full((2,), 1 - step / STEPS)


@pytest.mark.parametrize(("step", "order"), [(sampling.euler_step, 1), (sampling.heun_step, 2)], ids=["euler", "heun"])
def test_solvers_have_their_order_on_a_known_field(step, order):
    """dx/dt = x * (1 + t): x(0) = x(1) * exp(-3 / 2)."""

    def error(num_steps):
        x = np.float64(1.0)
        for number in range(num_steps):
            x, _ = step(lambda x, t, carry, first: (x * (1 + t), carry), x, 1 - number / num_steps, 1 / num_steps, 0)
        return abs(x - np.exp(-1.5))

    np.testing.assert_allclose(np.log2(error(64) / error(128)), order, atol=0.05)


def test_dense_euler_equals_a_loop_on_the_host(model, noise):
    x = noise
    for step in range(STEPS):
        x = x - dit_cases.run(model, x, times(step), LABEL) / STEPS
    result = sample(model, noise, LABEL, steps=STEPS)
    chex.assert_trees_all_close(result.video, x, atol=1e-3, rtol=1e-3)
    assert result.cache is None
    assert not result.refreshed.any()
    chex.assert_trees_all_equal(result.density, jnp.ones((STEPS, 2)))


def test_cached_run_equals_a_loop_on_the_host(model, noise, predict):
    """Dense, refresh, cached, refresh, cached: the masks of a refresh serve until the next."""
    x, masks, density = noise, None, []
    for step, kind in enumerate(POLICY.schedule(STEPS)):
        if kind == "refresh":
            velocity, masks = predict(x, times(step), LABEL)
        else:
            velocity = dit_cases.run(model, x, times(step), LABEL, masks if kind == "cached" else None)
        density.append(masks.row_density().mean((1, 2, 3)) if kind == "cached" else jnp.ones(2))
        x = x - velocity / STEPS
    result = sample(model, noise, LABEL, steps=STEPS, predictor=PREDICTOR, refresh=POLICY)
    chex.assert_trees_all_close(result.video, x, atol=1e-3, rtol=1e-3)
    chex.assert_trees_all_close(result.density, jnp.stack(density), atol=1e-3)
    assert float(result.density.min()) < 0.9
    assert list(result.refreshed) == [False, True, False, True, False]
    chex.assert_trees_all_equal(result.cache.branch(0).bits, masks.bits)
    dense = sample(model, noise, LABEL, steps=STEPS)
    assert float(jnp.abs(dense.video - result.video).max()) > 1e-2


@pytest.mark.slow
def test_guidance_mixes_two_branches_with_masks_of_their_own(model, noise, predict):
    guidance, steps = 2.5, 2
    empty = jnp.full_like(LABEL, model.config.null_label)
    first = [predict(noise, jnp.ones(2), label) for label in (LABEL, empty)]
    x = noise - (first[1].velocity + guidance * (first[0].velocity - first[1].velocity)) / steps
    with_label, without = (
        dit_cases.run(model, x, jnp.full((2,), 0.5), label, one.masks)
        for label, one in zip((LABEL, empty), first, strict=True)
    )
    x = x - (without + guidance * (with_label - without)) / steps
    result = sample(model, noise, LABEL, steps=steps, guidance=guidance, predictor=PREDICTOR)
    chex.assert_trees_all_close(result.video, x, atol=2e-3, rtol=1e-3)
    assert result.cache.num_branches == 2
    for branch, one in enumerate(first):
        chex.assert_trees_all_equal(result.cache.branch(branch).bits, one.masks.bits)
    assert not np.array_equal(first[0].masks.bits, first[1].masks.bits)


def test_heun_uses_new_masks_at_its_second_evaluation(model, noise, predict):
    velocity, masks = predict(noise, jnp.ones(2), LABEL)
    second = dit_cases.run(model, noise - velocity, jnp.zeros(2), LABEL, masks)
    result = sample(model, noise, LABEL, steps=1, solver="heun", predictor=PREDICTOR)
    chex.assert_trees_all_close(result.video, noise - 0.5 * (velocity + second), atol=1e-3, rtol=1e-3)
    expected = 0.5 * (1 + masks.row_density().mean((1, 2, 3)))
    chex.assert_trees_all_close(result.density[0], expected, atol=1e-3)


def test_dense_layers_keep_everything(model, noise):
    policy = RefreshPolicy(dense_layers=(-1,))
    result = sample(model, noise, LABEL, steps=2, predictor=PREDICTOR, refresh=policy)
    assert float(result.density[1, 0]) < 0.9
    assert float(result.density[1, 1]) == 1.0


def test_progress_sees_every_step_in_order(model, noise):
    seen = []
    result = sample(model, noise, LABEL, steps=3, predictor=PREDICTOR, progress=lambda *step: seen.append(step))
    jax.effects_barrier()
    assert [step for step, _ in seen] == [0, 1, 2]
    np.testing.assert_allclose([density for _, density in seen], result.density.mean(1), rtol=1e-5)


def test_one_trace_over_the_loop_and_over_calls():
    """Two kinds of step trace the model once each, whatever the number of steps, the inputs and the weights."""

    @chex.assert_max_traces(n=2)
    @functools.wraps(layers.slice_attention)
    def attention(query, key, value, mask, predictor):
        return layers.slice_attention(query, key, value, mask, predictor)

    model = dit_cases.make_model(attention=attention)
    for seed, label in ((0, LABEL), (1, LABEL + 1)):
        key = jax.random.key(seed)
        result = sample(model, key, label, steps=7, predictor=PREDICTOR, refresh=RefreshPolicy(every=3))
    assert result.video.shape == (2, 4, 16, 16, 3)


def test_key_and_noise_mean_the_same(model, noise):
    by_key = sample(model, jax.random.key(4), LABEL, steps=STEPS)
    chex.assert_trees_all_equal(by_key.video, sample(model, noise, LABEL, steps=STEPS).video)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": jnp.array([0, 5])}, r"`label` must be in 0\.\.4 .* got 0\.\.5"),
        ({"label": jnp.array([-1, 0])}, r"got -1\.\.0"),
        ({"label": jnp.array([0.0, 1.0])}, "dtype=float32"),
        ({"label": jnp.array([0])}, r"`noise` must be \[B=1"),
        ({"noise": jnp.zeros((2, 4, 16, 16, 1))}, r"got shape=\(2, 4, 16, 16, 1\)"),
        ({"noise": jnp.zeros((2, 4, 16, 18, 3))}, "width=18"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, r"steps=2\.5"),
        ({"solver": "rk4"}, "solver='rk4'"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"predictor": "exact"}, "got str"),
        ({"refresh": RefreshPolicy()}, "no `predictor` makes them"),
        ({"predictor": PREDICTOR, "refresh": 3}, "`refresh` must be a `RefreshPolicy`, got int"),
        ({"predictor": PREDICTOR, "refresh": RefreshPolicy(one_pass=True)}, "in two passes, got one_pass=True"),
    ],
)
def test_wrong_settings_are_named(model, noise, change, message):
    arguments = {"noise": noise, "label": LABEL} | change
    with pytest.raises(ValueError, match=message):
        sample(model, **arguments)


def test_shipped_model_knows_clips():
    """On a generated scene its velocity is far better than the best guess that knows nothing (error 1 or more)."""
    model = load_pretrained()
    video = make_scene(jax.random.key(3), num_frames=4, size=64).video[None]
    noise = jax.random.normal(jax.random.key(4), video.shape)
    velocity = jax.jit(lambda x: model(x, jnp.array([0.5]), jnp.array([3])).velocity)(0.5 * video + 0.5 * noise)
    assert float(jnp.mean(jnp.square(velocity - (noise - video)))) < 0.15
