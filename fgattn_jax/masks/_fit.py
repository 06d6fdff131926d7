"""What a mask must look like: static facts of the constructor, and the full host-side check."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Bool, Int32

from fgattn_jax.masks._bits import WORD_BITS, full_words, num_words
from fgattn_jax.types import QUERY_BLOCKS


def is_array(leaf: Any) -> bool:
    """Whether `leaf` has a shape and a dtype; transforms also put `None`, shardings, axis numbers there."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_concrete(*arrays: Any) -> bool:
    """Whether the values of all `arrays` can be read now, that is: none of them is traced."""
    return not any(isinstance(array, core.Tracer) for array in arrays)


def check_sizes(query_block: int, num_queries: int, num_keys: int) -> None:
    """Raise `ValueError` unless the three numbers can describe a mask."""
    if query_block not in QUERY_BLOCKS:
        raise ValueError(f"expected `query_block` to be one of {QUERY_BLOCKS}, got query_block={query_block!r}")
    for name, value in (("num_queries", num_queries), ("num_keys", num_keys)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"expected `{name}` to be a Python integer known at trace time, got {name}={value!r}")
        if value < 1:
            raise ValueError(f"expected `{name}` to be at least 1, got {name}={value}")


def check_bits(bits: Any, query_block: int, num_queries: int, num_keys: int) -> None:
    """Raise `ValueError` unless rank, shape and dtype of `bits` fit the static numbers."""
    if len(bits.shape) < 4:
        raise ValueError(
            f"expected `bits` of rank 4 [B, N, R, W], or more with stacked axes in front, got shape={bits.shape}; "
            "add axes of size 1 for a batch or heads that share one mask"
        )
    num_rows = -(-num_queries // query_block)
    if bits.shape[-2] != num_rows:
        raise ValueError(
            f"expected `bits` to have R={num_rows} rows for num_queries={num_queries} and query_block={query_block}, "
            f"got R={bits.shape[-2]} in shape={bits.shape}"
        )
    if bits.shape[-1] != num_words(num_keys):
        raise ValueError(
            f"expected `bits` to have W={num_words(num_keys)} words for num_keys={num_keys} (a multiple of 4), "
            f"got W={bits.shape[-1]} in shape={bits.shape}"
        )
    if bits.dtype != np.uint32:
        raise ValueError(
            f"expected `bits` of dtype uint32, got dtype={bits.dtype}; build masks from booleans with `from_rows`"
        )


def check_order(query_order: Any, bits_shape: tuple[int, ...], num_queries: int) -> None:
    """Raise `ValueError` unless rank, shape and dtype of `query_order` fit a mask with bits of shape `bits_shape`."""
    shape = tuple(query_order.shape)
    if len(shape) != len(bits_shape) - 1:
        raise ValueError(
            f"expected `query_order` of rank {len(bits_shape) - 1} [B|1, N|1, T] (stacked axes as in `bits`), "
            f"got shape={shape} beside `bits` of shape={bits_shape}; builders also take one order of shape [T]"
        )
    if shape[-1] != num_queries:
        raise ValueError(f"expected `query_order` to have T=num_queries={num_queries} positions, got T={shape[-1]}")
    if any(a != b and 1 not in (a, b) for a, b in zip(shape[:-1], bits_shape[:-2], strict=True)):
        raise ValueError(
            f"expected the leading axes of `query_order` to be 1 or those of `bits`, got shape={shape} "
            f"beside `bits` of shape={bits_shape}"
        )
    if query_order.dtype != np.int32:
        raise ValueError(f"expected `query_order` of dtype int32, got dtype={query_order.dtype}; cast it with astype")


def check_work_order(work_order: Any, bits_shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless shape and dtype of `work_order` fit a mask with bits of shape `bits_shape`."""
    expected = (*bits_shape[:-1], 2)
    if tuple(work_order.shape) != expected:
        raise ValueError(
            f"expected `work_order` of shape={expected}, one (row, kept keys) per row of `bits`, "
            f"got shape={tuple(work_order.shape)}; make it with `with_work_order`"
        )
    if work_order.dtype != np.int32:
        raise ValueError(
            f"expected `work_order` of dtype int32, got dtype={work_order.dtype}; make it with `with_work_order`"
        )


def normal_integers(array: Any, name: str) -> Array:
    """The array as int32.

    Raises:
        ValueError: If it does not hold integers, or, unless traced, one that int32 cannot hold.
    """
    array = array if is_array(array) else np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"expected `{name}` to hold integers, got dtype={array.dtype}")
    if array.dtype.itemsize >= 4 and array.dtype != np.int32 and is_concrete(array):
        values = np.asarray(array)
        wrapped = values[values != values.astype(np.int32)]
        if wrapped.size:
            raise ValueError(f"expected `{name}` to hold numbers below 2**31, got {name}={wrapped[0]}")
        array = values.astype(np.int32)
    return jnp.asarray(array).astype(jnp.int32)


def normal_order(query_order: Any, front: tuple[int, ...], num_queries: int) -> Int32[Array, "*B N T"] | None:
    """The order as int32 of rank `len(front) + 1`; an order of shape [T] is shared by batch and heads.

    Args:
        query_order: Integers, or `None`.
        front: The axes in front of rows and words: (batch, heads), with stacked axes before them if there are any.
        num_queries: Queries (`T`).

    Raises:
        ValueError: If it does not hold integers, or its shape does not fit.
    """
    if query_order is None:
        return None
    order = normal_integers(query_order, "query_order")
    if order.ndim == 1:
        order = order.reshape((1,) * len(front) + order.shape)
    shape = order.shape
    if len(shape) != len(front) + 1 or shape[-1] != num_queries:
        raise ValueError(
            f"expected `query_order` of shape [T] or [B|1, N|1, T] (rank 1 or {len(front) + 1}) with T={num_queries}, "
            f"got shape={np.shape(query_order)}"
        )
    if any(a != b and 1 not in (a, b) for a, b in zip(shape, front, strict=False)):
        raise ValueError(
            f"expected the axes before T of `query_order` to be 1 or those of the mask, {tuple(front)}, "
            f"got shape={shape}"
        )
    return order


def normal_bools(array: Bool[Array, "..."], name: str, axes: str) -> Array:
    """The array with rank 4 or more; rank 2 is shared by batch and heads.

    Raises:
        ValueError: If it does not hold booleans, or has another rank.
    """
    if not is_array(array) or array.dtype != np.bool_:
        got = f"dtype={array.dtype}" if is_array(array) else type(array).__name__
        raise ValueError(f"expected `{name}` to be an array of booleans (True keeps), got {got}; compare with `!= 0`")
    array = jnp.asarray(array)
    if array.ndim == 2:
        return array[None, None]
    if array.ndim < 4:
        raise ValueError(
            f"expected `{name}` of shape [{axes}] (shared by batch and heads) or [B|1, N|1, {axes}], "
            f"got shape={array.shape}; add axes of size 1"
        )
    return array


def check_values(bits: Any, query_order: Any, work_order: Any, num_keys: int) -> None:
    """Raise `ValueError` if a padding bit is set or an order is wrong; reads every value on the host."""
    leaves = [leaf for leaf in (bits, query_order, work_order) if leaf is not None]
    if not all(is_array(leaf) and hasattr(leaf, "__array__") for leaf in leaves) or not is_concrete(*leaves):
        raise ValueError("`check` reads the values of a mask on the host: call it outside `jit`, on concrete arrays")
    words = np.asarray(bits)
    stray = words & ~full_words(num_keys)
    if stray.any():
        *place, word = (int(i) for i in np.argwhere(stray)[0])
        bit = int(stray[(*place, word)]).bit_length() - 1
        raise ValueError(
            f"expected every bit past num_keys={num_keys} to be zero, got key={word * WORD_BITS + bit} set in "
            f"`bits`{place} (batch, head, row); make masks with the builders, which clear the padding"
        )
    if query_order is not None:
        _check_permutation(np.asarray(query_order))
    if work_order is not None:
        _check_work(np.asarray(work_order), np.bitwise_count(words).sum(-1, dtype=np.int32))


def _check_permutation(order: np.ndarray) -> None:
    num_queries = order.shape[-1]
    wrong = (np.sort(order, axis=-1) != np.arange(num_queries)).any(axis=-1)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        line = order[place]
        outside = line[(line < 0) | (line >= num_queries)]
        if outside.size:
            found = f"query={outside[0]} out of range"
        else:
            found = f"query={np.flatnonzero(np.bincount(line, minlength=num_queries) > 1)[0]} more than once"
        raise ValueError(
            f"expected `query_order` to hold each query 0..{num_queries - 1} once, got {found} in "
            f"`query_order`{list(place)} (batch, head); see `fgattn_jax.query_order`"
        )


def _check_work(work_order: np.ndarray, counts: np.ndarray) -> None:
    rows = np.argsort(-counts, axis=-1, kind="stable")
    expected = np.stack([rows, np.take_along_axis(counts, rows, axis=-1)], axis=-1)
    wrong = (work_order != expected).any(axis=-1)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        (row, count), (right_row, right_count) = work_order[place].tolist(), expected[place].tolist()
        raise ValueError(
            f"expected `work_order`{list(place)} (batch, head, place) to be row={right_row} with count={right_count}, "
            f"got row={row} with count={count}; it was made from other bits: make it anew with `with_work_order`"
        )
