"""Which calls the CUDA kernel can run, and in words why not."""


def unsupported_reasons(*, head_dim: int, query_block: int, dtype: str, platform: str) -> tuple[str, ...]:
    """Says why the CUDA kernel cannot run a call.

    It never raises and looks at nothing but its arguments: no device is queried, no library is loaded.

    Args:
        head_dim: Width of a head (`H`).
        query_block: Queries per slice (`M`).
        dtype: Name of the dtype of query, key and value, as `"bfloat16"`.
        platform: Where the call would run, as JAX names it: `"cpu"`, `"gpu"`, `"cuda"`, `"rocm"` or `"tpu"`.

    Returns:
        One sentence per reason; empty if the call is supported. This release ships no such kernel, so the first
        reason always holds.
    """
    reasons = ["this release ships no CUDA kernel; `implementation='xla'` runs this call on every device"]
    if platform not in ("gpu", "cuda"):
        reasons.append(f"it will need an NVIDIA GPU of the Hopper generation, and platform={platform!r}")
    if dtype not in ("bfloat16", "float16"):
        reasons.append(f"it will take bfloat16 or float16, and dtype={dtype!r}")
    if head_dim not in (64, 128):
        reasons.append(f"it will take head widths 64 and 128, and head_dim={head_dim}")
    if query_block not in (64, 128):
        reasons.append(f"it will take 64 or 128 queries per slice, and query_block={query_block}")
    return tuple(reasons)
