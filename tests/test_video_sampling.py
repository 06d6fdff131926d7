"""The sampler of the video models with a tiny model: masks over steps and branches, one program, errors."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_cases as cases

from fgattn_jax.models.video import sampling
from fgattn_jax.models.video.attention import Attended
from fgattn_jax.models.video.pipeline_casts import pipeline_condition, pipeline_guidance, pipeline_timestep
from fgattn_jax.models.video.sampling import sample
from fgattn_jax.models.video.schedulers import FlowEuler, UniPC
from fgattn_jax.models.video.slice_masks import SliceMasks
from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor, RefreshPolicy

STEPS = 5
NUM_TEXT = 7
POLICY = RefreshPolicy(every=3, dense_first=1)
KINDS = ("dense", "refresh", "cached", "cached", "refresh")
UNIPC = {"steps": STEPS, "scheduler": UniPC(3.0), "guidance": 4.0}


@pytest.fixture(scope="module")
def model():
    return cases.TinyModel()


@pytest.fixture(scope="module")
def joint_model():
    return cases.TinyModel(cases.TinyConfig(num_text=NUM_TEXT))


@pytest.fixture(scope="module")
def dense(model):
    return sample(model, cases.conditions(), cases.noise(), **UNIPC)


@pytest.fixture(scope="module")
def cached(model):
    return _cached(model)


def _cached(model, **settings):
    masks = SliceMasks(ExactPredictor(16), POLICY, **settings)
    return sample(model, cases.conditions(), cases.noise(), attention=masks, **UNIPC)


def _distance(x, reference):
    return float(jnp.linalg.norm(x - reference) / jnp.linalg.norm(reference))


def _keep_all(query_block, **settings):
    return ExactPredictor(query_block, statistic="mass", budget=Budget(top_p=1.0), **settings)


def test_dense_is_the_loop_over_the_scheduler(model, dense):
    scheduler, table = UniPC(3.0), UniPC(3.0).table(STEPS)
    yes, no = cases.conditions()
    carry = scheduler.start(cases.noise())
    forward = jax.jit(lambda latents, t, condition: model(latents, t, condition).velocity)
    for step in range(STEPS):
        timestep = jnp.full((1,), table.timestep[step])
        with_text, without = (forward(carry.latents, timestep, condition) for condition in (yes, no))
        row = type(table)(*(column[step] for column in table))
        carry = scheduler.step(carry, row, without + 4.0 * (with_text - without))
    assert _distance(dense.latents, carry.latents) <= 1e-6
    assert dense.kinds == ("dense",) * STEPS
    assert dense.masks is None
    chex.assert_trees_all_equal(dense.density, jnp.ones((STEPS, 2)))


def test_masks_that_keep_everything_give_the_dense_latents_through_the_whole_loop(model, dense):
    order = np.random.default_rng(0).permutation(90)
    masks = SliceMasks(_keep_all(32, query_order=order), RefreshPolicy(every=2))
    full = sample(model, cases.conditions(), cases.noise(), attention=masks, **UNIPC)
    assert full.kinds == ("refresh", "cached", "refresh", "cached", "refresh")
    chex.assert_trees_all_equal(full.density, jnp.ones((STEPS, 2)))
    assert _distance(full.latents, dense.latents) <= 1e-5


def test_masks_of_a_refresh_serve_the_steps_behind_it(dense, cached):
    assert cached.kinds == KINDS
    density = np.asarray(cached.density)
    # An exact predictor refreshes beside dense attention.
    np.testing.assert_array_equal(density[[0, 1, 4]], 1)
    np.testing.assert_array_equal(density[2], density[3])
    assert (density[2] > 0.2).all()
    assert (density[2] < 0.9).all()
    assert 1e-4 < _distance(cached.latents, dense.latents) < 0.3


def test_every_branch_and_layer_has_masks_of_its_own(cached):
    stored = cached.masks.stored
    bits = np.asarray(stored.bits)
    assert bits.shape == (2, 2, 1, 2, 6, 4)  # [C, L, B, N, R, W]
    flat = bits.reshape(4, -1)
    assert all((flat[i] != flat[j]).any() for i in range(4) for j in range(i))
    kept = np.unpackbits(bits.view(np.uint8), axis=-1).sum(-1) / 90
    chex.assert_trees_all_close(np.asarray(stored.density), kept.mean((2, 3, 4)).astype(np.float32), atol=1e-6)


def test_cached_masks_are_those_the_predictor_makes_of_the_dense_forward(model):
    condition, settings = (
        cases.conditions(1),
        {"scheduler": FlowEuler(1.0), "attention": SliceMasks(ExactPredictor(16))},
    )
    found = sample(model, condition, cases.noise(), steps=2, **settings)

    def attend(query, key, value, state, *, layer, text):
        state = tuple(buffer.at[layer].set(x) for buffer, x in zip(state, (query, key), strict=True))
        return Attended(jax.nn.dot_product_attention(query, key, value), state)

    room = (jnp.zeros((2, 1, 90, 2, 16)),) * 2
    start = (cases.noise(), jnp.full((1,), 1000.0), condition[0])
    queries, keys = jax.jit(lambda *args: model(*args, attention=attend, state=room).state)(*start)
    for layer in range(2):
        expected = ExactPredictor(16)(queries[layer], keys[layer]).bits
        chex.assert_trees_all_equal(found.masks.stored.bits[0, layer], expected)


def test_shared_branches_use_the_masks_of_the_conditional_one_at_refresh_steps_too(model, cached):
    shared = _cached(model, shared_branches=True)
    stored = shared.masks.stored
    assert stored.bits.shape[0] == 1
    # At the first refresh the conditional branch is dense and the other one attends under what it made.
    halves = np.asarray((1 + shared.density[2]) / 2)
    chex.assert_trees_all_close(np.asarray(shared.density[1]), halves, atol=1e-6)
    chex.assert_trees_all_close(shared.density[2], shared.density[3])
    assert _distance(shared.latents, cached.latents) > 1e-5


def test_masks_on_the_host_give_what_masks_on_the_device_give(model, cached):
    seen = []
    host = _cached(model, on_host=True)
    assert host.masks.stored.bits.sharding.memory_kind == "pinned_host"
    chex.assert_trees_all_equal(np.asarray(host.masks.stored.bits), np.asarray(cached.masks.stored.bits))
    chex.assert_trees_all_close(host.latents, cached.latents, rtol=1e-5, atol=1e-5)
    masks = SliceMasks(ExactPredictor(16), POLICY, on_host=True)
    before = len(cases.TRACES)
    sample(model, cases.conditions(), cases.noise(), attention=masks, progress=_record(seen), **UNIPC)
    # Neither the second step nor those behind it are compiled anew for bits that the first one gave.
    assert len(cases.TRACES) == before + 1
    assert [kind for _, kind, _, _ in seen] == list(KINDS)


def _record(seen):
    return lambda *report: seen.append(report)


def test_the_buffer_of_all_masks_stays_where_it_is(model, monkeypatch):
    run, programs = sampling._run, []

    def compiled_run(program, *arguments):
        programs.append(run.lower(program, *arguments).compile())
        return programs[0](*arguments)

    monkeypatch.setattr(sampling, "_run", compiled_run)
    bits = _cached(model).masks.stored.bits
    shape = ",".join(map(str, bits.shape))
    text = programs[0].as_text()
    assert f"u32[{shape}]" in text
    assert not re.findall(rf"= u32\[{shape}\]\S* copy\(", text)
    assert programs[0].memory_analysis().alias_size_in_bytes >= bits.nbytes


def test_mean_queries_at_every_step_keep_no_masks(model, dense):
    masks = SliceMasks(MeanQueryPredictor(16), RefreshPolicy(every=1))
    pooled = sample(model, cases.conditions(), cases.noise(), attention=masks, **UNIPC)
    assert pooled.kinds == ("refresh",) * STEPS
    assert pooled.masks.stored is None
    density = np.asarray(pooled.density)
    assert (density < 0.95).all()
    assert (density > 0.2).all()
    assert len(np.unique(density)) == density.size  # made anew in every step and layer
    assert 1e-4 < _distance(pooled.latents, dense.latents) < 0.3


def test_mean_queries_attend_under_the_mask_of_the_same_step_and_keep_it(model):
    masks = SliceMasks(MeanQueryPredictor(16), RefreshPolicy(every=2))
    found = sample(model, cases.conditions(), cases.noise(), attention=masks, **UNIPC)
    density = np.asarray(found.density)
    np.testing.assert_allclose(density[0], density[1], atol=1e-6)
    assert (density[0] < 0.95).all()


def test_dense_layers_stay_dense_and_make_no_masks(model):
    policy = RefreshPolicy(dense_layers=(0,))
    found = sample(model, cases.conditions(), cases.noise(), attention=SliceMasks(ExactPredictor(16), policy), **UNIPC)
    np.testing.assert_array_equal(found.density[:, 0], 1)
    assert (np.asarray(found.density[1:, 1]) < 0.9).all()
    assert not np.asarray(found.masks.stored.bits[:, 0]).any()


def test_all_layers_dense_is_a_dense_run(model, dense):
    masks = SliceMasks(ExactPredictor(16), RefreshPolicy(dense_layers=(0, 1)))
    found = sample(model, cases.conditions(), cases.noise(), attention=masks, **UNIPC)
    assert found.kinds == ("dense",) * STEPS
    chex.assert_trees_all_close(found.latents, dense.latents, rtol=1e-6, atol=1e-6)


def test_any_attention_function_plugs_in(model, dense):
    for attention in (jax.nn.dot_product_attention, "dense"):
        found = sample(model, cases.conditions(), cases.noise(), attention=attention, **UNIPC)
        assert _distance(found.latents, dense.latents) <= 1e-5
        chex.assert_trees_all_equal(found.density, jnp.ones((STEPS, 2)))
    nothing = sample(model, cases.conditions(), cases.noise(), attention=_no_attention, **UNIPC)
    assert _distance(nothing.latents, dense.latents) > 1e-2


def _no_attention(query, key, value):
    return value


def test_a_second_call_with_other_values_traces_nothing(model):
    masks = SliceMasks(ExactPredictor(16), POLICY)
    settings = UNIPC | {"attention": masks}
    sample(model, cases.conditions(), cases.noise(), **settings)
    before = len(cases.TRACES)
    other = cases.TinyModel(seed=3)
    settings |= {"guidance": 2.0, "scheduler": UniPC(5.0)}
    first = sample(other, cases.conditions(seed=8), cases.noise(seed=9), **settings)
    settings |= {"attention": SliceMasks(ExactPredictor(16), POLICY)}
    again = sample(other, cases.conditions(seed=8), cases.noise(seed=9), **settings)
    assert len(cases.TRACES) == before
    chex.assert_trees_all_equal(first.latents, again.latents)


def test_steps_one_at_a_time_give_what_the_single_program_gives(model, cached):
    seen = []
    masks = SliceMasks(ExactPredictor(16), POLICY)
    found = sample(model, cases.conditions(), cases.noise(), attention=masks, progress=_record(seen), **UNIPC)
    chex.assert_trees_all_close(found.latents, cached.latents, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(found.masks.stored.bits, cached.masks.stored.bits)
    chex.assert_trees_all_close(found.density, cached.density)
    assert [report[:2] for report in seen] == list(enumerate(KINDS))
    np.testing.assert_allclose([report[2] for report in seen], np.asarray(cached.density).mean(1), atol=1e-6)
    assert all(report[3] > 0 for report in seen)


def test_an_interrupt_ends_the_run_between_two_steps(model):
    seen = []

    def interrupt(step, kind, density, seconds):
        seen.append(step)
        if step == 2:
            raise KeyboardInterrupt

    noise = cases.noise()
    with pytest.raises(KeyboardInterrupt):
        sample(model, cases.conditions(), noise, progress=interrupt, **UNIPC)
    assert seen == [0, 1, 2]
    assert not noise.is_deleted()


@pytest.mark.slow
def test_a_run_on_two_devices_needs_no_second_compilation(run_python):
    out = run_python(
        """
