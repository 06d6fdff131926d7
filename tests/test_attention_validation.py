"""Each wrong argument has its own message, with the numbers that came and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.attention import attention, attention_with_lse, explain
from fgattn_jax.errors import UnsupportedError
from fgattn_jax.masks import SliceMask, from_rows

Q = jnp.ones((2, 48, 4, 16))
KV = jnp.ones((2, 40, 2, 16))
MASK = from_rows(jnp.ones((2, 4, 3, 40), bool), query_block=16, num_queries=48)


def raw_mask(bits=MASK.bits, query_order=None, query_block=16, num_keys=40, num_queries=48) -> SliceMask:
    """A mask that its constructor would refuse: transforms can build such ones."""
    mask = object.__new__(SliceMask)
    values = {"bits": bits, "query_order": query_order, "query_block": query_block}
    for name, value in (values | {"num_keys": num_keys, "num_queries": num_queries}).items():
        object.__setattr__(mask, name, value)
    return mask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q[0], KV, KV), r"`query` must have 4 axes \[B, T, N, H\], got shape=\(48, 4, 16\)"),
        ((Q, KV[0], KV), r"`key` must have 4 axes \[B, S, K, H\], got shape=\(40, 2, 16\)"),
        ((Q, KV, KV[..., 0]), r"`value` must have 4 axes .* got shape=\(2, 40, 2\)"),
        ((None, KV, KV), r"`query` must be an array, got NoneType"),
        ((Q[:, :0], KV, KV), r"`query` must not be empty, got shape=\(2, 0, 4, 16\)"),
        ((Q, KV[:, :0], KV[:, :0]), r"`key` must not be empty"),
        (
            (Q, KV, KV[:, :39]),
            r"`key` and `value` must have the same shape, got key=\(2, 40, 2, 16\) and value=\(2, 39",
        ),
        ((Q[:1], KV, KV), r"same batch \(axis 0\), got query=\(1, 48, 4, 16\) and key=\(2, 40, 2, 16\)"),
        ((Q[..., :8], KV, KV), r"same head width \(axis 3\), got query=\(2, 48, 4, 8\)"),
        ((Q[:, :, :3], KV, KV), r"multiple of key/value heads, got query heads 3 and key/value heads 2"),
        ((Q.astype(jnp.int32), KV, KV), r"`query` must be one of float32, bfloat16, float16, got dtype=int32"),
        ((Q, np.ones(KV.shape), KV), r"`key` must be one of .* got dtype=float64"),
        ((Q, KV.astype(jnp.bfloat16), KV), r"must have one dtype, got float32, bfloat16 and float32"),
    ],
)
@pytest.mark.parametrize("function", [attention, attention_with_lse, explain])
def test_arrays_that_do_not_fit_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (jnp.ones((2, 4, 48, 40), bool), r"`mask` must be a SliceMask or None, got \w+; .*from_dense"),
        (raw_mask(query_block=48), r"`mask.query_block` must be one of \(16, 32, 64, 128\), got query_block=48"),
        (raw_mask(num_queries=47), r"made for num_queries=47, but the arrays have num_queries=48"),
        (raw_mask(num_keys=41), r"made for num_keys=41, but the arrays have num_keys=40"),
        (
            raw_mask(bits=MASK.bits[None]),
            r"`mask.bits` must have 4 axes .* got shape=\(1, 2, 4, 3, 4\); take one layer",
        ),
        (raw_mask(bits=MASK.bits[:, :, :2]), r"must end in \[R, W\] = \(3, 4\), got shape=\(2, 4, 2, 4\)"),
        (raw_mask(bits=MASK.bits[..., :2]), r"must end in \[R, W\] = \(3, 4\), got shape=\(2, 4, 3, 2\)"),
        (raw_mask(bits=jnp.concatenate([MASK.bits] * 2)[:3]), r"`mask.bits` must have 1 or 2 entries along batch, got"),
        (
            raw_mask(bits=MASK.bits[:, :3]),
            r"`mask.bits` must have 1 or 4 entries along heads, got shape=\(2, 3, 3, 4\)",
        ),
        (raw_mask(bits=MASK.bits.astype(jnp.int32)), r"`mask.bits` must be uint32, got dtype=int32"),
        (
            raw_mask(query_order=jnp.zeros((1, 1, 47), jnp.int32)),
            r"must be \[B\|1, N\|1, T=48\], got shape=\(1, 1, 47\)",
        ),
        (raw_mask(query_order=jnp.zeros((1, 1, 48))), r"`mask.query_order` must be int32, got dtype=float32"),
        (
            raw_mask(query_order=jnp.zeros((1, 3, 48), jnp.int32)),
            r"`mask.query_order` must have 1 or 4 entries along he",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        attention(Q, KV, KV, mask)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (float("nan"), r"`scale` must be finite, got scale=nan"),
        ("0.1", r"`scale` must be a Python number or None, got str"),
        (jnp.float32(0.1), r"`scale` must be a Python number or None, got \w+; multiply `query`"),
    ],
)
def test_scales_that_are_no_numbers_are_refused(scale, message):
    with pytest.raises(ValueError, match=message):
        attention(Q, KV, KV, MASK, scale=scale)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"one of cuda, pallas, xla, reference or None, got implementation='triton'"):
        attention(Q, KV, KV, MASK, implementation="triton")


@pytest.mark.parametrize("name", ["cuda", "pallas"])
def test_a_named_implementation_runs_or_says_every_reason(name):
    with pytest.raises(UnsupportedError) as caught:
        attention(Q, KV, KV, MASK, implementation=name)
    message = str(caught.value)
    assert f"implementation='{name}' cannot run this call" in message
    for part in ("platform='cpu'", "dtype='float32'", "head_dim=16", "query_block=16", "implementation='xla'"):
        assert part in message


def test_kernels_without_a_mask_say_where_dense_attention_runs():
    with pytest.raises(UnsupportedError, match="dense, and `xla` takes the fastest dense path"):
        attention(Q, KV, KV, implementation="cuda")


def test_reference_refuses_large_calls():
    large = jax.ShapeDtypeStruct((1, 40000, 4, 16), jnp.float32)
    with pytest.raises(
        UnsupportedError, match=r"scores=6400000000 here, and stops at 268435456; `xla` has no such limit"
    ):
        jax.eval_shape(lambda q: attention(q, q, q, implementation="reference"), large)


def test_checks_run_under_jit_too():
    with pytest.raises(ValueError, match="made for num_queries=48"):
        jax.jit(attention)(Q[:, :40], KV, KV, MASK)
