"""How masks differ, what probability mass a mask keeps, and how evenly its rows are filled."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from fgattn_jax.masks import _bits
from fgattn_jax.masks.algebra import common_order
from fgattn_jax.masks.slice_mask import SliceMask, take_queries

_CHUNK_QUERIES = 512  # scores in flight are [512, S] float32: 155 MB at 75 600 keys


class MaskAgreement(NamedTuple):
    """How well a mask agrees with a reference mask; shares of slices, float32, from 0 to 1.

    Attributes:
        iou: Slices kept by both by slices kept by either, over all batch entries and heads.
        recall: Slices kept by both by slices the reference keeps.
        precision: Slices kept by both by slices the mask keeps.
        head_iou: `iou` of every batch entry and head.
        head_recall: `recall` of every batch entry and head.
        head_precision: `precision` of every batch entry and head.
    """

    iou: Float[Array, ""]
    recall: Float[Array, ""]
    precision: Float[Array, ""]
    head_iou: Float[Array, "*B N"]
    head_recall: Float[Array, "*B N"]
    head_precision: Float[Array, "*B N"]


def agreement(mask: SliceMask, reference: SliceMask) -> MaskAgreement:
    """Agreement of a mask with a reference: of a predictor with exact scores, or of one denoising step with another.

    A share of nothing is 1: two empty masks agree, an empty mask is precise. Slices count alike, whatever their
    probability; `mass_recall` weighs them.

    Args:
        mask: The mask to judge.
        reference: The mask to compare with. Batch and head axes of size 1 are broadcast.

    Raises:
        ValueError: If the masks cannot be combined; see `union`.
    """
    common_order(mask, reference)
    both, either = mask.bits & reference.bits, mask.bits | reference.bits
    words = (both, either, *(jnp.broadcast_to(part.bits, both.shape) for part in (reference, mask)))
    # Rows in int32, sums over rows in float32: 24 heads of 118 800 queries hold more slices than int32 counts.
    per_head = [jnp.sum(_bits.count_bits(word).astype(jnp.float32), axis=-1) for word in words]
    per_mask = [jnp.sum(count) for count in per_head]
    return MaskAgreement(*_shares(*per_mask), *_shares(*per_head))


def _shares(both: Array, either: Array, wanted: Array, kept: Array) -> list[Array]:
    return [jnp.where(whole > 0, both / jnp.maximum(whole, 1.0), 1.0) for whole in (either, wanted, kept)]


def row_histogram(mask: SliceMask, num_bins: int = 20) -> Int32[Array, "*B N bins"]:
    """How many rows of every head keep how many keys: the load imbalance that a kernel meets.

    Args:
        mask: The mask.
        num_bins: Bins of equal width over the share of kept keys from 0 to 1; at least 1. Bin `i` counts the rows of
            which `i / num_bins` up to, not including, `(i + 1) / num_bins` of the keys are kept; the last one also
            counts full rows.

    Raises:
        ValueError: If `num_bins` is below 1.
    """
    if num_bins < 1:
        raise ValueError(f"expected `num_bins` to be at least 1, got num_bins={num_bins}")
    # The first count of each bin, in exact integers: a share in float32 may fall on the wrong side of a border.
    first_counts = np.array([-(-i * mask.num_keys // num_bins) for i in range(1, num_bins)], dtype=np.int32)
    which = jnp.sum(mask.counts()[..., None] >= first_counts, axis=-1)  # [..., N, R]
    return jnp.sum(which[..., None] == jnp.arange(num_bins), axis=-2, dtype=jnp.int32)


def mass_recall(
    mask: SliceMask,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    lse: Float[Array, "B N T"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "B N T"]:
    """The share of every query's attention probability that falls on kept keys, float32, in the natural query order.

    `sum_{s kept} exp(scale * q_t . k_s) / sum_s exp(scale * q_t . k_s)`. The mean is the recall of a head or a mask.
    Computes every score in float32, head by head and 512 queries at a time: as much work as dense attention, without
    an array of `T * S` scores.

    Args:
        mask: A mask for these lengths; its batch and head axes are 1 or those of `query`.
        query: Queries.
        key: Keys; `N` is a multiple of the `K` key heads.
        lse: Natural logarithm of the sum of exponentials per query, as `attention_with_lse` gives it for dense
            attention; computed if `None`.
        scale: Factor of the scores; `None` is `1 / sqrt(H)`.

    Raises:
        ValueError: If ranks or sizes do not fit.
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    lse = None if lse is None else jnp.asarray(lse)
    _check_mass_inputs(mask, query, key, lse)
    batch, num_queries, num_heads, width = query.shape
    heads_per_key_head = num_heads // key.shape[2]
    factor = width**-0.5 if scale is None else scale
    block, num_rows = mask.query_block, mask.num_rows
    rows_per_chunk = min(num_rows, max(1, _CHUNK_QUERIES // block))
    num_chunks = -(-num_rows // rows_per_chunk)
    padded_rows = num_chunks * rows_per_chunk

    by_head = jnp.moveaxis(query, 2, 1)  # [B, N, T, H]
    if mask.query_order is not None:
        by_head = take_queries(by_head, mask.query_order)
    by_head = jnp.pad(by_head, [(0, 0), (0, 0), (0, padded_rows * block - num_queries), (0, 0)])
    queries = by_head.reshape(batch, num_heads, num_chunks, rows_per_chunk * block, width)
    words = jnp.pad(mask.bits, [(0, 0), (0, 0), (0, padded_rows - num_rows), (0, 0)])
    words = words.reshape(*mask.bits.shape[:2], num_chunks, rows_per_chunk, -1)

    def one_head(place: Int32[Array, ""]) -> tuple[Array, ...]:
        b, n = place // num_heads, place % num_heads
        keys = key[b, :, n // heads_per_key_head].astype(jnp.float32)
        head_words = words[b if words.shape[0] > 1 else 0, n if words.shape[1] > 1 else 0]

        def one_chunk(chunk: tuple[Array, Array]) -> tuple[Array, ...]:
            chunk_queries, chunk_words = chunk
            scores = factor * jnp.matmul(
                chunk_queries.astype(jnp.float32), keys.T, precision=jax.lax.Precision.HIGHEST
            )  # [rows * M, S]
            kept = jnp.repeat(_bits.unpack_words(chunk_words, mask.num_keys), block, axis=0)
            of_kept = jax.nn.logsumexp(scores, axis=-1, where=kept)
            return (of_kept,) if lse is not None else (of_kept, jax.nn.logsumexp(scores, axis=-1))

        return jax.lax.map(one_chunk, (queries[b, n], head_words))

    parts = jax.lax.map(one_head, jnp.arange(batch * num_heads, dtype=jnp.int32))
    parts = [part.reshape(batch, num_heads, -1)[..., :num_queries] for part in parts]
    if mask.query_order is not None:
        positions = jnp.argsort(mask.query_order, axis=-1)
        parts = [take_queries(part[..., None], positions)[..., 0] for part in parts]
    of_all = parts[1] if lse is None else lse.astype(jnp.float32)
    return jnp.exp(parts[0] - of_all)


def _check_mass_inputs(mask: SliceMask, query: Array, key: Array, lse: Array | None) -> None:
    for name, array, axes in (("query", query, "B, T, N, H"), ("key", key, "B, S, K, H")):
        if array.ndim != 4:
            raise ValueError(f"expected `{name}` of rank 4 [{axes}], got shape={array.shape}")
    batch, num_queries, num_heads, width = query.shape
    if (num_queries, key.shape[1]) != (mask.num_queries, mask.num_keys):
        raise ValueError(
            f"expected a mask for T={num_queries} queries and S={key.shape[1]} keys, got "
            f"num_queries={mask.num_queries} and num_keys={mask.num_keys}"
        )
    if key.shape[0] != batch or key.shape[3] != width or num_heads % key.shape[2]:
        raise ValueError(
            f"expected `key` with B={batch}, H={width} and a number of heads that divides N={num_heads}, "
            f"got shape={key.shape}"
        )
    if mask.bits.ndim != 4 or any(a not in (1, b) for a, b in zip(mask.bits.shape, (batch, num_heads), strict=False)):
        raise ValueError(
            f"expected `bits` [B|1, N|1, R, W] with B={batch} and N={num_heads}, got shape={mask.bits.shape}"
        )
    if lse is not None and lse.shape != (batch, num_heads, num_queries):
        raise ValueError(f"expected `lse` of shape={(batch, num_heads, num_queries)} [B, N, T], got shape={lse.shape}")
