"""Bits of a mask: packing booleans into 32-bit words and back (docs/mask_format.md).

Compiled as wholes, so that they cost one compilation each outside `jit`; inlined inside.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt32

WORD_BITS = 32
ROW_ALIGN_WORDS = 4  # a row of words is a multiple of 16 bytes, so that kernels load it in 16-byte pieces


def num_words(num_keys: int) -> int:
    """Words per row for `num_keys` keys, rounded up to a multiple of 16 bytes."""
    words = -(-num_keys // WORD_BITS)
    return -(-words // ROW_ALIGN_WORDS) * ROW_ALIGN_WORDS


def full_words(num_keys: int) -> np.ndarray:
    """The `uint32[W]` words of a row that keeps every key: ones below `num_keys`, zeros in the padding."""
    first_key = np.arange(num_words(num_keys), dtype=np.int64) * WORD_BITS
    used = np.clip(num_keys - first_key, 0, WORD_BITS).astype(np.uint64)
    return ((np.uint64(1) << used) - np.uint64(1)).astype(np.uint32)


@functools.partial(jax.jit, inline=True)
def pack_rows(rows: Bool[Array, "... S"]) -> UInt32[Array, "... W"]:
    """Pack booleans over keys into words, little bit first; bits past `S` are zero."""
    num_keys = rows.shape[-1]
    words = num_words(num_keys)
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, words * WORD_BITS - num_keys)]
    bits = jnp.pad(rows, padding).reshape(*rows.shape[:-1], words, WORD_BITS)
    weights = jnp.left_shift(jnp.uint32(1), jnp.arange(WORD_BITS, dtype=jnp.uint32))
    return jnp.sum(jnp.where(bits, weights, jnp.uint32(0)), axis=-1, dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnames="num_keys", inline=True)
def unpack_words(words: UInt32[Array, "... W"], num_keys: int) -> Bool[Array, "... S"]:
    """Unpack words into booleans over the first `num_keys` keys."""
    shifts = jnp.arange(WORD_BITS, dtype=jnp.uint32)
    bits = jnp.right_shift(words[..., None], shifts) & jnp.uint32(1)
    return (bits != 0).reshape(*words.shape[:-1], -1)[..., :num_keys]


@functools.partial(jax.jit, static_argnames=("num_keys", "capacity"), inline=True)
def list_keys(words: UInt32[Array, "... W"], num_keys: int, capacity: int) -> Int32[Array, "... C"]:
    """The first `capacity` kept keys of every row, ascending, filled up with `num_keys`."""
    in_word = jax.lax.population_count(words).astype(jnp.int32)
    # Sums over words, not over keys: 32 times fewer, and XLA's cumulative sums are slow on a CPU.
    up_to_word = jnp.cumsum(in_word, axis=-1, dtype=jnp.int32)
    places = jnp.arange(capacity, dtype=jnp.int32)
    find = jnp.vectorize(lambda sums: jnp.searchsorted(sums, places, side="right"), signature="(w)->(c)")
    word = find(up_to_word).astype(jnp.int32)  # the one that holds the key of each place; W behind the last key
    inside = jnp.minimum(word, words.shape[-1] - 1)
    before = jnp.take_along_axis(up_to_word - in_word, inside, axis=-1)
    bit = _select_bit(jnp.take_along_axis(words, inside, axis=-1), places - before)
    return jnp.where(word < words.shape[-1], word * WORD_BITS + bit, num_keys)


def _select_bit(words: UInt32[Array, "..."], rank: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """The place of the set bit that has `rank` set bits below it, by halving."""
    place = jnp.zeros_like(rank)
    for width in (16, 8, 4, 2, 1):
        in_low_half = jax.lax.population_count(words & jnp.uint32((1 << width) - 1)).astype(jnp.int32)
        above = rank >= in_low_half
        rank = jnp.where(above, rank - in_low_half, rank)
        words = jnp.where(above, words >> width, words)
        place = place + jnp.where(above, width, 0)
    return place


@functools.partial(jax.jit, inline=True)
def count_bits(words: UInt32[Array, "... W"]) -> Int32[Array, "..."]:
    """Number of set bits per row of words."""
    return jnp.sum(jax.lax.population_count(words), axis=-1, dtype=jnp.int32)
