"""When masks are made anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.predictors import RefreshPolicy

POLICIES = {
    "once": (RefreshPolicy(), "RCCCCCCCC"),
    "once after dense steps": (RefreshPolicy(dense_first=3), "DDDRCCCCC"),
    "every step": (RefreshPolicy(every=1), "RRRRRRRRR"),
    "every 4 steps": (RefreshPolicy(every=4), "RCCCRCCCR"),
    "every 4 steps, counted from the first masked step": (RefreshPolicy(every=4, dense_first=2), "DDRCCCRCC"),
    "given steps and the first": (RefreshPolicy(steps=(5, 3)), "RCCRCRCCC"),
    "given steps after dense steps": (RefreshPolicy(steps=[4], dense_first=2), "DDRCRCCCC"),
    "not older than 2 steps": (RefreshPolicy(max_age=2), "RCCRCCRCC"),
    "never reused": (RefreshPolicy(max_age=0), "RRRRRRRRR"),
    "age counts from the last refresh": (RefreshPolicy(steps=(2,), max_age=3), "RCRCCCRCC"),
    "always dense": (RefreshPolicy(dense_first=9), "DDDDDDDDD"),
}
KINDS = {"D": "dense", "R": "refresh", "C": "cached"}


@pytest.mark.parametrize("name", POLICIES)
def test_schedule_of_a_run(name):
    policy, expected = POLICIES[name]
    assert policy.schedule(len(expected)) == tuple(KINDS[letter] for letter in expected)


@pytest.mark.parametrize("name", POLICIES)
def test_traced_decisions_in_a_scan_are_the_schedule(name):
    policy, expected = POLICIES[name]

    def step(age, number):
        refresh = policy.should_refresh(number, age)
        age = jax.lax.cond(refresh, lambda age: jnp.zeros_like(age), lambda age: age, age)
        return jnp.where(age < 0, age, age + 1), (refresh, policy.is_dense_step(number))

    _, (refresh, dense) = jax.jit(lambda: jax.lax.scan(step, jnp.int32(-1), jnp.arange(len(expected))))()
    assert refresh.tolist() == [letter == "R" for letter in expected]
    assert dense.tolist() == [letter == "D" for letter in expected]


def test_ages_of_branches_decide_one_by_one():
    policy = RefreshPolicy(max_age=2, dense_first=1)
    assert policy.should_refresh(5, jnp.array([-1, 0, 2, 3])).tolist() == [True, False, False, True]
    assert not policy.should_refresh(0, jnp.array([-1, 0, 2, 3])).any()


def test_many_steps_at_once():
    refresh = RefreshPolicy(every=3, steps=(4,)).should_refresh(jnp.arange(7), 1)
    assert refresh.tolist() == [True, False, False, True, True, False, True]


def test_python_integers_give_a_truth_value():
    assert RefreshPolicy(every=2).should_refresh(4, 1)
    assert not RefreshPolicy(every=2).should_refresh(5, 1)


def test_dense_layers_are_flags_known_while_tracing():
    flags = RefreshPolicy(dense_layers=(0, -1)).dense_layer_flags(4)
    assert isinstance(flags, np.ndarray)
    assert flags.tolist() == [True, False, False, True]
    assert not RefreshPolicy().dense_layer_flags(3).any()


def test_is_hashable_by_value():
    assert RefreshPolicy(steps=[3, 1, 1]) == RefreshPolicy(steps=(1, 3))
    assert hash(RefreshPolicy(steps=range(3))) == hash(RefreshPolicy(steps=np.arange(3)))


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (RefreshPolicy(), "refresh once, at step 0"),
        (RefreshPolicy(every=15), "refresh every 15 steps from step 0"),
        (RefreshPolicy(steps=(5, 9), dense_first=2), "refresh at step 2 and at steps 5, 9; first 2 steps dense"),
        (
            RefreshPolicy(every=15, max_age=20, dense_layers=(0, 1)),
            "refresh every 15 steps from step 0 and when older than 20 steps; dense layers 0, 1",
        ),
    ],
)
def test_describes_itself(policy, text):
    assert policy.describe() == text


WRONG = {
    "every zero steps": ({"every": 0}, "`every` >= 1, got every=0"),
    "every half step": ({"every": 0.5}, "integer for `every`, got every=0.5"),
    "negative dense steps": ({"dense_first": -1}, "`dense_first` >= 0, got dense_first=-1"),
    "no number of dense steps": ({"dense_first": None}, "integer for `dense_first`, got dense_first=None"),
    "negative age": ({"max_age": -1}, "`max_age` >= 0, got max_age=-1"),
    "boolean age": ({"max_age": True}, "integer for `max_age`, got max_age=True"),
    "one step": ({"steps": 3}, "integers for `steps`, got steps=3"),
    "fractions of steps": ({"steps": (1.5,)}, "integers for `steps`, got 1.5"),
    "negative step": ({"steps": (-1,)}, "`steps` >= dense_first=0, got step=-1"),
    "step among the dense ones": ({"steps": (1, 5), "dense_first": 2}, "`steps` >= dense_first=2, got step=1"),
    "layers as text": ({"dense_layers": "01"}, "integers for `dense_layers`, got dense_layers='01'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case):
    values, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        RefreshPolicy(**values)


@pytest.mark.parametrize("layer", [4, -5])
def test_refuses_a_layer_that_does_not_exist(layer):
    with pytest.raises(ValueError, match=rf"-4 \.\. 3, got layer={layer} for num_layers=4"):
        RefreshPolicy(dense_layers=(layer,)).dense_layer_flags(4)


@pytest.mark.parametrize(("method", "name"), [("schedule", "num_steps"), ("dense_layer_flags", "num_layers")])
def test_refuses_nothing_to_plan(method, name):
    with pytest.raises(ValueError, match=f"`{name}` >= 1, got {name}=0"):
        getattr(RefreshPolicy(), method)(0)


def test_refuses_traced_settings():
    with pytest.raises(ValueError, match="integer for `every`"):
        jax.jit(lambda every: RefreshPolicy(every=every).should_refresh(1, 1))(jnp.float32(2))
