"""Dense attention that finds the mask of the next steps on its way, as a function of arrays: checks, one call."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt32

from fgattn_jax.xla_ffi import library, masks

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def attention_and_mask(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lse: Float32[Array, "B N T"],
    log_threshold: Float32[Array, " N"],
    query_order: Int32[Array, "b n T"] | None,
    *,
    scale: float,
    query_block: int,
    keep_best: bool,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"], UInt32[Array, "B N R W"], Int32[Array, "B N R"]]:
    """Dense attention, and which slices hold a probability above a threshold, measured by an LSE known before.

    Slice (row, key) is kept if `scale * q . k - lse` is above `log_threshold` for one of the row's queries; NaN is
    kept. A query whose `lse` is -inf, and a position behind the last query, count as nothing.

    Args:
        query: bfloat16 or float16; `H` 64 or 128.
        key: The dtype of the query. `N` is a multiple of `K`.
        value: As `key`.
        lse: Natural-log LSE that stands in for that of this call, as the one of the denoising step before.
        log_threshold: Natural logarithm of the largest probability that is not kept, per head.
        query_order: Which query stands where before grouping; axes `b` and `n` are those of the call or 1. None is
            raster.
        scale: Factor of the scores, finite.
        query_block: Queries per slice (`M`): 64 or 128.
        keep_best: A row that keeps nothing keeps its best key, the lowest one among equals.

    Returns:
        Output and LSE of this call's dense attention, bits (`W = 4 * ceil(S / 128)` words per row,
        docs/mask_format.md), and kept keys of every row.

    Raises:
        ValueError: An argument does not fit; the message names it. The handler checks once more at run time.
        RuntimeError: The library is missing or does not fit the installed jaxlib.

    References:
        FG-Attn, arXiv 2509.16518, section 5.1.
    """
    masks.check_call(query, key, lse, log_threshold, query_order, query_block)
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(f"expected `value` {key.dtype}{key.shape} as `key`, got {value.dtype}{value.shape}")
    if not math.isfinite(scale) or abs(scale) > _FLOAT32_MAX:
        raise ValueError(f"expected `scale` that float32 holds, got scale={scale}")
    library.register()
    # The kernel's running maximum rests on scale >= 0.
    if scale < 0:
        query, scale = -query, -scale
    batch, num_queries, num_heads, _ = query.shape
    num_rows, num_words = -(-num_queries // query_block), 4 * -(-key.shape[1] // 128)
    results = (
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32),
        jax.ShapeDtypeStruct((batch, num_heads, num_rows, num_words), jnp.uint32),
        jax.ShapeDtypeStruct((batch, num_heads, num_rows), jnp.int32),
        jax.ShapeDtypeStruct((4,), jnp.int32),  # the kernel's counters: CUDA graphs forbid allocation
    )
    operands = (query, key, value, lse, log_threshold) + (() if query_order is None else (query_order,))
    call = jax.ffi.ffi_call(library.ONE_PASS_TARGET, results, vmap_method="sequential")
    sizes = {"scale": np.float32(scale), "query_block": np.int32(query_block), "keep_best": keep_best}
    output, new_lse, bits, counts, _ = call(*operands, **sizes)
    return output, new_lse, bits, counts
