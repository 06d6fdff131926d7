"""The kernels that make masks as functions of arrays: checks in words, one call to the library."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt32

from fgattn_jax.xla_ffi import library, support


def exact_mask(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    lse: Float32[Array, "B N T"],
    log_threshold: Float32[Array, " N"],
    query_order: Int32[Array, "b n T"] | None,
    *,
    scale: Float32[Array, ""],
    query_block: int,
    keep_best: bool,
) -> tuple[UInt32[Array, "B N R W"], Int32[Array, "B N R"]]:
    """Which slices hold a probability above a threshold, and how many of each row do.

    Slice (row, key) is kept if `scale * q . k - lse` is above `log_threshold` for one of the row's queries; NaN is
    kept. A query whose LSE is -inf, and a position behind the last query, count as nothing.

    Args:
        query: bfloat16 or float16; `H` 64 or 128.
        key: The dtype of the query. `N` is a multiple of `K`.
        lse: Natural-log LSE of dense attention with the same scale.
        log_threshold: Natural logarithm of the largest probability that is not kept, per head.
        query_order: Which query stands where before grouping; axes `b` and `n` are those of the call or 1. None is
            raster.
        scale: Factor of the scores, finite.
        query_block: Queries per slice (`M`): 64 or 128.
        keep_best: A row that keeps nothing keeps its best key, the lowest one among equals.

    Returns:
        Bits (`W = 4 * ceil(S / 128)` words per row, docs/mask_format.md) and kept keys of every row.

    Raises:
        ValueError: An argument does not fit; the message names it. The handler checks once more at run time.
        RuntimeError: The library is missing or does not fit the installed jaxlib.

    References:
        FG-Attn, arXiv 2509.16518, section 5.1.
    """
    check_call(query, key, lse, log_threshold, query_order, query_block)
    library.register()
    batch, num_queries, num_heads, _ = query.shape
    num_rows, num_words = -(-num_queries // query_block), 4 * -(-key.shape[1] // 128)
    results = (
        jax.ShapeDtypeStruct((batch, num_heads, num_rows, num_words), jnp.uint32),
        jax.ShapeDtypeStruct((batch, num_heads, num_rows), jnp.int32),
    )
    operands = (query, key, lse, jnp.asarray(scale, jnp.float32), log_threshold)
    operands += () if query_order is None else (query_order,)
    call = jax.ffi.ffi_call(library.EXACT_MASK_TARGET, results, vmap_method="sequential")
    bits, counts = call(*operands, query_block=np.int32(query_block), keep_best=keep_best)
    return bits, counts


@dataclasses.dataclass(frozen=True)
class SelectRule:
    """How many of the best keys a row keeps: `min(max(rule, min_keys, floor of its head), max_keys)`.

    Args:
        threshold: Keys whose score is greater than this. One of the three rules is given.
        top_p: The smallest set of keys that holds this share of the row's score.
        top_k: So many keys.
        min_keys: At least this many.
        max_keys: At most this many; None: no cap.
        head_floor: Every row of a head keeps at least this share of the head's mean count over its queries.
    """

    threshold: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_keys: int = 1
    max_keys: int | None = None
    head_floor: float = 0.0

    def attributes(self, num_keys: int) -> dict[str, np.generic]:
        """The handler's attributes: numbers of `Rule` in csrc/masks/mask_launch.h."""
        rules = (self.threshold, self.top_p, self.top_k)
        (rule,) = [number for number, value in enumerate(rules) if value is not None]
        return {
            "rule": np.int32(rule),
            "value": np.float32(0.0 if rule == 2 else rules[rule]),
            "top_k": np.int32(self.top_k or 0),
            "min_keys": np.int32(self.min_keys),
            "max_keys": np.int32(num_keys if self.max_keys is None else min(self.max_keys, num_keys)),
            "head_floor": np.float32(self.head_floor),
        }


