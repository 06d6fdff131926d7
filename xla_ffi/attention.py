"""The kernels as functions of arrays: checks in words, then one FFI call. No copies, no transposes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from fgattn_jax.xla_ffi import library, support

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    bits: UInt32[Array, "b n R W"],
    query_order: Int32[Array, "b n T"] | None,
    work_order: Int32[Array, "b n R 2"] | None,
    *,
    scale: float,
    query_block: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention over the kept slices by the CUDA kernel: `[B, T, N, H]` in the query's dtype and float32 LSE.

    Axes `b` and `n` are those of the batch and the query heads, or 1, each array for itself. Arrays stay as they lie in
    memory; the kernel reads rows through strides, and keys by numbers that it decodes from the bits.

    Args:
        query: bfloat16 or float16; `H` 64 or 128.
        key: The dtype of the query. `N` is a multiple of `K`.
        value: As `key`.
        bits: Kept slices, `W = 4 * ceil(S / 128)` words per row; see docs/mask_format.md.
        query_order: Which query stands where before grouping; None is raster.
        work_order: Rows by kept keys as `work_order` makes them from the same bits; None makes them in this call. Its
            `b` and `n` may be larger than those of `bits`, not smaller.
        scale: Factor of the scores.
        query_block: Queries per slice (`M`): 64 or 128.

    Returns:
        Output and LSE (natural logarithm). Rows without a kept key give 0 and -inf.

    Raises:
        ValueError: An argument does not fit; the message names it. The handler checks once more at run time.
        RuntimeError: The library is missing or does not fit the installed jaxlib.

    Note:
        The call lowers on every platform and runs on CUDA devices of compute capability 9.0. It has no derivative and
        no batching rule of its own; `fgattn_jax.attention` adds both.
    """
    _check(query, key, value, bits, query_order, work_order, scale, query_block)
    library.register()
    if work_order is None:
        work_order = _order_rows(bits, key.shape[1])
    # The kernel's running maximum rests on scale >= 0.
    if scale < 0:
        query, scale = -query, -scale
    batch, num_queries, num_heads, _ = query.shape
    results = (
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32),
        # The kernel's workspace (csrc/launch.h): a result, because CUDA graphs forbid allocation.
        jax.ShapeDtypeStruct((4 + 4 * batch * num_heads * bits.shape[2],), jnp.int32),
    )
    operands = (query, key, value, bits, work_order) + (() if query_order is None else (query_order,))
    call = jax.ffi.ffi_call(library.ATTENTION_TARGET, results)
    output, lse, _ = call(*operands, scale=np.float32(scale), query_block=np.int32(query_block))
    return output, lse


def work_order(bits: UInt32[Array, "b n R W"], *, num_keys: int) -> Int32[Array, "b n R 2"]:
    """(row, kept keys) of every row by the CUDA kernel, most keys first, ties by lower row.

    Args:
        bits: Kept slices, `W = 4 * ceil(S / 128)` words per row. Bits past `num_keys` do not count.
        num_keys: Keys (`S`), at least 1.

    Raises:
        ValueError: `bits` does not fit `num_keys`.
        RuntimeError: The library is missing or does not fit the installed jaxlib.
    """
    if num_keys < 1:
        raise ValueError(f"expected `num_keys` of at least 1, got num_keys={num_keys}")
    words = 4 * -(-num_keys // 128)
    if len(bits.shape) != 4 or bits.shape[3] != words or bits.dtype != jnp.uint32:
        raise ValueError(
            f"expected `bits` uint32[B|1, N|1, R, W={words}] for num_keys={num_keys}, got {bits.dtype}{bits.shape}"
        )
    library.register()
    return _order_rows(bits, num_keys)


def _order_rows(bits: Array, num_keys: int) -> Array:
    result = jax.ShapeDtypeStruct((*bits.shape[:3], 2), jnp.int32)
    return jax.ffi.ffi_call(library.WORK_ORDER_TARGET, result)(bits, num_keys=np.int32(num_keys))


def _check(query, key, value, bits, query_order, work_order, scale: float, query_block: int) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(x.shape) != 4 or 0 in x.shape:
            raise ValueError(f"expected `{name}` with 4 axes, none of them empty, got shape={x.shape}")
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    reasons = support.argument_reasons(head_dim=head_dim, query_block=query_block, dtype=str(query.dtype))
    if reasons:
        raise ValueError("the CUDA kernel cannot run this call: " + "; ".join(reasons))
    for name, x in (("key", key), ("value", value)):
        expected = (batch, num_keys, num_kv_heads, head_dim)
        if x.shape != expected or x.dtype != query.dtype:
            raise ValueError(f"expected `{name}` {query.dtype}{expected}, got {x.dtype}{x.shape}")
    if num_heads % num_kv_heads:
        raise ValueError(f"expected query heads that are a multiple of {num_kv_heads} key/value heads, got {num_heads}")
    if not math.isfinite(scale) or abs(scale) > _FLOAT32_MAX:
        raise ValueError(f"expected `scale` that float32 holds, got scale={scale}")
    num_rows = -(-num_queries // query_block)
    ends = {
        "bits": (bits, jnp.uint32, (num_rows, 4 * -(-num_keys // 128))),
        "query_order": (query_order, jnp.int32, (num_queries,)),
        "work_order": (work_order, jnp.int32, (num_rows, 2)),
    }
    for name, (x, dtype, end) in ends.items():
        if x is None:
            continue
        front = x.shape[:2]
        fits = len(front) == 2 and front[0] in (1, batch) and front[1] in (1, num_heads)
        if not fits or x.shape[2:] != end or x.dtype != dtype:
            raise ValueError(
                f"expected `{name}` {jnp.dtype(dtype)} of shape [{batch}|1, {num_heads}|1, "
                f"{', '.join(map(str, end))}], got {x.dtype}{x.shape}"
            )
    if work_order is not None and any(a < b for a, b in zip(work_order.shape[:2], bits.shape[:2], strict=True)):
        raise ValueError(
            f"expected a `work_order` for every row of `bits`, got work_order={work_order.shape} beside "
            f"bits={bits.shape}; make it from the same bits"
        )
