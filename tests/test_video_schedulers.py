"""UniPC and flow-match Euler against diffusers' schedulers: golden arrays anywhere, and live where torch is."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.models.video import schedulers
from fgattn_jax.models.video.schedulers import FlowEuler, UniPC

TESTS = Path(__file__).resolve().parent
MADE = {"unipc": UniPC, "euler": FlowEuler}
SHIFTS = {"unipc": (1.0, 3.0, 5.0), "euler": (1.0, 7.0)}
GUIDANCE = 5.0


@pytest.fixture(scope="module")
def golden():
    with np.load(TESTS / "golden" / "schedulers" / "schedulers.npz") as file:
        return dict(file)


@pytest.fixture
def live(torch_models):
    from programs import make_scheduler_golden

    return make_scheduler_golden


@pytest.mark.parametrize(("name", "shift"), [(name, shift) for name in SHIFTS for shift in SHIFTS[name]])
def test_timesteps_and_sigmas_are_bit_equal_to_diffusers(golden, name, shift):
    tables = [MADE[name](shift).table(steps) for steps in range(1, 61)]
    for column, key in (("timestep", "timesteps"), ("sigma", "sigmas")):
        ours = np.concatenate([getattr(table, column) for table in tables])
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, golden[f"{name}/{shift:g}/{key}"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MADE)
def test_latents_are_those_of_diffusers_at_every_step(golden, name, dtype):
    shift = SHIFTS[name][1]
    pair = golden[f"{name}/conditional"], golden[f"{name}/unconditional"]
    expected = golden[f"{name}/{dtype}"]
    found = np.asarray(_latents(MADE[name](shift), *pair, expected[0], jnp.dtype(dtype)))
    distance = np.linalg.norm((found - expected[1:]).reshape(20, -1), axis=1)
    size = np.linalg.norm(expected[1:].reshape(20, -1), axis=1)
    assert (distance / size).max() <= 1e-6
    if (name, dtype) == ("euler", "bfloat16"):
        np.testing.assert_array_equal(found, expected[1:])


def _latents(scheduler, conditional, unconditional, start, dtype):
    """After every step, with guidance combined in `dtype` operation by operation as torch does."""
    table = scheduler.table(len(conditional))

    def round_to(x):
        return schedulers.round_to(x, dtype)

    def step(carry, inputs):
        row, yes, no = inputs
        velocity = round_to(no + round_to(GUIDANCE * round_to(yes - no))).astype(dtype)
        carry = scheduler.step(carry, row, velocity)
        return carry, carry.latents

    return jax.lax.scan(step, scheduler.start(start), (table, conditional, unconditional))[1]


@pytest.mark.parametrize("name", MADE)
def test_runs_of_few_steps_are_those_of_installed_diffusers(live, name):
    import torch  # pyright: ignore[reportMissingImports]

    random = np.random.default_rng(0)
    for steps in (1, 2, 3, 4, 11, 50):
        for shift in SHIFTS[name]:
            theirs, ours = live.scheduler(name, shift, steps), MADE[name](shift)
            table = ours.table(steps)
            np.testing.assert_array_equal(table.timestep, theirs.timesteps.numpy())
            np.testing.assert_array_equal(table.sigma, theirs.sigmas.numpy()[:-1])
            start = random.standard_normal((1, 2, 2, 2, 3)).astype(np.float32)
            velocities = random.standard_normal((steps, *start.shape)).astype(np.float32)
            expected = torch.from_numpy(start)
            for timestep, velocity in zip(theirs.timesteps, torch.from_numpy(velocities), strict=True):
                expected = theirs.step(velocity, timestep, expected, return_dict=False)[0]
            scan = jax.jit(lambda start, inputs, ours=ours: jax.lax.scan(_step(ours), ours.start(start), inputs)[0])
            found = np.asarray(scan(start, (table, velocities)).latents)
            # Unrelated velocities are amplified more than a model's: three times the bound of the golden run.
            assert np.linalg.norm(found - expected.numpy()) <= 3e-6 * np.linalg.norm(expected.numpy())


def _step(scheduler):
    return lambda carry, inputs: (scheduler.step(carry, *inputs), None)


def test_golden_arrays_are_those_of_installed_diffusers(live, golden):
    made = live.golden()
    assert made.keys() == golden.keys()
    for name, array in made.items():
        # Sums of torch may change in the last digit from build to build; what is exact stays exact.
        exact = name.endswith(("timesteps", "sigmas", "conditional"))
        chex.assert_trees_all_close(array, golden[name], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


def test_the_first_step_of_unipc_tells_the_model_999_and_the_last_step_gives_the_clip():
    table = UniPC(3.0).table(10)
    assert table.timestep[0] == 999
    assert table.sigma[0] == np.float32(1 - 1e-6)
    assert (table.latents_factor[-1], table.x0_factor[-1], table.slope[-1]) == (0, -1, 0)
    chex.assert_tree_all_finite(table)


def test_noise_is_copied_so_that_a_donated_carry_does_not_take_it_along():
    noise = jnp.ones((1, 1, 1, 2, 2))
    for scheduler in (UniPC(), FlowEuler()):
        start = jax.jit(lambda carry: jax.tree.map(lambda x: x + 1, carry), donate_argnums=0)(scheduler.start(noise))
        chex.assert_trees_all_close(start.latents, noise + 1)
    assert not noise.is_deleted()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UniPC().table(0), "at least 1 for `steps`, got steps=0"),
        (lambda: UniPC().table(2.5), "at least 1 for `steps`, got steps=2.5"),
        (lambda: FlowEuler().table(True), "at least 1 for `steps`, got steps=True"),
        (lambda: UniPC(0.0), "positive number for `flow_shift`, got flow_shift=0.0"),
        (lambda: FlowEuler("7"), "positive number for `shift`, got shift='7'"),
        (lambda: FlowEuler(float("inf")), "positive number for `shift`, got shift=inf"),
    ],
)
def test_wrong_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 5.0,
    "solver_order": 2,
    "beta_start": 0.0001,
}
HUNYUAN = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0, "base_shift": 0.5}


def test_a_scheduler_is_made_from_its_config():
    assert schedulers.from_config(WAN) == UniPC(5.0)
    assert schedulers.from_config(HUNYUAN) == FlowEuler(7.0)
    assert hash(schedulers.from_config(WAN)) == hash(UniPC(5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "got _class_name='DDIMScheduler'"),
        ({}, "got _class_name=None"),
        (WAN | {"solver_order": 3}, "expected solver_order=2 .* got solver_order=3"),
        (WAN | {"prediction_type": "epsilon"}, "expected prediction_type='flow_prediction'"),
        (WAN | {"disable_corrector": [0]}, r"got disable_corrector=\[0\]"),
        ({k: v for k, v in WAN.items() if k != "use_flow_sigmas"}, r"use_flow_sigmas=False \(diffusers' default\)"),
        (HUNYUAN | {"use_dynamic_shifting": True}, "got use_dynamic_shifting=True"),
        (WAN | {"flow_shift": None}, "positive number for `flow_shift`, got flow_shift=None"),
    ],
)
def test_configs_that_are_not_reproduced_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        schedulers.from_config(config)


def test_the_config_of_the_other_scheduler_is_refused():
    with pytest.raises(ValueError, match="config of a UniPCMultistepScheduler, got _class_name='FlowMatch"):
        UniPC.from_config(HUNYUAN)
