"""Static facts of a call: all that decides which implementation can run it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """One call to `attention`, without its arrays.

    Args:
        batch: `B`.
        num_queries: `T`.
        num_keys: `S`.
        num_heads: Query heads `N`.
        num_kv_heads: Key/value heads `K`.
        head_dim: `H`.
        dtype: Name of the dtype of query, key and value.
        query_block: Queries per slice `M`; None without a mask (dense attention).
        platform: Where the program will run: "cpu", "gpu" or "tpu".
        compute_capability: Of the GPU, "9.0" on Hopper; None off NVIDIA GPUs.
    """

    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    query_block: int | None
    platform: str
    compute_capability: str | None = None
