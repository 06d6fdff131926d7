import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.attention import attention
from fgattn_jax.masks import SliceMask, from_rows
from fgattn_jax.models.video.attention import TextTail, dense, valid_keys
from fgattn_jax.models.video.joint_mask import join_text


class Case(NamedTuple):
    """Sizes; `shape` is the batch and heads of the bits, `order` that of the query order or None."""

    video: int
    text: int
    block: int
    lengths: tuple[int, ...]
    shape: tuple[int, int] = (2, 2)
    order: tuple[int, int] | None = None


CASES = {
    "whole rows, whole words": Case(128, 128, 64, (128, 5)),
    "video and text meet in a row": Case(100, 30, 16, (30, 7)),
    "video and text meet in a row, ordered": Case(100, 30, 16, (30, 7), order=(2, 2)),
    "one order for all heads and prompts": Case(70, 20, 32, (1, 20), order=(1, 1)),
    "one order for all heads": Case(70, 20, 32, (1, 20), order=(2, 1)),
    "one mask for all heads": Case(90, 9, 16, (9, 3), shape=(2, 1), order=(2, 2)),
    "one mask for all prompts, each with its own text": Case(90, 9, 16, (9, 0), shape=(1, 2)),
    "a prompt without text": Case(64, 40, 32, (0, 40)),
    "no prompt has text": Case(64, 40, 32, (0, 0)),
    "video ends at a word": Case(96, 33, 32, (1, 32)),
    "video ends one bit behind a word": Case(97, 31, 32, (31, 30)),
    "video ends one bit before a word": Case(95, 33, 32, (2, 33)),
    "text reaches another 16 bytes": Case(120, 20, 128, (8, 9)),
    "less video than a row": Case(5, 3, 128, (3, 1)),
    "one token each": Case(1, 1, 16, (1, 0)),
    "text longer than the video": Case(17, 300, 64, (299, 129), order=(2, 2)),
    "text in the last row only": Case(112, 16, 128, (16, 2)),
    "text of HunyuanVideo": Case(45, 256, 128, (256, 77), order=(1, 1)),
}


