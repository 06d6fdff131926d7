"""The mask container: one bit per slice (`M` neighbouring queries x 1 key)."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from fgattn_jax.masks import _bits, _fit


class _Builder:
    """`SliceMask.full` is `fgattn_jax.masks.full`, and so on: looked up when used, as builders import this module."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., "SliceMask"]:
        from fgattn_jax import masks

        return getattr(masks, self.name)


@dataclasses.dataclass(frozen=True, eq=False)
class SliceMask:
    """Which keys every row (a block of `M` queries) attends to, as bits.

    Bit `s % 32` of word `s // 32` is key `s`; a set bit keeps the slice (docs/mask_format.md). A registered pytree:
    it goes through `jit`, `vmap`, `scan`, `eval_shape` and donation, and may be stacked along leading axes, as in
    `bits[L, B, N, R, W]` for scanned layers. All methods accept such stacks. Make masks with the builders of
    `fgattn_jax.masks`.

    Attributes:
        bits: The words. A batch or head axis of size 1 is shared by all of the batch or by all heads.
        query_order: `query_order[..., p]` is the query that stands at position `p` before grouping; row `r` holds
            positions `r * query_block` to `min((r + 1) * query_block, num_queries) - 1`. `None` is raster: position
            `p` is query `p`. Its batch and head axes may be 1 whatever those of `bits` are.
        work_order: (row, kept keys) of every row, most keys first, ties by lower row: the order in which the CUDA
            kernel takes the rows. `with_work_order` adds it, once for all the steps that a mask serves; no other
            function makes or keeps it. `None`: the kernel's call makes it every time. It never changes a result.
        query_block: Queries per slice (`M`): 16, 32, 64 or 128. Static.
        num_keys: Keys (`S`), at least 1. Static.
        num_queries: Queries (`T`), at least 1. Static.

    Raises:
        ValueError: If ranks, shapes or dtypes do not fit together. Values are not read: see `check`.

    References:
        FG-Attn, arXiv 2509.16518: slices of `M` queries x 1 key, section 3.
    """

    bits: UInt32[Array, "*B N R W"]
    query_order: Int32[Array, "*B N T"] | None = None
    work_order: Int32[Array, "*B N R 2"] | None = None
    query_block: int = dataclasses.field(kw_only=True)
    num_keys: int = dataclasses.field(kw_only=True)
    num_queries: int = dataclasses.field(kw_only=True)

    from_rows = _Builder()
    from_dense = _Builder()
    from_indices = _Builder()
    from_blocks = _Builder()
    full = _Builder()
    empty = _Builder()
    local_window = _Builder()
    causal = _Builder()
    keep_keys = _Builder()
    keep_lengths = _Builder()

    def __post_init__(self) -> None:
        _fit.check_sizes(self.query_block, self.num_queries, self.num_keys)
        if not _fit.is_array(self.bits):
            return
        _fit.check_bits(self.bits, self.query_block, self.num_queries, self.num_keys)
        if _fit.is_array(self.query_order):
            _fit.check_order(self.query_order, tuple(self.bits.shape), self.num_queries)
        if _fit.is_array(self.work_order):
            _fit.check_work_order(self.work_order, tuple(self.bits.shape))

    @property
    def num_rows(self) -> int:
        """Rows (query blocks) per head: `ceil(num_queries / query_block)`."""
        return -(-self.num_queries // self.query_block)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays together; also for the abstract mask of `jax.eval_shape`."""
        leaves = [leaf for leaf in (self.bits, self.query_order, self.work_order) if leaf is not None]
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    def counts(self) -> Int32[Array, "*B N R"]:
        """Kept keys of every row."""
        return _bits.count_bits(self.bits)

    def row_density(self) -> Float[Array, "*B N R"]:
        """Share of the keys that every row keeps, float32."""
        return self.counts().astype(jnp.float32) / self.num_keys

    def density(self) -> Float[Array, ""]:
        """Kept slices by all slices, float32. A last row with fewer than `query_block` queries counts as a whole."""
        return jnp.mean(self.row_density())

    def to_rows(self) -> Bool[Array, "*B N R S"]:
        """The mask as booleans per row and key, in row order."""
        return _bits.unpack_words(self.bits, self.num_keys)

    def to_dense(self) -> Bool[Array, "*B N T S"]:
        """The mask as booleans per query and key, in the natural query order. For small sizes: `T * S` bytes a head."""
        rows = self.to_rows()
        if self.query_order is None:
            return jnp.repeat(rows, self.query_block, axis=-2)[..., : self.num_queries, :]
        return take_queries(
            rows, row_of_query(self.query_order, self.query_block, self.num_queries, rank=rows.ndim - 1)
        )

    def to_indices(self, capacity: int | None = None) -> tuple[Int32[Array, "*B N R C"], Int32[Array, "*B N R"]]:
        """The kept keys of every row, ascending, and how many they are.

        Args:
            capacity: Places per row (`C`). `None` takes the largest count, which only works outside `jit`.

        Returns:
            The key numbers, filled up with `num_keys` behind the count of each row, and the counts. Under `jit`, a row
            with more than `capacity` keys keeps its first ones, and its count is `capacity`; compare with `counts`.

        Raises:
            ValueError: If `capacity` is negative, if it is `None` under `jit`, or, outside `jit`, if a row keeps more
                keys than `capacity`.
        """
        counts = self.counts()
        if capacity is not None and capacity < 0:
            raise ValueError(f"expected `capacity` to be at least 0, got capacity={capacity}")
        if _fit.is_concrete(counts):
            largest = int(np.max(np.asarray(counts)))
            if capacity is not None and largest > capacity:
                raise ValueError(
                    f"expected `capacity` of at least the largest count={largest}, got capacity={capacity}"
                )
            capacity = largest if capacity is None else capacity
        elif capacity is None:
            raise ValueError("`to_indices` needs a `capacity` under `jit`, where the largest count is not known")
        return _bits.list_keys(self.bits, self.num_keys, capacity), jnp.minimum(counts, capacity)

    def with_query_order(self, query_order: Int[Array, "..."] | None) -> "SliceMask":
        """The same rows for other queries: row `r` now stands for the queries that `query_order` puts there.

        To keep the pairs of queries and keys and group them anew, use `fgattn_jax.masks.regroup`.

        Args:
            query_order: Integers of shape [T] or `[B|1, N|1, T]`, or `None` for raster.

        Raises:
            ValueError: If it does not hold integers or has another shape.
        """
        order = _fit.normal_order(query_order, self.bits.shape[:-2], self.num_queries)
        return with_leaves(self, self.bits, order)

    def with_work_order(self) -> "SliceMask":
        """The same mask with `work_order`: its rows in the order in which the CUDA kernel takes them.

        Worth it for a mask that serves several calls, as over denoising steps: each call would otherwise read all bits
        and sort the rows' counts. Only keys below `num_keys` count. Works under `jit` and on stacked masks.
        """
        words = self.bits & _bits.full_words(self.num_keys)
        return _rebuild(
            (self.query_block, self.num_keys, self.num_queries), (self.bits, self.query_order, _work_order(words))
        )

    def check(self) -> Self:
        """Check the values on the host, and return the mask unchanged.

        Raises:
            ValueError: If a bit past `num_keys` is set, if `query_order` is not a permutation in some batch and head,
                if `work_order` is not what `with_work_order` makes from these bits, or if the mask is traced. Names
                the first wrong place.
        """
        _fit.check_values(self.bits, self.query_order, self.work_order, self.num_keys)
        return self


@functools.partial(jax.jit, inline=True)
def take_queries(values: Array, index: Int[Array, "*B N T"]) -> Array:
    """`values[..., index, :]` for `values[..., X, Y]`, with broadcasting of the axes in front."""
    front = jnp.broadcast_shapes(values.shape[:-2], index.shape[:-1])
    values = jnp.broadcast_to(values, (*front, *values.shape[-2:]))
    index = jnp.broadcast_to(index, (*front, index.shape[-1]))
    return jnp.take_along_axis(values, index[..., None], axis=-2)


@functools.partial(jax.jit, inline=True)
def _work_order(words: UInt32[Array, "*B N R W"]) -> Int32[Array, "*B N R 2"]:
    counts = _bits.count_bits(words)
    rows = jnp.argsort(counts, axis=-1, stable=True, descending=True).astype(jnp.int32)
    return jnp.stack([rows, jnp.take_along_axis(counts, rows, axis=-1)], axis=-1)


def row_of_query(
    query_order: Int32[Array, "*B N T"] | None, query_block: int, num_queries: int, *, rank: int
) -> Int32[Array, "*B N T"]:
    """The row that holds each query; the axes in front of a raster order, where it is the same for all, are 1."""
    if query_order is None:
        rows = jnp.arange(num_queries, dtype=jnp.int32) // query_block
        return rows.reshape((1,) * (rank - 1) + rows.shape)
    return (jnp.argsort(query_order, axis=-1) // query_block).astype(jnp.int32)


def with_leaves(mask: SliceMask, bits: Any, query_order: Any, *, query_block: int | None = None) -> SliceMask:
    """A mask of the same lengths with other leaves, which are not checked, and without a work order."""
    return _rebuild((query_block or mask.query_block, mask.num_keys, mask.num_queries), (bits, query_order, None))


_LEAVES = ("bits", "query_order", "work_order")


def _flatten(mask: SliceMask) -> tuple[tuple[Any, ...], tuple[int, int, int]]:
    return tuple(getattr(mask, name) for name in _LEAVES), (mask.query_block, mask.num_keys, mask.num_queries)


def _flatten_with_keys(mask: SliceMask) -> tuple[tuple[Any, ...], tuple[int, int, int]]:
    leaves, static = _flatten(mask)
    return tuple((jax.tree_util.GetAttrKey(n), x) for n, x in zip(_LEAVES, leaves, strict=True)), static


def _rebuild(static: tuple[int, int, int], leaves: Any) -> SliceMask:
    # Not the constructor: transforms put anything in the leaves, and `vmap` takes axes away from them.
    mask = object.__new__(SliceMask)
    names = (*_LEAVES, "query_block", "num_keys", "num_queries")
    for name, value in zip(names, (*leaves, *static), strict=True):
        object.__setattr__(mask, name, value)
    return mask


def _static_to_bytes(static: tuple[int, int, int]) -> bytes:
    return json.dumps([int(number) for number in static]).encode()


def _static_from_bytes(data: bytes) -> tuple[int, ...]:
    return tuple(json.loads(bytes(data)))


jax.tree_util.register_pytree_with_keys(SliceMask, _flatten_with_keys, _rebuild, _flatten)
export.register_pytree_node_serialization(
    SliceMask,
    serialized_name="fgattn_jax.SliceMask",
    serialize_auxdata=_static_to_bytes,
    deserialize_auxdata=_static_from_bytes,
)
