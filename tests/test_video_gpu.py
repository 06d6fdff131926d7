"""Video models on a GPU in bfloat16: sparse runs by the Hopper kernels, masks in host memory, two GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax import query_order
from fgattn_jax.models import hunyuan_video, wan
from fgattn_jax.models.video.sampling import sample
from fgattn_jax.models.video.schedulers import FlowEuler, UniPC
from fgattn_jax.models.video.sharding import VideoSharding, make_mesh
from fgattn_jax.models.video.slice_masks import SliceMasks
from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor, RefreshPolicy

pytestmark = pytest.mark.gpu
LATENTS = {"wan": (3, 20, 26), "hunyuan": (3, 18, 22)}  # 390 and 297 tokens: no whole rows
POLICY = RefreshPolicy(every=3, dense_first=1)
ROUNDING = 0.03
"""Relative distance that bfloat16 may put between two runs of four steps; float32 weights would put 1e-6."""


def family(name: str):
    """A model of random weights with heads that the kernels take, its conditions, and settings of the sampler."""
    keys = jax.random.split(jax.random.key(3), 3)
    if name == "wan":
        config = wan.WanConfig(num_layers=2, num_heads=2, head_dim=128, hidden_dim=256, text_dim=32)
        text = jax.random.normal(keys[0], (2, 1, 40, 32))
        conditions = [wan.WanCondition(each) for each in text]
        return wan.random(config), conditions, {"scheduler": UniPC(3.0), "guidance": 4.0, "steps": 4}
    config = hunyuan_video.HunyuanVideoConfig(
        num_heads=2, head_dim=128, num_dual_layers=1, num_single_layers=2, num_refiner_layers=1, text_dim=32,
        pooled_dim=16,
    )  # fmt: skip
    text, pooled = jax.random.normal(keys[0], (1, 20, 32)), jax.random.normal(keys[1], (1, 16))
    condition = hunyuan_video.HunyuanVideoCondition(text, jnp.asarray([13]), pooled, jnp.asarray([6.0]))
    return hunyuan_video.random(config), [condition], {"scheduler": FlowEuler(7.0), "steps": 4}


def run(name: str, attention, **settings):
    model, conditions, defaults = family(name)
    return sample(model, conditions, (jax.random.key(0), LATENTS[name]), attention=attention, **defaults | settings)


def distance(found, wanted) -> float:
    found, wanted = (np.asarray(sampled.latents, np.float64) for sampled in (found, wanted))
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def predictor(name: str, kind: str):
    grid = tuple(size // part for size, part in zip(LATENTS[name], (1, 2, 2), strict=True))
    order, tokens = query_order.cubes(grid), int(np.prod(grid))
    if kind == "mean":
        return MeanQueryPredictor(128, order, budget=Budget(top_k=tokens // 2))
    return ExactPredictor(128, order, statistic="mass", budget=Budget(top_k=tokens if kind == "all" else tokens // 2))


by_family = pytest.mark.parametrize("name", ["wan", "hunyuan"])


@by_family
def test_a_run_that_keeps_everything_is_dense(name):
    found = run(name, SliceMasks(predictor(name, "all"), POLICY))
    assert found.kinds == ("dense", "refresh", "cached", "cached")
    assert distance(found, run(name, "dense")) < ROUNDING
    assert distance(run(name, jax.nn.dot_product_attention), run(name, "dense")) < ROUNDING


@by_family
@pytest.mark.parametrize("kind", ["half", "mean"])
def test_a_sparse_run_is_that_of_xla(name, kind):
    policy = RefreshPolicy(every=1) if kind == "mean" else POLICY
    chosen, plain = (SliceMasks(predictor(name, kind), policy, implementation=each) for each in (None, "xla"))
    found, wanted = run(name, chosen), run(name, plain)
    assert distance(found, wanted) < ROUNDING
    # Exact scores near the cut may fall on either side, few of them.
    np.testing.assert_allclose(found.density, wanted.density, atol=0.01)
    assert distance(found, run(name, "dense")) > distance(found, wanted)


@by_family
def test_bits_in_host_memory_give_the_same_clip(name):
    here, there = (run(name, SliceMasks(predictor(name, "half"), POLICY, on_host=on_host)) for on_host in (False, True))
    np.testing.assert_array_equal(here.latents, there.latents)
    assert there.masks is not None
    assert there.masks.stored is not None
    assert there.masks.stored.bits.sharding.memory_kind == "pinned_host"


@pytest.mark.two_gpus
@by_family
@pytest.mark.parametrize(("divide", "split"), [("tokens", False), ("tokens", True), ("heads", False)])
def test_two_gpus_make_the_clip_of_one(name, divide, split):
    sharding = VideoSharding(make_mesh(2), divide=divide, split_weights=split)
    attention = SliceMasks(predictor(name, "half"), POLICY)
    alone, together = run(name, attention), run(name, attention, sharding=sharding)
    assert distance(together, alone) < ROUNDING
    np.testing.assert_allclose(together.density, alone.density, atol=0.01)
