"""The public functions: `attention`, `attention_with_lse`, `explain`."""

import functools
import re
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from fgattn_jax import _validation, dispatch
from fgattn_jax.implementations import cuda, dense, pallas, reference, transforms, xla
from fgattn_jax.implementations.spec import CallSpec
from fgattn_jax.masks import SliceMask
from fgattn_jax.types import Implementation

_XLA = transforms.KernelPair(xla.forward, xla.backward)
_HOPPER = {"cuda": cuda, "pallas": pallas}


class AttentionOutput(NamedTuple):
    """Result of `attention_with_lse`.

    Args:
        output: `[B, T, N, H]`, the dtype of the query. Queries of an empty row get 0.
        lse: `[B, N, T]` float32, the natural logarithm of the sum of exponentials of the kept scores (scale
            included). Queries of an empty row get -inf.
    """

    output: Float[Array, "B T N H"]
    lse: Float[Array, "B N T"]


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: SliceMask | None = None,
    *,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    r"""Scaled dot-product attention over the key slices that a mask keeps.

    .. math:: o_t = \sum_{s \in \mathrm{kept}(t)} \mathrm{softmax}_s(\mathrm{scale} \cdot q_t \cdot k_s)\, v_s

    Axes: `B` batch, `T` queries, `S` keys, `N` query heads, `K` key/value heads (`N` is a multiple of `K`; query head
    `n` reads key/value head `n // (N // K)`), `H` head width. As in `jax.nn.dot_product_attention`.

    Args:
        query: `[B, T, N, H]`; float32, bfloat16 or float16.
        key: `[B, S, K, H]`, the dtype of the query.
        value: `[B, S, K, H]`, the dtype of the query.
        mask: Which slices (`M` neighbouring queries x 1 key) are kept; its batch and head axes may be 1. None keeps
            all: dense attention by the fastest dense path (cuDNN on NVIDIA GPUs).
        scale: Factor of the scores; None is `1 / sqrt(H)`. A Python number: it is part of the compiled program.
        implementation: "cuda", "pallas", "xla" or "reference"; that one runs or the call raises. None takes the
            fastest that can run the call; `explain` says which and why.

    Returns:
        `[B, T, N, H]` in the query's dtype. A row without any kept key gives 0 (and zero gradients).

    Raises:
        ValueError: Ranks, shapes, dtypes or the mask's lengths do not fit each other.
        UnsupportedError: The named implementation cannot run this call; the message lists every reason.

    Note:
        Softmax and sums are float32. A skipped key is never read: NaN there does not matter. Work and time follow the
        number of kept slices; no `[T, S]` array exists except in `reference`. Differentiable in query, key and value
        (reverse mode); works under jit, vmap, grad, remat, scan, shard_map and jax.export, and heads or batch may
        be sharded. Every query of a row sees the same keys: to mask finer, use a smaller `query_block`.

    Example:
        >>> import jax, fgattn_jax
        >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 256, 2, 32))
        >>> mask = fgattn_jax.masks.local_window(
        ...     before=32, after=32, query_block=64, num_queries=256, num_keys=256
        ... )
        >>> fgattn_jax.attention(q, k, v, mask).shape
        (1, 256, 2, 32)

    References:
        FG-Attn, arXiv 2509.16518, section 4 (slices and the gathered kernel).
    """
    spec, scale = _check(query, key, value, mask, scale, implementation)
    name = dispatch.choose(spec, implementation)
    if mask is None and name == "xla" and not dense.cudnn_reasons(spec):
        return _run_cudnn(query, key, value, scale)
    return _run(name, query, key, value, mask, scale, named=_named(name, implementation)).output


