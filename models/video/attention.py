"""The attention seam of the video models: one call a layer, with state that the caller threads through."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fgattn_jax.attention import attention, attention_with_lse, dense_kernel_runs
from fgattn_jax.masks import SliceMask
from fgattn_jax.masks._bits import full_words, pack_rows


@dataclasses.dataclass(frozen=True)
class TextTail:
    """The text behind the video tokens of a joint attention (HunyuanVideo).

    Attributes:
        num_tokens: text tokens with padding; the last `num_tokens` of queries and keys.
        lengths: int `[B]`: text tokens that are valid, the first ones; keys behind them are never attended.
    """

    num_tokens: int
    lengths: Int[Array, " B"]


class Attended(NamedTuple):
    """What one call of an attention gives.

    Attributes:
        output: `[B, T, N, H]`.
        state: the state after the call.
    """

    output: Float[Array, "B T N H"]
    state: Any


class VideoAttention(Protocol):
    """What the models call in every self-attention (Wan) or joint attention (HunyuanVideo).

    `layer` counts these attentions from 0 in the order of the forward pass, traced. `state` is any pytree: the models
    hand on what the call before returned, and return the last one. Queries and keys are normalised and rotated.
    """

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T N H"],
        value: Float[Array, "B T N H"],
        state: Any,
        *,
        layer: Int[Array, ""],
        text: TextTail | None,
    ) -> Attended:
        """Attend; `text` is None unless text tokens stand behind the video tokens."""
        ...


def dense(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N H"],
    state: Any,
    *,
    layer: Int[Array, ""],
    text: TextTail | None,
) -> Attended:
    """Dense attention to all valid keys, by the fastest dense kernel; the state is handed on."""
    del layer
    if text is not None:
        return Attended(attention(query, key, value, valid_keys(text, query.shape[1])), state)
    if dense_kernel_runs(query, key, value):
        return Attended(attention_with_lse(query, key, value).output, state)
    return Attended(attention(query, key, value), state)


def plain(function: Callable[..., Array]) -> VideoAttention:
    """The seam around any `function(query, key, value) -> output`, all `[B, T, N, H]`.

    In a joint attention it is also given `key_value_seq_lengths`, int `[B]`, as `jax.nn.dot_product_attention` takes
    it: the number of valid keys, which stand first.

    Raises:
        ValueError: `function` is not callable; or, when a model with joint attention is traced, it does not take
            `key_value_seq_lengths`.
    """
    if not callable(function):
        raise ValueError(f"expected a function of (query, key, value) for `attention`, got {type(function).__name__}")

    def attend(query, key, value, state, *, layer, text) -> Attended:
        del layer
        if text is None:
            return Attended(function(query, key, value), state)
        if not _takes(function, "key_value_seq_lengths"):
            name = getattr(function, "__name__", type(function).__name__)
            raise ValueError(
                f"expected an attention that takes `key_value_seq_lengths` (int [B], valid keys stand first), got "
                f"{name}: this model attends to padded text; see jax.nn.dot_product_attention"
            )
        lengths = (query.shape[1] - text.num_tokens + text.lengths).astype(jnp.int32)
        return Attended(function(query, key, value, key_value_seq_lengths=lengths), state)

    return functools.wraps(function, updated=())(attend)


def valid_keys(text: TextTail, num_tokens: int, *, query_block: int = 128) -> SliceMask:
    """The mask of a joint attention that keeps every valid key: bits `[B, 1, R, W]`, in raster order.

    Args:
        text: the text behind the video tokens.
        num_tokens: video and text tokens, `T`.
        query_block: `M`.
    """
    num_rows = -(-num_tokens // query_block)
    if text.num_tokens == 0:
        words = jnp.asarray(full_words(num_tokens))[None]
    else:
        valid = jnp.arange(num_tokens) < (num_tokens - text.num_tokens + text.lengths)[:, None]
        words = pack_rows(valid)  # [B, W]
    bits = jnp.broadcast_to(words[:, None, None, :], (words.shape[0], 1, num_rows, words.shape[-1]))
    return SliceMask(bits, query_block=query_block, num_keys=num_tokens, num_queries=num_tokens)


def _takes(function: Callable, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
