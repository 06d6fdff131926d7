import chex
import hunyuan_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fgattn_jax.attention import attention_with_lse
from fgattn_jax.masks import SliceMask
from fgattn_jax.models._leaves import leaf_name
from fgattn_jax.models.hunyuan_video import HunyuanVideoCondition, text_lengths
from fgattn_jax.models.video.attention import Attended, dense, plain, valid_keys

TINY, NUM_TEXT, NUM_TOKENS = hunyuan_cases.TINY, hunyuan_cases.NUM_TEXT, hunyuan_cases.NUM_TOKENS


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_velocity_has_the_shape_of_the_latents_and_the_dtype_of_the_model(dtype):
    model = hunyuan_cases.make_model(dtype)
    latents, timestep, condition = hunyuan_cases.make_inputs()
    velocity, state = jax.eval_shape(hunyuan_cases.compiled(model), latents, timestep, condition)
    assert velocity.shape == latents.shape
    assert velocity.dtype == dtype
    assert state is None
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(dtype)}


def test_every_input_counts():
    run = hunyuan_cases.compiled(hunyuan_cases.make_model())
    latents, timestep, condition = hunyuan_cases.make_inputs()
    velocity = run(latents, timestep, condition).velocity
    assert bool(jnp.isfinite(velocity).all())
    changed = {
        "latents": (latents + 0.1, timestep, condition),
        "timestep": (latents, timestep + 1, condition),
        "valid text": (latents, timestep, condition._replace(text=condition.text.at[:, 0].add(1))),
        "lengths": (latents, timestep, condition._replace(lengths=condition.lengths + jnp.array([1, -1]))),
        "pooled": (latents, timestep, condition._replace(pooled=condition.pooled + 1)),
        "guidance": (latents, timestep, condition._replace(guidance=jnp.array([6.001, 3.001]))),
    }
    for name, arguments in changed.items():
        apart = jnp.abs(run(*arguments).velocity - velocity).max(axis=(1, 2, 3, 4))
        assert float(apart.min()) > 1e-4, name


@pytest.mark.parametrize(
    "attention", [dense, plain(jax.nn.dot_product_attention)], ids=["dense", "jax.nn.dot_product_attention"]
)
def test_padded_text_changes_nothing(attention):
    run = hunyuan_cases.compiled(hunyuan_cases.make_model(), attention)
    latents, timestep, condition = hunyuan_cases.make_inputs(lengths=(1, 4))
    velocity = run(latents, timestep, condition).velocity
    padded = jnp.arange(NUM_TEXT) >= condition.lengths[:, None]
    for value in (100.0, jnp.nan):
        text = jnp.where(padded[..., None], value, condition.text)
        chex.assert_trees_all_equal(run(latents, timestep, condition._replace(text=text)).velocity, velocity)


def test_padded_tokens_are_never_attended():
    """What the joint attention gives for padded text becomes NaN, and with it all keys and values made from it."""

    def poison(query, key, value, state, *, layer, text):
        attended = dense(query, key, value, state, layer=layer, text=text)
        padded = jnp.arange(query.shape[1]) >= (query.shape[1] - text.num_tokens + text.lengths)[:, None]
        seen = jnp.where(padded[..., None, None], jnp.nan, attended.output)
        return Attended(seen, state + jnp.isnan(key).any())

    model, inputs = hunyuan_cases.make_model(), hunyuan_cases.make_inputs(lengths=(1, 4))
    poisoned = hunyuan_cases.compiled(model, poison)(*inputs, jnp.int32(0))
    assert int(poisoned.state) == TINY.num_attentions - 1  # every layer but the first was given NaN keys
    chex.assert_trees_all_equal(poisoned.velocity, hunyuan_cases.compiled(model)(*inputs).velocity)


def test_no_valid_text_is_no_text():
    run = hunyuan_cases.compiled(hunyuan_cases.make_model())
    latents, timestep, condition = hunyuan_cases.make_inputs(lengths=(0, 2))
    velocity = run(latents, timestep, condition).velocity
    assert bool(jnp.isfinite(velocity).all())
    other = run(latents, timestep, condition._replace(text=condition.text + 1)).velocity
    chex.assert_trees_all_equal(other[0], velocity[0])
    assert float(jnp.abs(other[1] - velocity[1]).max()) > 1e-4


