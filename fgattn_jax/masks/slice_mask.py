"""The mask container: one bit per slice (`M` neighbouring queries x 1 key)."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from fgattn_jax.masks import _bits, _fit


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
    query_block: int = dataclasses.field(kw_only=True)
    num_keys: int = dataclasses.field(kw_only=True)
    num_queries: int = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        _fit.check_sizes(self.query_block, self.num_queries, self.num_keys)
        if not _fit.is_array(self.bits):
            return
        _fit.check_bits(self.bits, self.query_block, self.num_queries, self.num_keys)
        if _fit.is_array(self.query_order):
            _fit.check_order(self.query_order, tuple(self.bits.shape), self.num_queries)

    @property
    def num_rows(self) -> int:
        """Rows (query blocks) per head: `ceil(num_queries / query_block)`."""
        return -(-self.num_queries // self.query_block)

    @property
    def nbytes(self) -> int:
        """Bytes of bits and query order together; also for the abstract mask of `jax.eval_shape`."""
        leaves = [leaf for leaf in (self.bits, self.query_order) if leaf is not None]
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
        row_of_query = jnp.argsort(self.query_order, axis=-1) // self.query_block
        return take_queries(rows, row_of_query)

    def check(self) -> Self:
        """Check the values on the host, and return the mask unchanged.

        Raises:
            ValueError: If a bit past `num_keys` is set, if `query_order` is not a permutation in some batch and head,
                or if the mask is traced. Names the first wrong place.
        """
        _fit.check_values(self.bits, self.query_order, self.num_keys)
        return self

    def _replace_bits(self, bits: Array) -> "SliceMask":
        # Not the constructor: under vmap over the batch, `bits` has lost an axis that the constructor asks for.
        return _rebuild((self.query_block, self.num_keys, self.num_queries), (bits, self.query_order))


def take_queries(values: Array, index: Int[Array, "*B N T"]) -> Array:
    """`values[..., index, :]` for `values[..., X, Y]`, with broadcasting of the axes in front."""
    front = jnp.broadcast_shapes(values.shape[:-2], index.shape[:-1])
    values = jnp.broadcast_to(values, (*front, *values.shape[-2:]))
    index = jnp.broadcast_to(index, (*front, index.shape[-1]))
    return jnp.take_along_axis(values, index[..., None], axis=-2)


def _flatten(mask: SliceMask) -> tuple[tuple[Any, Any], tuple[int, int, int]]:
    return (mask.bits, mask.query_order), (mask.query_block, mask.num_keys, mask.num_queries)


def _flatten_with_keys(mask: SliceMask) -> tuple[tuple[Any, Any], tuple[int, int, int]]:
    names = (jax.tree_util.GetAttrKey("bits"), jax.tree_util.GetAttrKey("query_order"))
    return ((names[0], mask.bits), (names[1], mask.query_order)), (mask.query_block, mask.num_keys, mask.num_queries)


def _rebuild(static: tuple[int, int, int], leaves: Any) -> SliceMask:
    mask = object.__new__(SliceMask)
    names = ("bits", "query_order", "query_block", "num_keys", "num_queries")
    for name, value in zip(names, (*leaves, *static), strict=True):
        object.__setattr__(mask, name, value)
    return mask


jax.tree_util.register_pytree_with_keys(SliceMask, _flatten_with_keys, _rebuild, _flatten)
