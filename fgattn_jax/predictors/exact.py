"""Masks from the exact attention probabilities (the paper's cached masks)."""

import dataclasses
from typing import Any, Literal

from jaxtyping import Array, Float, Float32

from fgattn_jax.masks import SliceMask
from fgattn_jax.predictors import _inputs
from fgattn_jax.predictors._scores import predict_bits
from fgattn_jax.predictors.abstract import AbstractPredictor
from fgattn_jax.predictors.budget import Budget

PEAK_THRESHOLD = 0.5
"""Default threshold of the `"peak"` statistic in units of `1 / S` (the paper's)."""
MASS_SHARE = 0.95
"""Default share of a row's probability mass that the `"mass"` statistic keeps."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExactPredictor(AbstractPredictor):
    """Keep the slices whose exact probabilities matter.

    With `p[i, s] = exp(scale * q_i . k_s - lse_i)`, the score of slice (row `r`, key `s`) is

        `"peak"`: `max over the queries i of row r of p[i, s]`
        `"mass"`: `sum over the queries i of row r of p[i, s]`

    and `budget` says which scores are kept. `"peak"` keeps by default what exceeds `0.5 / S` (FG-Attn). `"mass"`
    keeps by default the smallest set of keys that holds 95 % of the row's mass: the share of the mass that the mask
    loses is known and bounded at the step it is made.

    Attributes:
        query_block: Queries per slice, `M`: 16, 32, 64 or 128.
        query_order: The query at each position before grouping: int32 `[T]` or `[B|1, N|1, T]`, known before
            tracing. None is raster order. Stored as a read-only NumPy array.
        statistic: `"peak"` or `"mass"`.
        budget: How many keys a row keeps. Without a rule of its own it takes the default of the statistic.
        chunk_bytes: Bytes of float32 scores held at once. None: 4 MiB on a CPU, 256 MiB elsewhere.

    Raises:
        ValueError: An attribute is out of range.

    Note:
        Cost: one `Q K^T` product in chunks, about half a dense attention, twice that with a per-head floor. The mask
        leaves each chunk as bits; memory does not grow with `T * S`. The LSE of dense attention spares a maximum
        and a sum of exponentials over every chunk, and no product: without it the call works and is somewhat slower.
        On Hopper GPUs a kernel makes the mask of 16-bit inputs where the LSE is given and H and M are 64 or 128, but
        for peaks that the budget ranks (anything beyond a threshold and `min_keys` of 0 or 1).
        Products of float32 inputs are full float32; those of bfloat16 and float16 are exact and summed in float32.
        Not differentiable (bits). Under `jit` with sharded heads or batch, wrap the call in `shard_map`: heads are
        scored one after the other.

    Example:
        >>> import jax
        >>> query = jax.random.normal(jax.random.key(0), (1, 128, 2, 32))
        >>> predictor = ExactPredictor(64, statistic="mass", budget=Budget(top_p=0.9, min_keys=16))
        >>> predictor(query, query).bits.shape  # [B, N, R, W]
        (1, 2, 2, 4)

    References:
        FG-Attn (arXiv 2509.16518), cached masks; LoSA (arXiv 2608.12032), exact mass per query block.
    """

    query_block: int
    query_order: Any = None
    statistic: Literal["peak", "mass"] = "peak"
    budget: Budget = dataclasses.field(default_factory=Budget)
    chunk_bytes: int | None = None

    def __post_init__(self):
        _inputs.check_query_block(self.query_block)
        object.__setattr__(self, "query_order", _inputs.freeze_order(self.query_order))
        if self.statistic not in ("peak", "mass"):
            raise ValueError(f"expected `statistic` to be 'peak' or 'mass', got statistic={self.statistic!r}")
        _inputs.check_budget(self.budget)
        _inputs.check_chunk_bytes(self.chunk_bytes)

    @property
    def needs_lse(self) -> bool:
        """True: the LSE of dense attention spares work."""
        return True

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        lse: Float32[Array, "B N T"] | None = None,
        *,
        scale: float | None = None,
    ) -> SliceMask:
        """Make the mask of these queries and keys.

        Args:
            query: Queries, float32, bfloat16 or float16.
            key: Keys; `K` divides `N`.
            lse: Natural-log LSE of *dense* attention with the same `scale`, as `attention_with_lse` returns it. A
                query whose LSE is -inf counts as nothing. None: computed here.
            scale: Softmax scale; None is `1 / sqrt(H)`.

        Returns:
            A mask with `R = ceil(T / M)` rows for every batch entry and query head. The missing queries of a ragged
            last row count as nothing.

        Raises:
            ValueError: Shapes or dtypes do not fit together, or the budget or the order does not fit the call.
        """
        _inputs.check_arrays(query, key, lse)
        batch, num_queries, num_heads, width = query.shape
        num_keys = key.shape[1]
        if self.statistic == "peak":
            budget = self.budget.with_default(threshold=PEAK_THRESHOLD / num_keys)
        else:
            budget = self.budget.with_default(top_p=MASS_SHARE)
        budget.check_fits(num_keys, num_heads)
        order = _inputs.order_operand(self.query_order, batch, num_queries, num_heads)
        bits = predict_bits(
            query,
            key,
            lse,
            order,
            _inputs.resolve_scale(scale, width),
            _inputs.queries_of_rows(num_queries, self.query_block),
            query_block=self.query_block,
            statistic=self.statistic,
            budget=budget,
            chunk_bytes=self.chunk_bytes,
        )
        return SliceMask(bits, order, query_block=self.query_block, num_keys=num_keys, num_queries=num_queries)