def exact_mass(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    lse: Float32[Array, "B N T"],
    query_order: Int32[Array, "b n T"] | None,
    rule: SelectRule,
    *,
    scale: Float32[Array, ""],
    query_block: int,
    workspace_bytes: int = 1 << 29,
) -> tuple[UInt32[Array, "B N R W"], Int32[Array, "B N R"]]:
    """The keys of every row that hold most of its queries' probability mass, and how many these are.

    The score of slice (row, key) is the sum over the row's queries of `exp(scale * q . k - lse)`. Of keys with equal
    scores the lower one comes first; NaN comes before all. Queries that count as nothing: as in `exact_mask`.

    Args:
        query: bfloat16 or float16; `H` 64 or 128.
        key: The dtype of the query. `N` is a multiple of `K`.
        lse: Natural-log LSE of dense attention with the same scale.
        query_order: As in `exact_mask`.
        rule: How many keys a row keeps.
        scale: Factor of the scores, finite.
        query_block: Queries per slice (`M`): 64 or 128.
        workspace_bytes: Room for masses, of one head at least: as many heads as fit are done at a time.

    Returns:
        Bits and kept keys of every row, as `exact_mask`.

    Raises:
        ValueError: An argument does not fit; the message names it. The handler checks once more at run time.
        RuntimeError: The library is missing or does not fit the installed jaxlib.

    References:
        LoSA, arXiv 2608.12032.
    """
    check_call(query, key, lse, None, query_order, query_block)
    library.register()
    batch, num_queries, num_heads, _ = query.shape
    num_keys = key.shape[1]
    num_rows, num_words = -(-num_queries // query_block), 4 * -(-num_keys // 128)
    of_head = num_rows * num_words * 32 + 4  # mass_workspace_size
    workspace_heads = min(batch * num_heads, max(1, workspace_bytes // (4 * of_head)))
    results = (
        jax.ShapeDtypeStruct((batch, num_heads, num_rows, num_words), jnp.uint32),
        jax.ShapeDtypeStruct((batch, num_heads, num_rows), jnp.int32),
        jax.ShapeDtypeStruct((workspace_heads * of_head,), jnp.float32),
    )
    operands = (query, key, lse, jnp.asarray(scale, jnp.float32)) + (() if query_order is None else (query_order,))
    call = jax.ffi.ffi_call(library.EXACT_MASS_TARGET, results, vmap_method="sequential")
    sizes = {"query_block": np.int32(query_block), "workspace_heads": np.int32(workspace_heads)}
    bits, counts, _ = call(*operands, **sizes, **rule.attributes(num_keys))
    return bits, counts


MOST_MEANS = 8
"""Means per row that the kernel takes, at most."""
_GUESS_NUMBERS = 1028
"""Numbers of a row that say where its cut lies: kGuessNumbers of csrc/masks/mask_launch.h."""
MOST_RANKED_KEYS = 262144
"""Keys of a row that a `SelectRule` ranks, at most: their bits stand in shared memory."""


def mean_mask(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    keep: Float32[Array, " N"] | SelectRule,
    query_order: Int32[Array, "b n T"] | None,
    *,
    scale: Float32[Array, ""],
    query_block: int,
    num_means: int = 1,
    keep_best: bool = False,
    workspace_bytes: int = 1 << 30,
) -> tuple[UInt32[Array, "B N R W"], Int32[Array, "B N R"]]:
    """The keys that the mean queries of a row attend to, and how many these are.

    Means are summed in float32 and rounded to the dtype of the queries; the score of a key is the mean over the row's
    means of its softmax probability over all keys, in float32. With a threshold no score reaches global memory. A
    `SelectRule` ranks probabilities of 16 bits, of some heads at a time: rounded down to 10 bits of mantissa, those
    below 2^-62 all equal, so that `top_p` holds at least its share and keys closer than 0.1 % may change places.
    With one mean per row, 4096 keys or more and no `head_floor`, `top_k` and `top_p` do so only for rows whose sample
    misleads. In the others float32 scores decide, and only keys near the last one kept are rounded: to 1/65534 of the
    range of scores, some powers of two, that the sample leaves open. NaN is kept.

    Args:
        query: bfloat16 or float16; `H` 64 or 128.
        key: The dtype of the query. `N` is a multiple of `K`.
        keep: Natural logarithm of the largest probability that is not kept, per head; or how many keys a row keeps.
        query_order: As in `exact_mask`.
        scale: Factor of the scores, finite.
        query_block: Queries per slice (`M`): 64 or 128.
        num_means: Parts of a row with a mean each: 1, 2, 4 or 8. Parts without a query count as nothing.
        keep_best: With a threshold: a row that keeps nothing keeps its best key, the lowest one among equals.
        workspace_bytes: With a `SelectRule`: room for what is ranked, 4 bytes a key and row, of one head at least.
            Heads are done in as few turns as this allows, in turns of equal size. Samples take 4 KiB a row of all
            heads besides.

    Returns:
        Bits and kept keys of every row, as `exact_mask`.

    Raises:
        ValueError: An argument does not fit; the message names it. The handler checks once more at run time.
        RuntimeError: The library is missing or does not fit the installed jaxlib.

    References:
        FG-Attn, arXiv 2509.16518, section 5.2.
    """
    ranks = isinstance(keep, SelectRule)
    check_call(query, key, None, None if ranks else keep, query_order, query_block)
    if num_means not in (1, 2, 4, MOST_MEANS):
        raise ValueError(f"expected `num_means` 1, 2, 4 or {MOST_MEANS}, got num_means={num_means}")
    library.register()
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys = key.shape[1]
    num_rows, num_words = -(-num_queries // query_block), 4 * -(-num_keys // 128)
    lines = -(-num_rows * num_means // 256) * 256  # mean_workspace_size
    of_ranked_head = num_rows * num_words * 32 + 4
    turns = -(-batch * num_heads // max(1, workspace_bytes // (4 * of_ranked_head)))
    workspace_heads = -(-batch * num_heads // turns) if ranks else 0
    workspace = batch * num_heads * lines * (head_dim // 2 + 2 * 16) + workspace_heads * of_ranked_head
    workspace += ranks * batch * num_heads * num_rows * _GUESS_NUMBERS
    results = (
        jax.ShapeDtypeStruct((batch, num_heads, num_rows, num_words), jnp.uint32),
        jax.ShapeDtypeStruct((batch, num_heads, num_rows), jnp.int32),
        jax.ShapeDtypeStruct((workspace,), jnp.int32),
    )
    rule = keep if ranks else SelectRule(threshold=0.0)
    log_threshold = jnp.zeros((num_heads,), jnp.float32) if ranks else keep
    operands = (query, key, jnp.asarray(scale, jnp.float32), log_threshold)
    operands += () if query_order is None else (query_order,)
    call = jax.ffi.ffi_call(library.MEAN_MASK_TARGET, results, vmap_method="sequential")
    sizes = {"query_block": query_block, "num_means": num_means, "workspace_heads": workspace_heads}
    how = {name: np.int32(size) for name, size in sizes.items()}
    bits, counts, _ = call(*operands, **how, ranks=ranks, keep_best=keep_best, **rule.attributes(num_keys))
    return bits, counts


def check_call(query, key, lse, log_threshold, query_order, query_block: int) -> None:
    """Refuse arrays that a kernel for masks cannot take; None stands for one that it does without.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    for name, x in (("query", query), ("key", key)):
        if len(x.shape) != 4 or 0 in x.shape:
            raise ValueError(f"expected `{name}` with 4 axes, none of them empty, got shape={x.shape}")
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    reasons = support.argument_reasons(head_dim=head_dim, query_block=query_block, dtype=str(query.dtype))
    if reasons:
        raise ValueError("the CUDA kernel cannot run this call: " + "; ".join(reasons))
    if key.shape != (batch, num_keys, num_kv_heads, head_dim) or key.dtype != query.dtype:
        expected = f"{query.dtype}{(batch, num_keys, num_kv_heads, head_dim)}"
        raise ValueError(f"expected `key` {expected}, got {key.dtype}{key.shape}")
    if num_heads % num_kv_heads:
        raise ValueError(f"expected query heads that are a multiple of {num_kv_heads} key heads, got {num_heads}")
    for name, x, shape in (
        ("lse", lse, (batch, num_heads, num_queries)),
        ("log_threshold", log_threshold, (num_heads,)),
    ):
        if x is not None and (x.shape != shape or x.dtype != jnp.float32):
            raise ValueError(f"expected `{name}` float32{shape}, got {x.dtype}{x.shape}")
    if query_order is not None:
        front = query_order.shape[:2]
        fits = len(front) == 2 and front[0] in (1, batch) and front[1] in (1, num_heads)
        if not fits or query_order.shape[2:] != (num_queries,) or query_order.dtype != jnp.int32:
            raise ValueError(
                f"expected `query_order` int32 of shape [{batch}|1, {num_heads}|1, {num_queries}], got "
                f"{query_order.dtype}{query_order.shape}"
            )
