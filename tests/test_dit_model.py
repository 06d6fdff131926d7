import dataclasses

import chex
import dit_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fgattn_jax import masks
from fgattn_jax.masks import SliceMask
from fgattn_jax.models.dit import DiT, DiTConfig, layers
from fgattn_jax.models.dit.model import num_parameters
from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor
from fgattn_jax.query_order import cubes

TINY = dit_cases.TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_heads": -1}, "num_heads=-1"),
        ({"head_dim": 6}, "head_dim=6"),
        ({"head_dim": 17}, "head_dim=17"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"time_features": 31}, "time_features=31"),
        ({"rope_theta": 1.0}, "rope_theta=1.0"),
        ({"patch": (1, 4)}, "three positive sizes"),
        ({"patch": (1, 0, 4)}, "three positive sizes"),
        ({"height": 18}, "height=18 is not a multiple of 4"),
        ({"width_pixels": 15}, "width=15"),
        ({"patch": (3, 4, 4)}, "frames=4 is not a multiple of 3"),
    ],
)
def test_config_refuses_wrong_sizes(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        dataclasses.replace(TINY, **change)


def test_config_survives_json():
    assert DiTConfig.from_json(TINY.to_json()) == TINY


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", "list"), ('{"width": 3}', "must have the")])
def test_config_refuses_other_json(text, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig.from_json(text)


def test_shipped_sizes_stay_small():
    abstract = nnx.eval_shape(lambda: DiT(DiTConfig(), rngs=nnx.Rngs(0)))
    assert num_parameters(abstract) <= 7_400_000
    assert DiTConfig().default_grid == (16, 16, 16)


def test_patches_come_back_and_run_over_frames_rows_columns():
    clip = jax.random.normal(jax.random.key(0), (2, 4, 8, 12, 3))
    tokens = layers.patchify(clip, (2, 4, 4))
    assert tokens.shape == (2, 2 * 2 * 3, 2 * 4 * 4 * 3)
    chex.assert_trees_all_equal(layers.unpatchify(tokens, (2, 2, 3), (2, 4, 4)), clip)
    # Token 4 of the grid 2 x 2 x 3 is frame 0, row 1, column 1.
    chex.assert_trees_all_equal(tokens[:, 4].reshape(2, 2, 4, 4, 3), clip[:, :2, 4:8, 4:8])


def test_rotary_scores_depend_on_distance_only():
    grid, dims = (3, 4, 5), TINY.rope_dims
    assert sum(dims) == TINY.head_dim
    cos, sin = layers.rope_tables(grid, dims, 100.0)
    query, key = jax.random.normal(jax.random.key(0), (2, TINY.head_dim))

    def score(at, to):
        places = [int(np.ravel_multi_index(place, grid)) for place in (at, to)]
        q, k = (
            layers.rotate(x[None, None, None], cos[p : p + 1], sin[p : p + 1])
            for x, p in zip((query, key), places, strict=True)
        )
        return float(jnp.sum(q * k))

    np.testing.assert_allclose(score((0, 1, 2), (1, 3, 1)), score((1, 0, 3), (2, 2, 2)), rtol=1e-5)
    # Every axis counts: one step further along any of them changes the score.
    base = score((0, 0, 0), (0, 0, 0))
    for step in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert abs(score((0, 0, 0), step) - base) > 1e-3


def test_new_model_gives_zero_velocity():
    model = dit_cases.new_model()
    velocity = dit_cases.run(model, *dit_cases.inputs())
    chex.assert_trees_all_equal(velocity, jnp.zeros((2, 4, 16, 16, 3)))


def test_layers_start_with_different_weights():
    kernel = dit_cases.new_model().blocks.qkv.kernel[...]
    assert kernel.shape == (2, 32, 96)
    assert not np.allclose(kernel[0], kernel[1])


def test_time_label_and_length_change_the_output():
    model = dit_cases.make_model()
    x, t, label = dit_cases.inputs()
    velocity = dit_cases.run(model, x, t, label)
    assert velocity.dtype == jnp.float32
    assert float(jnp.abs(dit_cases.run(model, x, t + 0.05, label) - velocity).max()) > 1e-3
    assert float(jnp.abs(dit_cases.run(model, x, t, label + 1) - velocity).max()) > 1e-3
    longer = jax.eval_shape(
        dit_cases.run, model, *dit_cases.inputs(frames=8)
    )  # rotary: the same weights take twice the frames
    assert longer.shape == (2, 8, 16, 16, 3)


def random_masks(order=None, density=0.5):
    rows = jax.random.bernoulli(jax.random.key(5), density, (2, 2, 2, 4, 64)).at[..., 0].set(True)
    stacked = [masks.from_rows(layer, query_block=16, num_queries=64, query_order=order) for layer in rows]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)


def masked_oracle(query, key, value, mask, predictor):
    """Dense attention with -inf where the mask skips."""
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest") / jnp.sqrt(query.shape[-1])
    if mask is not None:
        scores = jnp.where(mask.to_dense(), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value, precision="highest"), None


@pytest.mark.parametrize("order", [None, cubes((4, 4, 4), (2, 2, 4))], ids=["raster", "cubes"])
def test_masks_of_every_layer_reach_attention(order):
    stacked = random_masks(order)
    sparse = dit_cases.run(dit_cases.make_model(), *dit_cases.inputs(), stacked)
    oracle = dit_cases.run(dit_cases.make_model(attention=masked_oracle), *dit_cases.inputs(), stacked)
    chex.assert_trees_all_close(sparse, oracle, atol=2e-4, rtol=1e-4)
    dense = dit_cases.run(dit_cases.make_model(), *dit_cases.inputs())
    assert float(jnp.abs(sparse - dense).max()) > 1e-2


def test_full_masks_equal_dense():
    model = dit_cases.make_model()
    full = masks.full(query_block=16, num_queries=64, num_keys=64)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), full)
    with_masks = dit_cases.run(model, *dit_cases.inputs(), stacked)
    chex.assert_trees_all_close(with_masks, dit_cases.run(model, *dit_cases.inputs()), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "predictor",
    [
        ExactPredictor(16, cubes((4, 4, 4), (2, 2, 4)), statistic="mass", budget=Budget(top_p=0.9)),
        MeanQueryPredictor(16, budget=Budget(top_p=0.9)),
    ],
    ids=["exact mass", "mean query"],
)
def test_predicting_call_is_dense_and_gives_masks_of_all_layers(predictor):
    model = dit_cases.make_model()
    output = jax.jit(lambda *arrays: model(*arrays, predictor=predictor))(*dit_cases.inputs())
    chex.assert_trees_all_close(output.velocity, dit_cases.run(model, *dit_cases.inputs()), atol=2e-4, rtol=1e-4)
    assert isinstance(output.masks, SliceMask)
    assert output.masks.bits.shape == (2, 2, 2, 4, 4)  # layers, batch, heads, rows, words
    assert 0.05 < float(output.masks.density()) < 0.98
    # What comes out goes in again.
    assert dit_cases.run(model, *dit_cases.inputs(), output.masks).shape == (2, 4, 16, 16, 3)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    weight = jax.random.normal(jax.random.key(9), (2, 4, 16, 16, 3))

    def gradient(remat):
        model = dit_cases.make_model(remat=remat, attention=layers.training_attention)
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            return jnp.sum(weight * nnx.merge(graph, params, rest)(*dit_cases.inputs()).velocity)

        return jax.jit(jax.grad(loss))(params)

    plain, remat = gradient(False), gradient(True)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain)) > 1e-2
    chex.assert_trees_all_close(plain, remat, atol=1e-3, rtol=1e-3)