def make_mask(case, seed=0):
    """A random mask over the video, its rows as booleans, and the video query at each position."""
    rng = np.random.default_rng(seed)
    num_rows = -(-case.video // case.block)
    rows = rng.random((*case.shape, num_rows, case.video)) < 0.3
    rows[..., 0, :] = False
    order = None
    if case.order is not None:
        lines = [rng.permutation(case.video) for _ in range(case.order[0] * case.order[1])]
        order = np.array(lines, np.int32).reshape(*case.order, case.video)
    mask = from_rows(jnp.asarray(rows), query_block=case.block, num_queries=case.video, query_order=order)
    return mask, rows, np.arange(case.video)[None, None] if order is None else order


def tail(case):
    return TextTail(case.text, jnp.asarray(case.lengths, jnp.int32))


def joint_oracle(case, rows, order):
    """What each query sees, [B, N, T, T]: written from the words of the docstring, one query at a time."""
    batch, heads = len(case.lengths), max(case.shape[1], order.shape[1])
    num_tokens = case.video + case.text
    rows = np.broadcast_to(rows, (batch, heads, *rows.shape[2:]))
    order = np.broadcast_to(order, (batch, heads, case.video))
    seen = np.zeros((batch, heads, num_tokens, num_tokens), bool)
    for b, n, position in itertools.product(range(batch), range(heads), range(num_tokens)):
        row = position // case.block
        last = min((row + 1) * case.block, num_tokens) - 1
        valid = case.video + case.lengths[b]
        if last >= case.video:  # a text query stands in this row
            query = order[b, n, position] if position < case.video else position
            seen[b, n, query, :valid] = True
        else:
            query = order[b, n, position]
            seen[b, n, query, : case.video] = rows[b, n, row]
            seen[b, n, query, case.video : valid] = True
    return seen


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_joint_mask_is_what_each_query_should_see(case):
    mask, rows, order = make_mask(case)
    joint = join_text(mask, tail(case), case.video + case.text)
    seen = np.asarray(joint.check().to_dense())
    expected = joint_oracle(case, rows, order)
    np.testing.assert_array_equal(np.broadcast_to(seen, expected.shape), expected)
    assert joint.query_block == case.block
    assert joint.bits.shape[:2] == (len(case.lengths), case.shape[1])
    assert (joint.query_order is None) == (case.order is None)
    if case.order is not None:
        assert joint.query_order.shape[:2] == case.order
        np.testing.assert_array_equal(joint.query_order[..., case.video :] - np.arange(case.text), case.video)


def test_many_sizes_around_words_and_rows():
    rng = np.random.default_rng(7)
    sizes = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
    for number in range(14):
        text = int(rng.choice(sizes))
        case = Case(int(rng.choice(sizes)), text, int(rng.choice([16, 32, 64])), tuple(rng.integers(0, text + 1, 2)))
        mask, rows, order = make_mask(case, seed=number)
        seen = np.asarray(join_text(mask, tail(case), case.video + case.text).check().to_dense())
        np.testing.assert_array_equal(seen, joint_oracle(case, rows, order), err_msg=str(case))


def test_without_text_the_mask_stays_as_it_is():
    case = Case(100, 0, 16, (0, 0), order=(2, 2))
    mask = make_mask(case)[0].with_work_order()
    assert join_text(mask, tail(case), 100) is mask


def test_lengths_out_of_range_are_cut():
    case = Case(50, 20, 16, (-3, 25))
    mask, rows, order = make_mask(case)
    joint = join_text(mask, tail(case), 70).check()
    np.testing.assert_array_equal(joint.to_dense(), joint_oracle(case._replace(lengths=(0, 20)), rows, order))


def test_joining_compiles_once_for_all_lengths():
    case = Case(100, 30, 16, (30, 7), order=(2, 2))
    mask, rows, order = make_mask(case)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def join(mask, lengths):
        return join_text(mask, TextTail(30, lengths), 130)

    for lengths in ((30, 7), (0, 12)):
        seen = join(mask, jnp.asarray(lengths)).to_dense()
        np.testing.assert_array_equal(seen, joint_oracle(case._replace(lengths=lengths), rows, order))


def test_joining_holds_no_booleans_per_query_and_key():
    num_video, num_text = 4096, 256
    mask = SliceMask.full(query_block=128, num_queries=num_video, num_keys=num_video)
    joint = jax.jit(lambda mask, lengths: join_text(mask, TextTail(num_text, lengths), num_video + num_text))
    memory = joint.lower(mask, jnp.array([256, 3])).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 2 * (num_video + num_text)
    program = joint.lower(mask, jnp.array([256, 3])).as_text()
    assert f"{num_video + num_text}x{num_video + num_text}" not in program


@pytest.mark.parametrize("order", [None, (2, 2)], ids=["raster", "ordered"])
def test_a_full_mask_joined_is_dense_attention(order):
    case = Case(50, 14, 16, (3, 14), order=order)
    mask = make_mask(case)[0]
    full = SliceMask.full(query_block=16, num_queries=50, num_keys=50).with_query_order(mask.query_order)
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 64, 2, 8)), jnp.float32) for _ in range(3))
    joint = join_text(full, tail(case), 64)
    np.testing.assert_array_equal(
        joint.to_dense(), np.broadcast_to(valid_keys(tail(case), 64).to_dense(), joint.to_dense().shape)
    )
    sparse = attention(query, key, value, joint, implementation="xla")
    whole = dense(query, key, value, None, layer=jnp.int32(0), text=tail(case)).output
    chex.assert_trees_all_close(sparse, whole, atol=2e-6)


def test_padded_text_is_never_read():
    case = Case(50, 14, 16, (3, 0))
    joint = join_text(make_mask(case)[0], tail(case), 64)
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 64, 2, 8)), jnp.float32) for _ in range(3))
    padded = (jnp.arange(64) >= 50 + tail(case).lengths[:, None])[..., None, None]
    poisoned = attention(query, jnp.where(padded, jnp.nan, key), jnp.where(padded, jnp.nan, value), joint)
    chex.assert_trees_all_equal(poisoned, attention(query, key, value, joint))


@pytest.mark.parametrize(
    ("tokens", "text", "lengths", "message"),
    [
        (130, 20, (1, 2), "over the 110 video tokens of num_tokens=130 .*=20, got num_queries=100 and num_keys=100"),
        (120, 20, (1, 2, 3), r"bits of shape=\(2, 2, 7, 4\), got shape=\(3,\)"),
        (120, 20, 3, r"`text.lengths` \[B\].*got shape=\(\)"),
    ],
)
def test_masks_of_other_sizes_are_refused(tokens, text, lengths, message):
    mask = make_mask(Case(100, 20, 16, (1, 2)))[0]
    given = TextTail(text, jnp.asarray(lengths))
    with pytest.raises(ValueError, match=message):
        join_text(mask, given, tokens)


def test_stacked_masks_are_refused():
    mask = make_mask(Case(100, 20, 16, (1, 2)))[0]
    stacked = jax.tree.map(lambda leaf: leaf[None], mask)
    with pytest.raises(ValueError, match=r"of one layer, bits \[B, N, R, W\], got shape=\(1, 2, 2, 7, 4\): join its"):
        join_text(stacked, TextTail(20, jnp.array([1, 2])), 120)
