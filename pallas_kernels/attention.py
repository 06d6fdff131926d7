"""The kernel as a function of arrays: checks in words, the ranks of the mask's groups, one kernel call."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, UInt32

from fgattn_jax.pallas_kernels import config as configs
from fgattn_jax.pallas_kernels import support

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_GROUP_WORDS = 4
_HOPPER_CORES = 132


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
    config: configs.KernelConfig | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention over the kept slices by the Pallas kernel: `[B, T, N, H]` in the query's dtype and float32 LSE.

    Axes `b` and `n` are those of the batch and the query heads, or 1, each array for itself.

    Args:
        query: bfloat16 or float16; `H` 64 or 128.
        key: The dtype of the query. `N` is a multiple of `K`.
        value: As `key`.
        bits: Kept slices, `W = 4 * ceil(S / 128)` words per row; see docs/mask_format.md.
        query_order: Which query stands where before grouping; None is raster.
        work_order: (row, kept keys) of every row, most keys first; None makes it in this call. Only the order of work
            depends on it.
        scale: Factor of the scores.
        query_block: Queries per slice (`M`): 64 or 128.
        config: Tuning values; None takes those of `config.choose`.
        interpret: Make the kernel for Pallas' interpreter, as in `plgpu.force_gpu_interpret_mode()`: for tests of small
            sizes on a CPU.

    Returns:
        Output and LSE (natural logarithm). Rows without a kept key give 0 and -inf.

    Raises:
        ValueError: An argument does not fit; the message names it.

    Note:
        The call lowers on every platform and runs on CUDA devices of compute capability 9.0. It has no derivative and
        no batching rule of its own; `fgattn_jax.attention` adds both.

    References:
        FG-Attn, arXiv 2509.16518, section 4.
    """
    _check(query, key, value, bits, query_order, work_order, scale, query_block)
    from fgattn_jax.pallas_kernels import kernel

    batch, num_queries, num_heads, head_dim = query.shape
    if config is None:
        config = configs.choose(head_dim=head_dim, query_block=query_block, device_kind=_device_kind())
    _check_config(config, head_dim, query_block)
    # The first tile's maximum rests on scale >= 0.
    if scale < 0:
        query, scale = -query, -scale
    starts = group_starts(bits, num_keys=key.shape[1])
    if work_order is None:
        work_order = _order_rows(starts)
    lines = 128 // query_block
    problem = kernel.Problem(
        batch=batch,
        num_queries=num_queries,
        num_heads=num_heads,
        num_kv_heads=key.shape[2],
        head_dim=head_dim,
        query_block=query_block,
        scale=scale,
        dtype=query.dtype,
        has_order=query_order is not None,
        num_blocks=min(_num_cores(), -(-batch * num_heads * bits.shape[2] // lines)),
        config=config,
        interpret=interpret,
    )
    operands = (query, key, value, bits, starts, work_order) + (() if query_order is None else (query_order,))
    output, lse = kernel.make_kernel(problem)(*operands)
    return output, lse


def group_starts(bits: UInt32[Array, "b n R W"], *, num_keys: int) -> Int32[Array, "b n R G"]:
    """Kept keys before each group of 128 keys, and at last (`G = W / 4 + 1`) all of the row's.

    With these a thread of the kernel finds the kept key of any rank by itself. Bits past `num_keys` do not count.
    """
    rows, num_words = bits.shape[:3], bits.shape[3]
    num_groups = num_words // _GROUP_WORDS
    # Made by operations: the partitioner takes no functions with constant arrays.
    valid = jnp.clip(num_keys - 32 * lax.iota(jnp.int32, num_words), 0, 32).astype(jnp.uint32)
    inside = jnp.where(valid == 32, ~jnp.uint32(0), (jnp.uint32(1) << valid) - jnp.uint32(1))
    counts = lax.population_count(bits & inside).reshape(*rows, num_groups, _GROUP_WORDS).sum(-1)
    # Sums as a product with a triangle of ones: exact, as counts up to 128 are in bfloat16 and sums in float32 (to 2^24
    # keys), and one pass where XLA's cumulative sum takes many.
    sizes = (num_groups, num_groups + 1)
    before = lax.broadcasted_iota(jnp.int32, sizes, 0) < lax.broadcasted_iota(jnp.int32, sizes, 1)
    sums = jnp.matmul(counts.astype(jnp.bfloat16), before.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return sums.astype(jnp.int32)


def _order_rows(starts: Array) -> Array:
    counts = starts[..., -1]
    rows = jnp.argsort(counts, axis=-1, stable=True, descending=True).astype(jnp.int32)
    return jnp.stack([rows, jnp.take_along_axis(counts, rows, axis=-1)], axis=-1)


def _device_kind() -> str | None:
    return jax.local_devices()[0].device_kind if jax.default_backend() == "gpu" else None


def _num_cores() -> int:
    """Multiprocessors of the GPU: as many blocks run at once. With more blocks the result is the same, later."""
    if jax.default_backend() != "gpu":
        return _HOPPER_CORES
    return getattr(jax.local_devices()[0], "core_count", None) or _HOPPER_CORES


def _check_config(config: configs.KernelConfig, head_dim: int, query_block: int) -> None:
    if config.tile_keys != query_block:
        raise ValueError(f"expected `tile_keys` of query_block={query_block}, got tile_keys={config.tile_keys}")
    needed = config.shared_bytes(head_dim=head_dim, query_block=query_block)
    if needed > configs.SHARED_BYTES:
        raise ValueError(
            f"expected a config that needs at most {configs.SHARED_BYTES} bytes of shared memory, got {needed} from "
            f"stages={config.stages} and tile_keys={config.tile_keys} with head_dim={head_dim}"
        )


def _check(query, key, value, bits, query_order, work_order, scale: float, query_block: int) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(x.shape) != 4 or 0 in x.shape:
            raise ValueError(f"expected `{name}` with 4 axes, none of them empty, got shape={x.shape}")
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    reasons = support.argument_reasons(head_dim=head_dim, query_block=query_block, dtype=str(query.dtype))
    if reasons:
        raise ValueError("the Pallas kernel cannot run this call: " + "; ".join(reasons))
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
