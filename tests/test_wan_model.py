"""The transformer of Wan: its parameters, the attention seam, shapes, and what it refuses."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fgattn_jax import attention as slice_attention
from fgattn_jax import masks
from fgattn_jax.models import wan
from fgattn_jax.models._leaves import named_leaves
from fgattn_jax.models.video import layers
from fgattn_jax.models.video.attention import Attended, dense, plain

CONFIG = wan.WanConfig(
    num_layers=3, num_heads=2, head_dim=16, hidden_dim=40, in_channels=4, out_channels=4, text_dim=12, time_features=8
)
LATENTS = (2, 4, 3, 6, 18)
NUM_TOKENS = 3 * 3 * 9
# Parameters that diffusers keeps in float32 when it loads in 16 bits.
KEPT = ("time_embedder", "scale_shift_table", "norm2")


def given(latents: tuple[int, ...] = LATENTS, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    text = rng.standard_normal((latents[0], 5, CONFIG.text_dim)).astype(np.float32)
    times = np.linspace(999, 200, latents[0]).astype(np.float32)
    return jnp.asarray(rng.standard_normal(latents), jnp.float32), jnp.asarray(times), wan.WanCondition(text)


@pytest.fixture(scope="module")
def model() -> wan.WanTransformer:
    return wan.random(CONFIG, dtype=jnp.float32, seed=1)


def runner(model, attention=dense):
    graph, params = nnx.split(model)
    return jax.jit(lambda *inputs, state=None: nnx.merge(graph, params)(*inputs, attention=attention, state=state))


@pytest.fixture(scope="module")
def dense_velocity(model) -> jax.Array:
    return runner(model)(*given()).velocity


@pytest.mark.parametrize(("name", "num_parameters"), [("wan-1.3b", 1_418_996_800), ("wan-14b", 14_288_491_584)])
def test_the_published_sizes_have_the_published_number_of_parameters(name, num_parameters):
    model = nnx.eval_shape(lambda: wan.WanTransformer(wan.PRESETS[name], rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == num_parameters
    assert wan.PRESETS[name].rope_dims == (44, 42, 42)


def test_sixteen_bits_leave_time_tables_and_the_affine_norm_in_float32():
    model = nnx.eval_shape(lambda: wan.WanTransformer(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    leaves = named_leaves(nnx.state(model, nnx.Param))
    for name, leaf in leaves.items():
        kept = any(part in KEPT for part in name.split("."))
        assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16), name
    assert sum(leaf.dtype == jnp.float32 for leaf in leaves.values()) == 4 + 2 + 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_velocity_has_the_shape_of_the_latents_and_the_dtype_of_the_model(dtype):
    latents, time, condition = given((1, 4, 2, 4, 2))
    output = runner(wan.random(CONFIG, dtype=dtype))(latents, time, condition)
    assert output.velocity.shape == latents.shape
    assert output.velocity.dtype == dtype
    assert output.state is None
    assert jnp.isfinite(output.velocity).all()
    assert jnp.std(output.velocity.astype(jnp.float32)) > 0.1


def test_entries_of_a_batch_do_not_know_each_other(model, dense_velocity):
    latents, time, condition = given()
    alone = runner(model)(latents[1:], time[1:], wan.WanCondition(condition.text[1:])).velocity
    chex.assert_trees_all_close(alone, dense_velocity[1:], atol=1e-5)


def test_layers_are_counted_and_the_state_goes_from_call_to_call(model, dense_velocity):
    def attention(query, key, value, state, *, layer, text):
        count, order, sums = state
        assert text is None
        assert query.shape == key.shape == value.shape == (2, NUM_TOKENS, CONFIG.num_heads, CONFIG.head_dim)
        state = count + 1, order.at[count].set(layer), sums.at[layer].set(jnp.abs(query).sum())
        return Attended(dense(query, key, value, None, layer=layer, text=None).output, state)

    start = jnp.int32(0), jnp.full(5, -1), jnp.zeros(5)
    output = runner(model, attention)(*given(), state=start)
    count, order, sums = output.state
    assert int(count) == CONFIG.num_attentions == 3
    assert order.tolist() == [0, 1, 2, -1, -1]
    assert len(set(sums[:3].tolist())) == 3
    chex.assert_trees_all_close(output.velocity, dense_velocity, atol=1e-6)


def test_any_function_of_query_key_and_value_plugs_in(model, dense_velocity):
    velocity = runner(model, plain(jax.nn.dot_product_attention))(*given()).velocity
    chex.assert_trees_all_close(velocity, dense_velocity, atol=1e-5)
    other = runner(model, plain(lambda query, key, value: value))(*given()).velocity
    assert jnp.abs(other - dense_velocity).max() > 1e-2


def masked(mask):
    return plain(lambda query, key, value: slice_attention(query, key, value, mask))


def test_a_full_mask_is_dense_attention_and_half_a_mask_is_not(model, dense_velocity):
    full = masks.full(query_block=16, num_queries=NUM_TOKENS, num_keys=NUM_TOKENS)
    velocity = runner(model, masked(full))(*given()).velocity
    chex.assert_trees_all_close(velocity, dense_velocity, atol=1e-5)
    even = jnp.broadcast_to(jnp.arange(NUM_TOKENS) % 2 == 0, (NUM_TOKENS, NUM_TOKENS))
    half = masks.from_dense(even, query_block=16)
    other = runner(model, masked(half))(*given()).velocity
    assert jnp.abs(other - dense_velocity).max() > 1e-3


def test_queries_and_keys_come_normed_and_rotated(model):
    """The norm of all heads' channels is that of the norm's scale: rotation does not change it."""

    def attention(query, key, value, state, *, layer, text):
        squares = jnp.stack([jnp.sum(x**2, (-2, -1)).mean() for x in (query, key)])
        first = jnp.stack([query[0, 0], query[0, -1]])
        state = squares, jnp.where(layer == 0, first, state[1])
        return Attended(value, state)

    start = jnp.zeros(2), jnp.zeros((2, CONFIG.num_heads, CONFIG.head_dim))
    latents, time, condition = given()
    same = jnp.broadcast_to(latents[:, :, :1, :1, :1], latents.shape)  # all tokens are the same
    squares, rows = runner(model, attention)(same, time, condition, state=start).state
    np.testing.assert_allclose(squares, CONFIG.width, rtol=1e-3)
    assert jnp.abs(rows[0] - rows[1]).max() > 0.1


def test_one_shape_is_traced_once_whatever_the_values(model):
    graph, params = nnx.split(model)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, *inputs):
        return nnx.merge(graph, params)(*inputs).velocity

    first, second = (run(params, *given((1, 4, 1, 2, 4), seed)) for seed in (0, 1))
    assert jnp.abs(first - second).max() > 1e-3


def test_the_attention_is_traced_once_for_all_layers(model):
    calls = []
    attend = plain(lambda query, key, value: calls.append(1) or value)
    graph, params = nnx.split(model)
    jax.make_jaxpr(lambda *inputs: nnx.merge(graph, params)(*inputs, attention=attend).velocity)(*given())
    assert len(calls) == 1


def test_long_videos_put_no_large_tables_into_the_program():
    grid = (21, 45, 80)
    program = jax.jit(lambda: layers.rotary_tables(grid, (44, 42, 42), 1e4, np.float64)).lower().as_text()
    assert len(program) < 200_000
    cos, sin = layers.rotary_tables((2, 3, 4), (4, 2, 2), 1e4, np.float64)
    # Frame 1, row 2, column 3 is the last token; the second frame pair turns a hundredth as fast.
    np.testing.assert_allclose(cos[-1], np.cos([1, 0.01, 2, 3]), rtol=1e-6)
    np.testing.assert_allclose(sin[-1], np.sin([1, 0.01, 2, 3]), rtol=1e-6)
    assert cos.dtype == sin.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": jnp.zeros((2, 5, 3, 6, 18))}, r"\[B, C=4, F, Y, X\], got shape=\(2, 5, 3, 6, 18\)"),
        ({"latents": jnp.zeros((4, 3, 6, 18))}, r"got shape=\(4, 3, 6, 18\)"),
        (
            {"latents": jnp.zeros((2, 4, 3, 7, 18))},
            r"whole patches, got rows=7, no multiple of 2 \(patch=\(1, 2, 2\)\)",
        ),
        ({"latents": jnp.zeros((2, 4, 1025, 2, 2))}, r"at most 1024 patches along an axis, got 1025 \(frames=1025"),
        ({"timestep": jnp.zeros(3)}, r"`timestep` of shape \[B=2\] like `latents`, got shape=\(3,\)"),
        ({"timestep": jnp.zeros((2, 8))}, r"got shape=\(2, 8\)"),
        ({"text": jnp.zeros((2, 5, 11))}, r"\[B=2, L, 12\], got shape=\(2, 5, 11\): give the hidden states"),
        ({"text": jnp.zeros((1, 5, 12))}, r"got shape=\(1, 5, 12\)"),
    ],
)
def test_arguments_that_do_not_fit_are_told_with_both_sizes(model, change, words):
    latents, time, condition = given()
    arguments = {"latents": latents, "timestep": time, "text": condition.text} | change
    with pytest.raises(ValueError, match=words):
        model(arguments["latents"], arguments["timestep"], wan.WanCondition(arguments["text"]))


def test_an_attention_that_gives_another_shape_is_refused(model):
    flat = plain(lambda query, key, value: value.reshape(*value.shape[:2], -1))
    with pytest.raises(ValueError, match=r"output of shape \[B, T, N, H\]=\(2, 81, 2, 16\), got \(2, 81, 32\)"):
        model(*given(), attention=flat)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="expected bfloat16 or float32 for `dtype`, got dtype=float16"):
        wan.random(CONFIG, dtype=jnp.float16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 0}, "`num_layers` of at least 1, got num_layers=0"),
        ({"head_dim": 6}, "even `head_dim` of at least 8 .* got head_dim=6"),
        ({"head_dim": 9}, "got head_dim=9"),
        ({"time_features": 7}, "got time_features=7"),
        ({"eps": 0.0}, "`eps` above 0, got eps=0.0"),
        ({"patch": (2, 2)}, r"got patch=\(2, 2\)"),
        ({"out_channels": 8}, "got in_channels=16, out_channels=8: this is an image-to-video"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        wan.WanConfig(**change)