def test_batch_entries_do_not_see_each_other():
    run = hunyuan_cases.compiled(hunyuan_cases.make_model())
    latents, timestep, condition = hunyuan_cases.make_inputs(lengths=(3, NUM_TEXT))
    both = run(latents, timestep, condition).velocity
    for entry in range(2):
        one = slice(entry, entry + 1)
        alone = run(latents[one], timestep[one], HunyuanVideoCondition(*(part[one] for part in condition)))
        chex.assert_trees_all_close(alone.velocity, both[one], atol=2e-5)


def test_plain_attention_equals_dense():
    model, inputs = hunyuan_cases.make_model(), hunyuan_cases.make_inputs(lengths=(2, 5))
    by_jax = hunyuan_cases.compiled(model, plain(jax.nn.dot_product_attention))(*inputs).velocity
    chex.assert_trees_all_close(by_jax, hunyuan_cases.compiled(model)(*inputs).velocity, atol=2e-5)


def test_attention_under_a_full_mask_equals_dense():
    def masked(query, key, value, state, *, layer, text):
        assert isinstance(state, SliceMask)
        return Attended(attention_with_lse(query, key, value, state, implementation="xla").output, state)

    model, inputs = hunyuan_cases.make_model(), hunyuan_cases.make_inputs(lengths=(NUM_TEXT, NUM_TEXT))
    full = SliceMask.full(query_block=16, num_queries=NUM_TOKENS, num_keys=NUM_TOKENS)
    output = hunyuan_cases.compiled(model, masked)(*inputs, full)
    chex.assert_trees_all_close(output.velocity, hunyuan_cases.compiled(model)(*inputs).velocity, atol=2e-5)
    chex.assert_trees_all_equal(output.state.bits, full.bits)


def test_attention_is_called_in_the_order_of_layers_with_the_state_of_the_call_before():
    seen = []

    def count(query, key, value, state, *, layer, text):
        number, layers, sums = state
        seen.append((query.shape, key.shape, value.shape, text.num_tokens))
        state = (number + 1, layers.at[number].set(layer), sums.at[number].set(jnp.abs(query).sum()))
        return Attended(dense(query, key, value, None, layer=layer, text=text).output, state)

    num = TINY.num_attentions
    start = (jnp.int32(0), jnp.full(num, -1), jnp.zeros(num))
    inputs = hunyuan_cases.make_inputs()
    number, layers, sums = hunyuan_cases.compiled(hunyuan_cases.make_model(), count)(*inputs, start).state
    assert int(number) == num == 5
    assert layers.tolist() == list(range(num))
    assert len(set(sums.tolist())) == num  # other queries in every layer
    assert set(seen) == {((2, NUM_TOKENS, 2, 8),) * 3 + (NUM_TEXT,)}


def test_queries_and_keys_have_unit_size_where_their_norms_have_no_gain():
    graph, params = nnx.split(hunyuan_cases.make_model())

    def without_gain(path, leaf):
        return jnp.ones_like(leaf) if {"norm_q", "norm_k"} & set(leaf_name(path).split(".")) else leaf

    def check(query, key, value, state, *, layer, text):
        sizes = jnp.mean(jnp.stack([query, key]) ** 2, axis=-1)
        return dense(query, key, value, jnp.maximum(state, jnp.abs(sizes - 1).max()), layer=layer, text=text)

    model = nnx.merge(graph, jax.tree_util.tree_map_with_path(without_gain, params))
    assert float(hunyuan_cases.compiled(model, check)(*hunyuan_cases.make_inputs(), jnp.float32(0)).state) < 1e-3


def test_one_trace_per_shape():
    graph, params = nnx.split(hunyuan_cases.make_model())

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, latents, timestep, condition):
        return nnx.merge(graph, params)(latents, timestep, condition).velocity

    for lengths, seed in (((1, NUM_TEXT), 0), ((4, 2), 1)):
        run(params, *hunyuan_cases.make_inputs(lengths, seed))