import sys; sys.path.insert(0, "tests")
import jax, video_cases as cases
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from fgattn_jax.models.video.sampling import sample
from fgattn_jax.models.video.schedulers import FlowEuler
from fgattn_jax.models.video.slice_masks import SliceMasks
from fgattn_jax.predictors import ExactPredictor

model = cases.TinyModel()
everywhere = NamedSharding(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,)), PartitionSpec())
nnx.update(model, jax.device_put(nnx.state(model), everywhere))
for on_host in (False, True):
    masks = SliceMasks(ExactPredictor(16), on_host=on_host)
    before = len(cases.TRACES)
    found = sample(model, cases.conditions(1), cases.noise(), steps=3, scheduler=FlowEuler(7.0), attention=masks,
                   progress=lambda *report: None)
    print(len(cases.TRACES) - before, found.masks.stored.bits.sharding.memory_kind, len(found.latents.devices()))
""",
        devices=2,
    )
    assert out.split() == ["2", "device", "2", "2", "pinned_host", "2"]


@pytest.mark.parametrize("predictor", [_keep_all(16), _keep_all(32, query_order=np.arange(90)[::-1])])
def test_joint_masks_that_keep_everything_give_the_dense_latents(joint_model, predictor):
    """Two entries with other lengths; 90 video tokens and 7 of text, so a row holds queries of both."""
    conditions = cases.conditions(2, batch=2, num_text=NUM_TEXT)
    settings = {"steps": 3, "scheduler": FlowEuler(7.0), "guidance": 2.0}
    dense = sample(joint_model, conditions, cases.noise(2), **settings)
    full = sample(joint_model, conditions, cases.noise(2), attention=SliceMasks(predictor), **settings)
    assert _distance(full.latents, dense.latents) <= 1e-5
    # Padded text is never attended: the density says so.
    bits = np.asarray(full.masks.stored.bits)
    kept = np.unpackbits(bits.view(np.uint8), axis=-1, bitorder="little")
    for branch, condition in enumerate(conditions):
        for entry, length in enumerate(np.asarray(condition.lengths)):
            assert (kept[branch, :, entry, ..., : 90 + length] == 1).all()
            assert (kept[branch, :, entry, ..., 90 + length :] == 0).all()


def test_joint_masks_keep_text_and_skip_video_slices(joint_model):
    conditions = cases.conditions(1, batch=2, num_text=NUM_TEXT)
    settings = {"steps": 3, "scheduler": FlowEuler(7.0)}
    masks = SliceMasks(ExactPredictor(16))
    found = sample(joint_model, conditions, cases.noise(2), attention=masks, **settings)
    density = np.asarray(found.density)
    np.testing.assert_array_equal(density[0], 1)
    assert (density[1:] < 0.9).all()
    bits = np.asarray(found.masks.stored.bits)
    kept = np.unpackbits(bits.view(np.uint8), axis=-1, bitorder="little")[..., :97]
    lengths = np.asarray(conditions[0].lengths)
    for entry, length in enumerate(lengths):
        assert (kept[0, :, entry, ..., 90 : 90 + length] == 1).all()
    assert kept[0, :, :, :, :5, :90].mean() < 0.9  # 80 queries of video alone
    plain = sample(joint_model, conditions, cases.noise(2), attention=jax.nn.dot_product_attention, **settings)
    dense = sample(joint_model, conditions, cases.noise(2), **settings)
    assert _distance(plain.latents, dense.latents) <= 1e-5


def test_noise_is_drawn_from_a_key_and_a_latent_size(model, dense):
    drawn = sample(model, cases.conditions(), (jax.random.key(1), (3, 10, 12)), **UNIPC)
    chex.assert_trees_all_equal(drawn.latents, dense.latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditions": cases.conditions(1)}, "got 1 with guidance=4.0: give the unconditional"),
        ({"guidance": 1.0}, "got 2 with guidance=1.0: give the conditional one alone"),
        ({"guidance": float("nan")}, "finite number for `guidance`, got guidance=nan"),
        ({"conditions": cases.conditions(1)[0]}, "list of one or two conditions .* got VectorCondition"),
        ({"conditions": cases.conditions(3)}, "list of one or two conditions .* got 3 conditions"),
        (
            {"conditions": [cases.conditions(1)[0], cases.conditions(1, batch=2)[0]]},
            r"equal shapes, got shapes=\[\(1, 8\)\] and \[\(2, 8\)\]",
        ),
        ({"noise": jnp.zeros((2, 4, 3, 10, 12))}, r"\[B=1, C=4, F, Y, X\] .* got shape=\(2, 4, 3, 10, 12\)"),
        ({"noise": (0, (3, 10, 12))}, r"a jax.random key and the latent size .* got int"),
        ({"noise": jnp.zeros((1, 4, 3, 9, 12))}, "whole patches"),
        ({"scheduler": "unipc"}, "`UniPC` or `FlowEuler` for `scheduler`, got str"),
        ({"steps": 0}, "at least 1 for `steps`, got steps=0"),
        ({"attention": "cached"}, "for `attention`, got 'cached'"),
        ({"match_diffusers_bf16": True}, "bfloat16 model with `match_diffusers_bf16`, got dtype=float32"),
    ],
)
def test_wrong_arguments_are_refused(model, change, message):
    call = {"conditions": cases.conditions(), "noise": cases.noise()} | UNIPC | change
    with pytest.raises(ValueError, match=message):
        sample(model, call.pop("conditions"), call.pop("noise"), **call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "`AbstractPredictor` for `predictor`, got NoneType"),
        ((ExactPredictor(16), 3), "`RefreshPolicy` for `refresh`, got int"),
        ((ExactPredictor(16), RefreshPolicy(one_pass=True)), "two passes, got one_pass=True"),
        ((ExactPredictor(16), RefreshPolicy(), 1), "True or False for `shared_branches`, got shared_branches=1"),
        ((ExactPredictor(16), RefreshPolicy(), False, None), "True or False for `on_host`, got on_host=None"),
        ((ExactPredictor(16), RefreshPolicy(), False, False, "fast"), "implementation"),
    ],
)
def test_wrong_settings_of_slice_masks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SliceMasks(*arguments)


def test_a_dense_layer_that_does_not_exist_is_refused(model):
    masks = SliceMasks(ExactPredictor(16), RefreshPolicy(dense_layers=(2,)))
    with pytest.raises(ValueError, match="got layer=2 for num_layers=2"):
        sample(model, cases.conditions(), cases.noise(), attention=masks, **UNIPC)


@pytest.mark.parametrize(("scale", "product"), [(6.0, 6016), (1.0, 1000), (3.5, 3504), (4.05, 4064), (12.25, 12224)])
def test_guidance_scales_are_rounded_as_the_pipeline_rounds_a_thousand_times_the_scale(scale, product):
    found = jax.jit(lambda x: pipeline_guidance(x) * 1000)(jnp.full((2,), scale))
    # Some products are none of a float32 number and 1000: the next number is then as good.
    np.testing.assert_allclose(found, product, rtol=1.2e-7)


def test_conditions_are_rounded_but_for_whole_numbers():
    condition = cases.conditions(1, batch=2, num_text=NUM_TEXT)[0]
    rounded = pipeline_condition(condition)
    assert rounded.text.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(rounded.lengths, condition.lengths)
    assert rounded.guidance.dtype == jnp.float32
    vector = pipeline_condition(cases.conditions(1)[0])
    assert vector.text.dtype == jnp.bfloat16


def test_timesteps_are_rounded_from_the_second_step_where_latents_are():
    joint, vector = cases.conditions(1, num_text=NUM_TEXT)[0], cases.conditions(1)[0]
    for condition, scheduler, expected in (
        (joint, FlowEuler(), [999.0, 436.0]),
        (joint, UniPC(), [999.0, 437.0]),
        (vector, FlowEuler(), [999.0, 437.0]),
    ):
        found = [
            float(pipeline_timestep(jnp.float32(t), jnp.int32(number), condition, scheduler))
            for number, t in enumerate((999, 437))
        ]
        assert found == expected


@pytest.mark.parametrize("scheduler", [UniPC(), FlowEuler()])
def test_rounding_is_that_of_diffusers_in_a_bfloat16_run(scheduler):
    model = cases.TinyModel(dtype=jnp.bfloat16)
    settings = {"steps": STEPS, "scheduler": scheduler, "guidance": 4.0}
    exact = sample(model, cases.conditions(), cases.noise(), **settings)
    rounded = sample(model, cases.conditions(), cases.noise(), match_diffusers_bf16=True, **settings)
    assert rounded.latents.dtype == exact.latents.dtype == jnp.float32
    assert 0 < _distance(rounded.latents, exact.latents) < 0.1
    in_bf16 = rounded.latents == rounded.latents.astype(jnp.bfloat16)
    assert bool(in_bf16.all()) == isinstance(scheduler, FlowEuler)
