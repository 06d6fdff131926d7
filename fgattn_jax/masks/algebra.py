"""Masks from masks: union, intersection, difference, and the same pairs in other rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from fgattn_jax.masks import _fit
from fgattn_jax.masks.slice_mask import SliceMask, row_of_query, take_queries, with_leaves


def union(first: SliceMask, second: SliceMask) -> SliceMask:
    """The slices that either mask keeps. Batch and head axes of size 1 are broadcast.

    Raises:
        ValueError: If the masks differ in `query_block`, lengths, or query order, or their batch or heads do not fit.
            Orders are compared by value outside `jit`; under `jit` they cannot be compared, and the first one is taken.
    """
    order = common_order(first, second)
    return with_leaves(first, first.bits | second.bits, order)


def intersection(first: SliceMask, second: SliceMask) -> SliceMask:
    """The slices that both masks keep. Broadcasting and errors are those of `union`."""
    order = common_order(first, second)
    return with_leaves(first, first.bits & second.bits, order)


def difference(first: SliceMask, second: SliceMask) -> SliceMask:
    """The slices that the first mask keeps and the second skips. Broadcasting and errors are those of `union`.

    The complement of a mask is its difference from `full`.
    """
    order = common_order(first, second)
    return with_leaves(first, first.bits & ~second.bits, order)  # the first mask's padding is zero, so is the result's


def regroup(mask: SliceMask, *, query_block: int, query_order: Int[Array, "..."] | None) -> SliceMask:
    """The same pairs of queries and keys in rows of another size or order.

    A new row keeps a key if any of its queries did: the mask is a superset, and equal where new rows lie within old
    ones. Needs `T * S / 8` bytes a head on the way.

    Args:
        mask: The mask to regroup.
        query_block: Queries per new slice (`M`): 16, 32, 64 or 128.
        query_order: Integers of shape [T] or `[B|1, N|1, T]`, or `None` for raster.

    Raises:
        ValueError: For an unsupported `query_block` or an order that does not fit.
    """
    _fit.check_sizes(query_block, mask.num_queries, mask.num_keys)
    order = _fit.normal_order(query_order, mask.bits.shape[:-2], mask.num_queries)
    rows = row_of_query(mask.query_order, mask.query_block, mask.num_queries, rank=mask.bits.ndim - 1)
    if order is not None:
        rows = take_queries(rows[..., None], order)[..., 0]
    words = take_queries(mask.bits, rows)  # [..., T, W]
    num_rows = -(-mask.num_queries // query_block)
    padding = [(0, 0)] * (words.ndim - 2) + [(0, num_rows * query_block - mask.num_queries), (0, 0)]
    grouped = jnp.pad(words, padding).reshape(*words.shape[:-2], num_rows, query_block, words.shape[-1])
    bits = jax.lax.reduce(grouped, np.uint32(0), jax.lax.bitwise_or, (grouped.ndim - 2,))
    return with_leaves(mask, bits, order, query_block=query_block)


def common_order(first: SliceMask, second: SliceMask) -> Array | None:
    """The query order of both masks, once it is sure that they can be combined.

    Raises:
        ValueError: As `union` says.
    """
    for name in ("query_block", "num_queries", "num_keys"):
        numbers = getattr(first, name), getattr(second, name)
        if numbers[0] != numbers[1]:
            cure = "; bring one into the rows of the other with `regroup`" if name == "query_block" else ""
            raise ValueError(f"expected two masks of the same `{name}`, got {name}={numbers[0]} and {numbers[1]}{cure}")
    shapes = first.bits.shape, second.bits.shape
    if len(shapes[0]) != len(shapes[1]) or any(
        a != b and 1 not in (a, b) for a, b in zip(shapes[0][:-2], shapes[1][:-2], strict=True)
    ):
        raise ValueError(
            f"expected two masks whose axes before [R, W] are equal or 1, got `bits` of shape={shapes[0]} "
            f"and shape={shapes[1]}"
        )
    orders = first.query_order, second.query_order
    if not _may_be_equal(*orders):
        described = [_describe(order) for order in orders]
        raise ValueError(
            f"expected two masks of the same query order, got {described[0]} and {described[1]}; build both with one "
            "`query_order`, or bring one into the rows of the other with `regroup`"
        )
    if orders[0] is None or orders[1] is None or orders[0].shape == orders[1].shape:
        return orders[0]
    return jnp.broadcast_to(orders[0], jnp.broadcast_shapes(orders[0].shape, orders[1].shape))


def _may_be_equal(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if first is None or second is None:
        return False
    if any(a != b and 1 not in (a, b) for a, b in zip(first.shape, second.shape, strict=True)):
        return False
    if not _fit.is_concrete(first, second):
        return True
    return bool((np.asarray(first) == np.asarray(second)).all())


def _describe(order: Any) -> str:
    return "query_order=None (raster)" if order is None else f"an order of shape={order.shape}"
