"""Attention without a mask: in query chunks anywhere, cuDNN on NVIDIA GPUs, the CUDA kernel for an LSE on Hopper.

Refresh steps run dense, so this path has to be the fastest there is; and it must not hold `[T, S]` scores either.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fgattn_jax.implementations import transforms
from fgattn_jax.implementations.spec import CallSpec
from fgattn_jax.implementations.xla_config import XlaConfig, default_config
from fgattn_jax.masks._bits import full_words
from fgattn_jax.xla_ffi import attention as cuda_attention
from fgattn_jax.xla_ffi import support

_KERNEL_ROW = 128  # queries a row of the mask that keeps all keys
_LEAST_QUERIES = 16  # fewer would starve the products


def _chunked(query, key, value, *, scale: float, config: XlaConfig):
    batch, num_queries, num_heads, width = query.shape
    num_kv_heads = key.shape[2]
    compute = jnp.dtype(jnp.float32) if config.upcast else query.dtype
    precision = jax.lax.Precision.HIGHEST if compute == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    fitting = config.dense_scores_per_step // (batch * num_heads * key.shape[1])
    step = min(max(fitting, _LEAST_QUERIES), num_queries)
    missing = -num_queries % step
    query = jnp.pad(query, ((0, 0), (0, missing), (0, 0), (0, 0)))
    # One axis a reshape: jax 0.10 places no more on explicitly sharded heads.
    grouped = query.reshape(batch, -1, num_kv_heads, num_heads // num_kv_heads, width)
    chunks = grouped.reshape(batch, -1, step, *grouped.shape[2:])
    key, value = key.astype(compute), value.astype(compute)

    # Only the chunk's inputs are kept for the backward pass: its scores are computed again.
    @jax.checkpoint
    def chunk(q):
        scores = einsum("bmkgh,bskh->bkgms", q.astype(compute), key) * scale
        largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        # Normalised after the product: [m, H] divisions instead of [m, S].
        output = einsum("bkgms,bskh->bkgmh", weights.astype(compute), value) / total
        return output.astype(query.dtype), (largest + jnp.log(total))[..., 0]

    output, lse = jax.lax.map(chunk, jnp.moveaxis(chunks, 1, 0))
    output = jnp.einsum("cbkgmh->bcmkgh", output).reshape(batch, -1, *grouped.shape[2:])[:, :num_queries]
    lse = jnp.einsum("cbkgm->bkgcm", lse).reshape(batch, *grouped.shape[2:4], -1)[..., :num_queries]
    output, lse = output.reshape(batch, num_queries, num_heads, width), lse.reshape(batch, num_heads, num_queries)
    return output, lse


def chunked(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], *, scale: float
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention over all keys and its float32 LSE, one chunk of queries at a time; differentiable by JAX itself."""
    cpu = functools.partial(_chunked, scale=scale, config=default_config("cpu", 1))
    other = functools.partial(_chunked, scale=scale, config=default_config("accelerator", 1))
    return jax.lax.platform_dependent(query, key, value, cpu=cpu, default=other)


def cudnn_reasons(spec: CallSpec) -> tuple[str, ...]:
    """Why cuDNN's fused attention cannot run the call; empty if it can."""
    reasons = []
    if spec.platform != "gpu":
        reasons.append(f"cuDNN runs on NVIDIA GPUs, platform={spec.platform}")
    if spec.dtype not in ("bfloat16", "float16"):
        reasons.append(f"cuDNN takes bfloat16 and float16, dtype={spec.dtype}")
    if spec.head_dim > 128 or spec.head_dim % 8:
        reasons.append(f"cuDNN takes head widths that are multiples of 8 up to 128, head_dim={spec.head_dim}")
    return tuple(reasons)


def cudnn(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], *, scale: float
) -> Float[Array, "B T N H"]:
    """Attention over all keys by cuDNN where the program runs on a GPU, chunked elsewhere."""
    fused = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    return jax.lax.platform_dependent(
        query, key, value, cuda=fused, default=lambda *arrays: chunked(*arrays, scale=scale)[0]
    )


def kernel_reasons(spec: CallSpec) -> tuple[str, ...]:
    """Why the CUDA kernel cannot run the call with all keys kept; empty if it can."""
    return support.unsupported_reasons(
        head_dim=spec.head_dim,
        query_block=_KERNEL_ROW,
        dtype=spec.dtype,
        platform=spec.platform,
        compute_capability=spec.compute_capability,
    )


def by_kernel(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], *, scale: float
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention over all keys and its float32 LSE by the CUDA kernel, chunked where the program runs elsewhere.

    cuDNN's own LSE comes back in 16 bits. Gradients are those of `chunked`.
    """
    num_rows = -(-query.shape[1] // _KERNEL_ROW)
    words = jnp.asarray(full_words(key.shape[1]))
    bits = jnp.broadcast_to(words, (1, 1, num_rows, words.shape[-1]))
    arrays = (query, key, value, bits, None, None)
    return transforms.apply(_KERNEL_PAIR, *arrays, scale=scale, query_block=_KERNEL_ROW)


def _forward(query, key, value, bits, query_order, work_order, *, scale: float, query_block: int):
    def other(query, key, value, *_):
        return chunked(query, key, value, scale=scale)

    kernel = functools.partial(cuda_attention.forward, scale=scale, query_block=query_block)
    arrays = (query, key, value, bits, query_order, work_order)
    return jax.lax.platform_dependent(*arrays, cuda=kernel, default=other)


def _backward(query, key, value, bits, query_order, output, lse, d_output, d_lse, *, scale: float, query_block: int):
    del bits, query_order, output, lse, query_block
    _, pull = jax.vjp(functools.partial(chunked, scale=scale), query, key, value)
    return pull((d_output, d_lse))


_KERNEL_PAIR = transforms.KernelPair(_forward, _backward, takes_work_order=True)