def test_training_attention_refuses_masks():
    model = dit_cases.make_model(attention=layers.training_attention)
    with pytest.raises(ValueError, match="Training attention is dense"):
        model(*dit_cases.inputs(), masks=random_masks())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 4, 16, 16, 4))}, r"`x` must be \[B, F, Y, X, 3\], got shape=\(2, 4, 16, 16, 4\)"),
        ({"x": jnp.zeros((2, 4, 16, 18, 3))}, "width=18 is not a multiple of 4"),
        ({"t": jnp.zeros((3,))}, r"`t` must be \[B=2\] like `x`, got shape=\(3,\)"),
        ({"label": jnp.zeros((2, 1), jnp.int32)}, r"`label` must be \[B=2\]"),
        ({"label": jnp.zeros((2,))}, "`label` must hold integers, got dtype=float32"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    x, t, label = dit_cases.inputs()
    arguments = {"x": x, "t": t, "label": label} | change
    with pytest.raises(ValueError, match=message):
        dit_cases.make_model()(**arguments)


def test_masks_and_predictor_exclude_each_other():
    with pytest.raises(ValueError, match=r"`masks` \(reuse\) or `predictor` \(refresh\), not both"):
        dit_cases.make_model()(*dit_cases.inputs(), masks=random_masks(), predictor=ExactPredictor(16))