def attention_with_lse(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: SliceMask | None = None,
    *,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> AttentionOutput:
    """`attention` and the log-sum-exp of every query's kept scores.

    Args:
        query: See `attention`, as are the other arguments and the errors.
        key: `[B, S, K, H]`.
        value: `[B, S, K, H]`.
        mask: Kept slices or None.
        scale: Factor of the scores.
        implementation: Name or None.

    Returns:
        Output `[B, T, N, H]` and float32 LSE `[B, N, T]` (natural logarithm; -inf for an empty row). Results over
        disjoint masks can be merged with it, and exact predictors start from it.

    Note:
        The gradient flows through both. Without a mask and without a name, calls that the CUDA kernel takes run it with
        all keys kept, all others run in query chunks: cuDNN's LSE comes back in 16 bits, too coarse to threshold
        probabilities.
    """
    spec, scale = _check(query, key, value, mask, scale, implementation)
    name = dispatch.choose(spec, implementation)
    if mask is None and implementation is None and dense_kernel_runs(query, key, value):
        return AttentionOutput(*_run_kernel(query, key, value, scale))
    return _run(name, query, key, value, mask, scale, named=_named(name, implementation))


def dense_kernel_runs(query, key, value) -> bool:
    """Whether the CUDA kernel runs `attention_with_lse` of these arrays without a mask; shapes and dtypes are enough.

    Where it does it is faster than cuDNN, too (docs/benchmarks.md); elsewhere the LSE asks for query chunks, which are
    slower.
    """
    return not dense.kernel_reasons(_check(query, key, value, None, None, None)[0])


def explain(
    query: Float[Array, "B T N H"] | jax.ShapeDtypeStruct,
    key: Float[Array, "B S K H"] | jax.ShapeDtypeStruct,
    value: Float[Array, "B S K H"] | jax.ShapeDtypeStruct,
    mask: SliceMask | None = None,
    *,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> dispatch.Explanation:
    """Say which implementation `attention` would run for these arguments, and why not the others.

    Nothing runs; shapes and dtypes are enough (`jax.ShapeDtypeStruct`, or `jax.eval_shape` of a mask builder).

    Args:
        query: See `attention`, as are the other arguments.
        key: `[B, S, K, H]`.
        value: `[B, S, K, H]`.
        mask: Kept slices or None.
        scale: Factor of the scores.
        implementation: Name or None.

    Returns:
        An `Explanation`; print it. Its `implementation` is None where `attention` would raise `UnsupportedError`.

    Raises:
        ValueError: The arguments do not fit each other, as in `attention`.
    """
    spec, _ = _check(query, key, value, mask, scale, implementation)
    return dispatch.explain_spec(spec, implementation)


def _check(query, key, value, mask, scale, implementation) -> tuple[CallSpec, float]:
    _validation.check_arrays(query, key, value)
    if mask is not None:
        _validation.check_mask(mask, query, key)
    _validation.check_implementation(implementation)
    batch, num_queries, num_heads, head_dim = query.shape
    spec = CallSpec(
        batch=batch,
        num_queries=num_queries,
        num_keys=key.shape[1],
        num_heads=num_heads,
        num_kv_heads=key.shape[2],
        head_dim=head_dim,
        dtype=str(query.dtype),
        query_block=None if mask is None else mask.query_block,
        platform=jax.default_backend(),
        compute_capability=_compute_capability(),
    )
    return spec, _validation.check_scale(scale, head_dim)


@functools.lru_cache(maxsize=1)
def _compute_capability() -> str | None:
    if jax.default_backend() != "gpu":
        return None
    said = str(getattr(jax.devices()[0], "compute_capability", ""))
    return said if re.fullmatch(r"\d+\.\d+", said) else None  # AMD's are names


# Compiled as a whole where the caller does not: an eager call would otherwise compile its parts every time.
@functools.partial(jax.jit, static_argnames="scale")
def _run_cudnn(query, key, value, scale: float) -> Array:
    return dense.cudnn(query, key, value, scale=scale)


@functools.partial(jax.jit, static_argnames="scale")
def _run_kernel(query, key, value, scale: float):
    return dense.by_kernel(query, key, value, scale=scale)


def _named(name: str, implementation: str | None) -> bool:
    """Whether the program must fail rather than run another implementation where it is lowered for another platform."""
    return name in _HOPPER and implementation is not None


@functools.partial(jax.jit, static_argnames=("name", "scale", "named"))
def _run(name: str, query, key, value, mask: SliceMask | None, scale: float, *, named: bool) -> AttentionOutput:
    if mask is None:
        run = reference.dense if name == "reference" else dense.chunked
        return AttentionOutput(*run(query, key, value, scale=scale))
    static = {"scale": scale, "query_block": mask.query_block}
    if name == "reference":
        return AttentionOutput(*reference.masked(query, key, value, mask.bits, mask.query_order, **static))
    pair = _XLA if name == "xla" else (_HOPPER[name].NAMED if named else _HOPPER[name].CHOSEN)
    arrays = (query, key, value, mask.bits, mask.query_order, mask.work_order)
    return AttentionOutput(*transforms.apply(pair, *arrays, **static))