def test_wide_text_beside_the_video_is_allowed():
    """Rows of the default mask straddle video and text, and text is longer than a row."""
    latents, timestep, condition = hunyuan_cases.make_inputs(lengths=(140, 1))
    text = jnp.tile(condition.text, (1, 21, 1))  # 147 tokens
    run = hunyuan_cases.compiled(hunyuan_cases.make_model())
    velocity = run(latents, timestep, condition._replace(text=text)).velocity
    assert bool(jnp.isfinite(velocity).all())
    mask = valid_keys(hunyuan_cases.tail(147, (140, 1)), 45 + 147)
    assert mask.counts()[:, 0, 0].tolist() == [45 + 140, 45 + 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": jnp.zeros((2, 5, 3, 6, 10))}, r"`latents` \[B, C=4, F, Y, X\], got shape=\(2, 5, 3, 6, 10\)"),
        ({"latents": jnp.zeros((2, 4, 6, 10))}, r"`latents` \[B, C=4, F, Y, X\], got shape=\(2, 4, 6, 10\)"),
        ({"latents": jnp.zeros((2, 4, 3, 5, 10))}, "rows a multiple of 2, got rows=5"),
        ({"latents": jnp.zeros((2, 4, 3, 6, 11))}, "columns a multiple of 2, got columns=11"),
        ({"timestep": jnp.zeros(())}, r"`timestep` \[B=2\] like `latents`, got shape=\(\)"),
        ({"text": jnp.zeros((2, 7, 11))}, r"`condition.text` \[B=2, S, 12\] with S of at least 1, got shape=\(2, 7, 1"),
        ({"text": jnp.zeros((1, 7, 12))}, r"`condition.text` \[B=2, S, 12\].*got shape=\(1, 7, 12\)"),
        ({"text": jnp.zeros((2, 0, 12))}, r"S of at least 1, got shape=\(2, 0, 12\)"),
        ({"lengths": jnp.zeros((3,), jnp.int32)}, r"`condition.lengths` \[B=2\] like `latents`, got shape=\(3,\)"),
        ({"lengths": jnp.ones((2,), bool)}, "`condition.lengths` to hold integers, got dtype=bool: make them from a"),
        ({"pooled": jnp.zeros((2, 12))}, r"`condition.pooled` \[B=2, 10\], got shape=\(2, 12\)"),
        ({"guidance": None}, r"`condition.guidance` \[B\], the guidance scale, got None"),
        ({"guidance": jnp.zeros((2, 1))}, r"`condition.guidance` \[B=2\] like `latents`, got shape=\(2, 1\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    latents, timestep, condition = hunyuan_cases.make_inputs()
    given = {"latents": latents, "timestep": timestep, **condition._asdict()} | change
    condition = HunyuanVideoCondition(*(given[name] for name in HunyuanVideoCondition._fields))
    with pytest.raises(ValueError, match=message):
        hunyuan_cases.make_model()(given["latents"], given["timestep"], condition)


def test_attention_that_cannot_leave_padding_out_is_refused():
    def every_key(query, key, value):
        return value

    with pytest.raises(ValueError, match=r"takes `key_value_seq_lengths`.*got every_key: this model attends to padded"):
        hunyuan_cases.make_model()(*hunyuan_cases.make_inputs(), attention=plain(every_key))


def test_guidance_is_refused_by_a_model_that_takes_none():
    config = hunyuan_cases.without_guidance()
    latents, timestep, condition = hunyuan_cases.make_inputs(config=config)
    model = hunyuan_cases.make_model(config=config)
    assert model.cond.guidance is None
    assert hunyuan_cases.compiled(model)(latents, timestep, condition).velocity.shape == latents.shape
    with pytest.raises(ValueError, match=r"`condition.guidance` to be None, got shape=\(2,\): this model takes no"):
        model(latents, timestep, condition._replace(guidance=jnp.zeros(2)))


def test_text_lengths_count_valid_text():
    mask = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    lengths = text_lengths(mask)
    assert lengths.tolist() == [2, 3, 0]
    assert lengths.dtype == np.int32
    assert text_lengths(mask.astype(bool)).tolist() == [2, 3, 0]


def test_text_lengths_refuse_padding_in_front():
    with pytest.raises(
        ValueError, match="valid text to stand first in the mask, got padding before it in batch entry 1"
    ):
        text_lengths(np.array([[1, 1, 0], [0, 1, 1]]))
    with pytest.raises(ValueError, match=r"a text mask \[B, S\], got shape=\(3,\)"):
        text_lengths(np.array([1, 1, 0]))
