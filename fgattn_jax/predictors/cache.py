"""Masks kept between denoising steps: per layer and per branch of classifier-free guidance, as bits."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from fgattn_jax.masks import SliceMask
from fgattn_jax.masks._bits import num_words
from fgattn_jax.predictors import _inputs
from fgattn_jax.predictors.refresh import NEVER


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskCache:
    """The masks of all layers and branches, and how old those of each branch are.

    A pytree to carry through `lax.scan` over denoising steps. Layers lead, so that one branch is the `xs` of a scan
    over layers. Methods return a new cache; under `jit` with the cache donated or carried, bits are written in place.

    Attributes:
        mask: Bits `[L, C, B, N, R, W]` for `L` layers and `C` branches (conditional, unconditional, ...). The query
            order, if any, is held once for all layers and branches: `[1, 1, B|1, N|1, T]`.
        age: int32 `[C]`: steps since the masks of the branch were made, `-1` if they never were. Masks of a branch
            of age -1 are empty: attention with them is zero, so refresh first (`RefreshPolicy.should_refresh`
            answers True for a negative age).

    Example:
        >>> cache = MaskCache.create(num_layers=6, batch=1, num_heads=4, num_queries=512, num_keys=512, query_block=64)
        >>> cache.nbytes
        12292
        >>> masks = cache.branch(0)  # bits [6, 1, 4, 8, 16]: scan over it
        >>> cache = cache.update(0, masks).advance()
        >>> int(cache.age[0])
        1
    """

    mask: SliceMask
    age: Int32[Array, " C"]

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        batch: int,
        num_heads: int,
        num_queries: int,
        num_keys: int,
        query_block: int,
        num_branches: int = 1,
        query_order: Any = None,
    ) -> Self:
        """A cache in which no mask was made yet. Allocates the bits, the ages and one query order, nothing else.

        Args:
            num_layers: Layers, `L`.
            batch: Batch size of one branch, `B`.
            num_heads: Query heads, `N`.
            num_queries: Queries, `T`.
            num_keys: Keys, `S`.
            query_block: Queries per slice, `M`: 16, 32, 64 or 128.
            num_branches: Branches of classifier-free guidance, `C`. One branch with both in its batch works as well.
            query_order: Order of the queries that all masks share: `[T]` or `[B|1, N|1, T]`, as in the predictor.

        Raises:
            ValueError: A size is below 1, or `query_order` is not a permutation that fits.
        """
        sizes = {
            "num_layers": num_layers,
            "batch": batch,
            "num_heads": num_heads,
            "num_queries": num_queries,
            "num_keys": num_keys,
            "num_branches": num_branches,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(f"expected an integer `{name}` >= 1, got {name}={size!r}")
        _inputs.check_query_block(query_block)
        order = _inputs.order_operand(_inputs.freeze_order(query_order), batch, num_queries, num_heads)
        num_rows = -(-num_queries // query_block)
        shape = (num_layers, num_branches, batch, num_heads, num_rows, num_words(num_keys))
        mask = SliceMask(
            jnp.zeros(shape, jnp.uint32),
            None if order is None else order[None, None],
            query_block=query_block,
            num_keys=num_keys,
            num_queries=num_queries,
        )
        return cls(mask, jnp.full((num_branches,), NEVER, jnp.int32))

    @property
    def num_layers(self) -> int:
        """Layers, `L`."""
        return self.mask.bits.shape[0]

    @property
    def num_branches(self) -> int:
        """Branches, `C`."""
        return self.mask.bits.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of bits, query order and ages; also under tracing and for the result of `jax.eval_shape`."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def branch(self, branch: Int[Array, ""] | int) -> SliceMask:
        """The masks of one branch, layers leading: bits `[L, B, N, R, W]`, query order `[L, B|1, N|1, T]`.

        Args:
            branch: Which one, an integer or a traced integer. A traced one is clamped to the branches there are.

        Raises:
            ValueError: A Python integer outside `0 .. C-1`.
        """
        self._check_branch(branch)
        bits = jax.lax.dynamic_index_in_dim(self.mask.bits, branch, axis=1, keepdims=False)
        order = self.mask.query_order
        if order is not None:
            order = jnp.broadcast_to(order[0], (self.num_layers, *order.shape[2:]))
        return self._mask(bits, order)

    def update(self, branch: Int[Array, ""] | int, mask: SliceMask) -> Self:
        """This cache with new masks of one branch, whose age becomes 0.

        Args:
            branch: Which one, an integer or a traced integer. A traced one is clamped to the branches there are.
            mask: Bits `[L, B, N, R, W]` (a batch or head axis of 1 is repeated), made with the cache's query order.

        Raises:
            ValueError: `branch` is outside `0 .. C-1`, or the mask does not fit: another block, other lengths, other
                shapes, a query order where the cache has none, or none where it has one. Whether the two orders are
                equal is not compared: the values may be traced.
        """
        self._check_branch(branch)
        own = self.mask
        for name in ("query_block", "num_keys", "num_queries"):
            if getattr(mask, name) != getattr(own, name):
                raise ValueError(
                    f"expected a mask with {name}={getattr(own, name)} as in the cache, got "
                    f"{name}={getattr(mask, name)}: create the cache for these shapes"
                )
        expected = (own.bits.shape[0], *own.bits.shape[2:])
        shape = mask.bits.shape
        fits = len(shape) == len(expected) and all(
            have == want or (axis in (1, 2) and have == 1)
            for axis, (have, want) in enumerate(zip(shape, expected, strict=True))
        )
        if not fits:
            raise ValueError(
                f"expected `mask` with bits [L, B, N, R, W]={expected}, got shape={shape}: stack the layers"
            )
        if (mask.query_order is None) != (own.query_order is None):
            raise ValueError(
                "expected `mask` and cache both with or both without a query order, got "
                f"mask={'no order' if mask.query_order is None else 'an order'} and "
                f"cache={'no order' if own.query_order is None else 'an order'}: give the predictor's `query_order` "
                "to `MaskCache.create`"
            )
        bits = jax.lax.dynamic_update_index_in_dim(own.bits, jnp.broadcast_to(mask.bits, expected), branch, axis=1)
        age = self.age.at[branch].set(0, mode="clip")
        return dataclasses.replace(self, mask=self._mask(bits, own.query_order), age=age)

    def advance(self) -> Self:
        """This cache one denoising step later: masks that were made are one step older."""
        return dataclasses.replace(self, age=jnp.where(self.age < 0, self.age, self.age + 1))

    def _mask(self, bits, query_order) -> SliceMask:
        own = self.mask
        return SliceMask(
            bits, query_order, query_block=own.query_block, num_keys=own.num_keys, num_queries=own.num_queries
        )

    def _check_branch(self, branch) -> None:
        if isinstance(branch, int | np.integer) and not 0 <= branch < self.num_branches:
            raise ValueError(f"expected `branch` in 0 .. {self.num_branches - 1}, got branch={branch}")
