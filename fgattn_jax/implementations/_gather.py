"""From bits to gathered tiles: the parts that the forward and the backward loop of `xla` share."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from fgattn_jax.masks._bits import WORD_BITS


def running_counts(words: UInt32[Array, "P W"]) -> Int32[Array, "P W"]:
    """Kept keys in each word and the words before it."""
    return jnp.cumsum(jax.lax.population_count(words).astype(jnp.int32), axis=-1)


def select_keys(
    words: UInt32[Array, "P W"], cumulative: Int32[Array, "P W"], ranks: Int32[Array, " C"]
) -> Int32[Array, "P C"]:
    """Return, for each row of words, the key numbers of the kept keys with the given ranks (0 is the first).

    `cumulative` is `running_counts(words)`. Two searches instead of a list of all keys: the word by bisection over
    running counts, then the bit inside the word by halving. Cost and memory follow the ranks asked for. Ranks past a
    row's count give some number in `0 .. 32 * W - 1`; the caller masks them.
    """
    num_rows, num_words = words.shape
    flat_words, flat_cumulative = words.reshape(-1), cumulative.reshape(-1)
    base = (jnp.arange(num_rows, dtype=jnp.int32) * num_words)[:, None]
    word = jnp.zeros((num_rows, ranks.shape[0]), jnp.int32)
    step = 1 << max(0, num_words - 1).bit_length()
    while step:
        probe = word + (step - 1)
        inside = jnp.take(flat_cumulative, base + jnp.minimum(probe, num_words - 1), mode="clip") <= ranks
        word = jnp.where((probe < num_words) & inside, word + step, word)
        step //= 2
    word = jnp.minimum(word, num_words - 1)
    chosen = jnp.take(flat_words, base + word, mode="clip")
    counted = jnp.take(flat_cumulative, base + word, mode="clip")
    rank = ranks - (counted - jax.lax.population_count(chosen).astype(jnp.int32))
    bit = jnp.zeros_like(word)
    half = WORD_BITS // 2
    while half:
        low = jax.lax.population_count(chosen & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
        upper = rank >= low
        chosen = jnp.where(upper, chosen >> half, chosen)
        rank = jnp.where(upper, rank - low, rank)
        bit = jnp.where(upper, bit + half, bit)
        half //= 2
    return word * WORD_BITS + bit


def varying_axes(x: Array) -> frozenset[str]:
    """Mesh axes over which `x` differs inside `shard_map` (the attribute's name depends on the JAX release)."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def vary_like(x: Array, *references: Array) -> Array:
    """Give `x` the varying mesh axes of `references`: inside `shard_map` a loop's carry must start with them."""
    axes = frozenset().union(*map(varying_axes, references)) - varying_axes(x)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Index arithmetic between `[B, T, N, H]` arrays and the flat list of `G = B * N * R` rows.

    Mask arrays may have size 1 along batch or heads; `query_order` is None in raster order.
    """

    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    query_block: int

    @property
    def rows_per_head(self) -> int:
        return -(-self.num_queries // self.query_block)

    @property
    def num_rows(self) -> int:
        return self.batch * self.num_heads * self.rows_per_head

    def split(self, rows: Int32[Array, " P"]) -> tuple[Array, Array, Array]:
        """Batch, head and row inside the head of flat rows."""
        head, row = rows // self.rows_per_head, rows % self.rows_per_head
        return head // self.num_heads, head % self.num_heads, row

    def mask_words(self, bits: UInt32[Array, "B N R W"], rows: Int32[Array, " P"]) -> UInt32[Array, "P W"]:
        """Words of the given rows; batch and head axes of size 1 serve everybody."""
        batch, head, row = self.split(rows)
        mask_batch, mask_heads, rows_per_head, num_words = bits.shape
        batch = batch if mask_batch > 1 else 0
        head = head if mask_heads > 1 else 0
        flat = (batch * mask_heads + head) * rows_per_head + row
        return jnp.take(bits.reshape(-1, num_words), flat, axis=0, mode="clip")

    def counts(self, bits: UInt32[Array, "B N R W"]) -> Int32[Array, " G"]:
        """Kept keys of every flat row."""
        counts = jnp.sum(jax.lax.population_count(bits), axis=-1, dtype=jnp.int32)
        return jnp.broadcast_to(counts, (self.batch, self.num_heads, self.rows_per_head)).reshape(-1)

    def query_index(
        self, rows: Int32[Array, " P"], query_order: Int32[Array, "B N T"] | None
    ) -> tuple[Int32[Array, "P M"], Array]:
        """Index of every query of the rows in the flat `[B * T * N]` list, and which of them exist."""
        batch, head, row = self.split(rows)
        position = row[:, None] * self.query_block + jnp.arange(self.query_block, dtype=jnp.int32)
        exists = position < self.num_queries
        query = jnp.minimum(position, self.num_queries - 1)
        if query_order is not None:
            order_batch, order_heads, num_queries = query_order.shape
            which = (batch if order_batch > 1 else 0) * order_heads + (head if order_heads > 1 else 0)
            flat = jnp.broadcast_to(jnp.asarray(which, jnp.int32), rows.shape)[:, None] * num_queries + query
            query = jnp.take(query_order.reshape(-1), flat, mode="clip")
        return (batch[:, None] * self.num_queries + query) * self.num_heads + head[:, None], exists

    def key_index(self, rows: Int32[Array, " P"], keys: Int32[Array, "P C"]) -> Int32[Array, "P C"]:
        """Index of keys in the flat `[B * S * K]` list (several query heads share one key/value head)."""
        batch, head, _ = self.split(rows)
        kv_head = head // (self.num_heads // self.num_kv_heads)
        return (batch[:, None] * self.num_keys + keys) * self.num_kv_heads + kv_head[:, None]

    def place(self, slots: Int32[Array, " G"], query_order: Int32[Array, "B N T"] | None) -> Int32[Array, "B N T"]:
        """Where every query of every head stands in the tiles `[slot, M]`, given the slot of each flat row."""
        if query_order is None:
            position = jnp.arange(self.num_queries, dtype=jnp.int32)[None, None]
        else:
            natural = jnp.broadcast_to(jnp.arange(self.num_queries, dtype=jnp.int32), query_order.shape)
            position = jnp.put_along_axis(jnp.zeros_like(query_order), query_order, natural, axis=-1, inplace=False)
        row = position // self.query_block
        head = jnp.arange(self.batch * self.num_heads, dtype=jnp.int32).reshape(self.batch, self.num_heads, 1)
        slot = jnp.take(slots, head * self.rows_per_head + row, mode="clip")
        return slot * self.query_block + position % self.query_block


def schedule(counts: Int32[Array, " G"], rows_per_step: int) -> tuple[Int32[Array, "J P"], Int32[Array, " G"]]:
    """Group rows of like counts into steps, longest first: rows of one step then end together and waste little.

    Returns the flat rows of each step (the last step repeats row `G`, which does not exist) and each row's slot.
    """
    num_rows = counts.shape[0]
    order = jnp.argsort(-counts, stable=True).astype(jnp.int32)
    slots = jnp.zeros_like(order).at[order].set(jnp.arange(num_rows, dtype=jnp.int32), unique_indices=True)
    missing = -num_rows % rows_per_step
    order = jnp.concatenate([order, vary_like(jnp.full((missing,), num_rows, jnp.int32), order)])
    return order.reshape(-1, rows_per_step), slots


def gather_rows(flat: Float[Array, "A H"], index: Int32[Array, "..."], dtype: jnp.dtype) -> Float[Array, "... H"]:
    """Rows of a flat list; the index is always inside (callers clamp)."""
    return jnp.take(flat, index, axis=0, mode="clip").astype(dtype)
