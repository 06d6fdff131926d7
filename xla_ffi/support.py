"""Which calls the CUDA kernel can run, and in words why not."""

from fgattn_jax.xla_ffi import library

# No kernel runs by itself before it passed its tests on a GPU: tests/test_gpu_ledger.py allows True only when
# tests/gpu_ledger.json holds such a run of exactly these sources.
RELEASED = True
MASKS_RELEASED = True
"""The same for the kernels that make masks."""

COMPUTE_CAPABILITY = "9.0"
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
QUERY_BLOCKS = (64, 128)


def unsupported_reasons(
    *,
    head_dim: int,
    query_block: int,
    dtype: str,
    platform: str,
    compute_capability: str | None = None,
    for_masks: bool = False,
) -> tuple[str, ...]:
    """Says why the CUDA kernel cannot run a call.

    It never raises and queries no device; it looks for the library, and loads it if there is one.

    Args:
        head_dim: Width of a head (`H`).
        query_block: Queries per slice (`M`).
        dtype: Name of the dtype of query, key and value, as `"bfloat16"`.
        platform: Where the call would run, as JAX names it: `"cpu"`, `"gpu"`, `"cuda"`, `"rocm"` or `"tpu"`.
        compute_capability: Of the GPU, as `"9.0"`; None off NVIDIA GPUs or where it is not known.
        for_masks: The call makes a mask, and `query_block` is that of the mask.

    Returns:
        One sentence per reason; empty if the call is supported.
    """
    reasons = []
    if not (MASKS_RELEASED if for_masks else RELEASED):
        reasons.append("the CUDA kernel of this version has not passed its tests on a GPU yet")
    reasons.extend(library.unusable_reasons())
    if platform not in ("gpu", "cuda"):
        reasons.append(f"it needs an NVIDIA GPU of the Hopper generation, and platform={platform!r}")
    elif compute_capability != COMPUTE_CAPABILITY:
        reasons.append(
            f"it needs a GPU of the Hopper generation (compute_capability={COMPUTE_CAPABILITY!r}), "
            f"and compute_capability={compute_capability!r}"
        )
    reasons.extend(argument_reasons(head_dim=head_dim, query_block=query_block, dtype=dtype))
    return tuple(reasons)


def argument_reasons(*, head_dim: int, query_block: int, dtype: str) -> tuple[str, ...]:
    """The reasons of `unsupported_reasons` that lie in the arguments alone, whatever the machine."""
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"it takes bfloat16 or float16, and dtype={dtype!r}")
    if head_dim not in HEAD_DIMS:
        reasons.append(f"it takes head widths 64 and 128, and head_dim={head_dim}")
    if query_block not in QUERY_BLOCKS:
        reasons.append(f"it takes 64 or 128 queries per slice, and query_block={query_block}")
    return tuple(reasons)
