"""Masks of a joint attention from masks over the video: text behind the video is always attended, padding never."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32

from fgattn_jax.masks import SliceMask
from fgattn_jax.masks._bits import num_words, pack_rows
from fgattn_jax.models.video.attention import TextTail


def join_text(mask: SliceMask, text: TextTail, num_tokens: int) -> SliceMask:
    """The mask of a joint attention over video and text tokens, from a mask over the video tokens.

    A row of video queries keeps what it kept and every valid text key. A row with a text query keeps every valid key:
    also the row in which video and text meet where `M` does not divide the number of video tokens, and rows of padding,
    whose output means nothing. Padded text keys are kept by no row.

    Args:
        mask: over the video tokens, queries and keys both: bits `[B|1, N|1, Rv, Wv]`.
        text: the text behind them; `lengths` out of range are cut.
        num_tokens: video and text tokens, `T`.

    Returns:
        Bits `[B, N|1, R, W]` with the `query_block` of `mask`, and its query order with the text in place behind it.
        Without text it is `mask`. A work order is not kept.

    Raises:
        ValueError: the mask is stacked over layers, is not over the video tokens, or is of another batch than `text`.

    Note:
        Works on words: what it holds beside the result is of size `B * T`.
    """
    num_video = num_tokens - text.num_tokens
    _check(mask, text, num_tokens, num_video)
    if text.num_tokens == 0:
        return mask
    bits = _join_bits(mask.bits, text.lengths, num_video, text.num_tokens, mask.query_block)
    order = mask.query_order
    if order is not None:
        behind = jnp.arange(num_video, num_tokens, dtype=jnp.int32)
        behind = jnp.broadcast_to(behind, (*order.shape[:-1], text.num_tokens))
        order = jnp.concatenate([order, behind], axis=-1)
    return SliceMask(bits, order, query_block=mask.query_block, num_keys=num_tokens, num_queries=num_tokens)


@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _join_bits(
    bits: UInt32[Array, "B N Rv Wv"], lengths: Int32[Array, " B"], num_video: int, num_text: int, query_block: int
) -> UInt32[Array, "B N R W"]:
    num_tokens = num_video + num_text
    video_rows = num_video // query_block  # those without a text query
    key = jnp.arange(num_tokens)
    valid = key < num_video + jnp.clip(lengths, 0, num_text)[:, None]  # [B, T]
    every_key = pack_rows(valid)[:, None, None, :]  # [B, 1, 1, W]
    text_keys = pack_rows(valid & (key >= num_video))[:, None, None, :]
    words = num_words(num_tokens)
    wide = jnp.pad(bits[..., :video_rows, :], [(0, 0)] * 3 + [(0, words - bits.shape[-1])])
    above = wide | text_keys  # [B, N, video_rows, W]
    text_rows = -(-num_tokens // query_block) - video_rows
    below = jnp.broadcast_to(every_key, (*above.shape[:2], text_rows, words))
    return jnp.concatenate([above, below], axis=-2)


def _check(mask: SliceMask, text: TextTail, num_tokens: int, num_video: int) -> None:
    if mask.bits.ndim != 4:
        raise ValueError(
            f"expected `mask` of one layer, bits [B, N, R, W], got shape={mask.bits.shape}: join its layers one by one"
        )
    if (mask.num_queries, mask.num_keys) != (num_video, num_video):
        raise ValueError(
            f"expected `mask` over the {num_video} video tokens of num_tokens={num_tokens} with "
            f"text.num_tokens={text.num_tokens}, got num_queries={mask.num_queries} and num_keys={mask.num_keys}: make "
            "it from the queries and keys of the video alone"
        )
    if text.lengths.ndim != 1 or mask.bits.shape[0] not in (1, text.lengths.shape[0]):
        raise ValueError(
            f"expected `text.lengths` [B] with the batch of `mask`, bits of shape={mask.bits.shape}, got "
            f"shape={text.lengths.shape}"
        )
