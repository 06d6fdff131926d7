"""Masks from the mean of the queries of a slice (the paper's pooled masks)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from fgattn_jax.masks import SliceMask
from fgattn_jax.predictors import _hopper, _inputs
from fgattn_jax.predictors._scores import predict_bits
from fgattn_jax.predictors.abstract import AbstractPredictor
from fgattn_jax.predictors.budget import Budget

MEAN_THRESHOLD = 0.1
"""Default threshold in units of `1 / S`: the mean of probabilities is flatter than their maximum."""


@dataclasses.dataclass(frozen=True, eq=False)
class MeanQueryPredictor(AbstractPredictor):
    """Keep the slices whose key the mean query of the slice attends to.

    The `M` queries of a row are split into `num_means` parts of neighbours, `m_a` is the mean of part `a`, a query of
    the queries' own dtype, and the score of slice (row `r`, key `s`) is

        `mean over the parts a of softmax over s of (scale * m_a . k_s)`

    a probability per key. Without a rule of its own, the budget keeps scores greater than `0.1 / S`: the threshold of
    the exact peak (`0.5 / S`) is another operating point here, since the maximum over queries is gone.

    Attributes:
        query_block: Queries per slice, `M`: 16, 32, 64 or 128.
        query_order: The query at each position before grouping: int32 `[T]` or `[B|1, N|1, T]`, known before
            tracing. None is raster order. Stored as a read-only NumPy array. A mean says little about queries that
            have little in common: use an order that groups neighbours in space and time.
        num_means: Parts per slice, a divisor of `query_block`. More parts see more of what single queries look for,
            and cost more.
        budget: How many keys a row keeps.
        chunk_bytes: Bytes of float32 scores held at once. None: 4 MiB on a CPU, 256 MiB elsewhere.

    Raises:
        ValueError: An attribute is out of range.

    Note:
        Cost: `num_means / M` of one `Q K^T` product, twice that with a per-head floor. Means are summed in float32 and
        rounded to the dtype of the queries, as frameworks take them. On Hopper GPUs a kernel makes the mask; keys that
        it ranks (all budgets but a plain threshold) have probabilities of 16 bits: closer than 0.1 % they may change
        places. With one mean per row nearly all rows of `top_k` and `top_p` are ranked more finely (docs/numerics.md).
        Not differentiable (bits). Proxy scores are over-confident: with `top_p`, give `min_keys` or `head_floor`.
        Probabilities of the parts are averaged because that kept more of the exact mass at equal density than the
        log-sum-exp of their logits in nearly every setting of a trial on synthetic smooth fields with three-axis
        rotary embedding (2 048 tokens, `M = 64`, density 0.1 and 0.25), and lost at most 0.02 to their maximum.
        In that trial the query order was worth more than more parts, and an order costs nothing.

    Example:
        >>> import jax
        >>> query = jax.random.normal(jax.random.key(0), (1, 128, 2, 32))
        >>> MeanQueryPredictor(64, budget=Budget(top_k=32))(query, query).counts().tolist()
        [[[32, 32], [32, 32]]]

    References:
        FG-Attn (arXiv 2509.16518), mean-query masks; SubBlock and HyMoR score sub-means.
    """

    query_block: int
    query_order: Any = None
    num_means: int = 1
    budget: Budget = dataclasses.field(default_factory=Budget)
    chunk_bytes: int | None = None

    def __post_init__(self):
        _inputs.check_query_block(self.query_block)
        object.__setattr__(self, "query_order", _inputs.freeze_order(self.query_order))
        num_means = self.num_means
        if isinstance(num_means, bool) or not isinstance(num_means, int) or num_means < 1:
            raise ValueError(f"expected an integer `num_means` >= 1, got num_means={num_means!r}")
        if self.query_block % num_means:
            raise ValueError(
                f"expected `num_means` to divide query_block={self.query_block}, got num_means={num_means}: "
                "give a power of two"
            )
        _inputs.check_budget(self.budget)
        _inputs.check_chunk_bytes(self.chunk_bytes)

    @property
    def needs_lse(self) -> bool:
        """False: the softmax is that of the means."""
        return False

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
            lse: Must be None: the LSE of single queries does not normalise their mean.
            scale: Softmax scale; None is `1 / sqrt(H)`.

        Returns:
            A mask with `R = ceil(T / M)` rows for every batch entry and query head. In a ragged last row the missing
            queries count as nothing, and so do parts that hold none.

        Raises:
            ValueError: Shapes or dtypes do not fit together, `lse` is given, or the budget or the order does not fit.
        """
        if lse is not None:
            raise ValueError("expected no `lse` (`needs_lse` is False), got an array: leave it out")
        _inputs.check_arrays(query, key, None)
        batch, num_queries, num_heads, width = query.shape
        num_keys = key.shape[1]
        budget = self.budget.with_default(threshold=MEAN_THRESHOLD / num_keys)
        budget.check_fits(num_keys, num_heads)
        order = _inputs.order_operand(self.query_order, batch, num_queries, num_heads)

        def plain(query, key, order, scale):
            return predict_bits(
                mean_queries(query, order, self.query_block // self.num_means),
                key,
                None,
                None,
                scale,
                _inputs.queries_of_rows(num_queries, self.query_block),
                query_block=self.num_means,
                statistic="mean",
                budget=budget,
                chunk_bytes=self.chunk_bytes,
            )

        operands = jax.lax.stop_gradient((query, key, order, _inputs.resolve_scale(scale, width)))
        kernel = _hopper.mean_bits(query, key, budget, self.query_block, self.num_means)
        if kernel is None:
            bits = plain(*operands)
        else:
            bits = jax.lax.platform_dependent(*operands, cuda=kernel, default=plain)
        return SliceMask(bits, order, query_block=self.query_block, num_keys=num_keys, num_queries=num_queries)


def mean_queries(
    query: Float[Array, "B T N H"], query_order: Int32[Array, "B N T"] | None, group: int
) -> Float[Array, "B G N H"]:
    """Means of every `group` queries in order: `G = ceil(T / group)`, the last one over the queries there are.

    Summed in float32, in the dtype of the queries: a kernel multiplies them as it does queries.
    """
    batch, num_queries, num_heads, width = query.shape
    if query_order is not None:
        numbers = jnp.swapaxes(query_order, 1, 2)[..., None]  # [B|1, T, N|1, 1]
        query = jnp.take_along_axis(query, numbers, axis=1)
    groups = -(-num_queries // group)
    padded = jnp.pad(query, ((0, 0), (0, groups * group - num_queries), (0, 0), (0, 0)))
    sums = jnp.sum(padded.reshape(batch, groups, group, num_heads, width), axis=2, dtype=jnp.float32)
    sizes = jnp.minimum(num_queries - jnp.arange(groups) * group, group)
    return (sums / jax.lax.expand_dims(sizes, (0, 2, 3)).astype(jnp.float32)).astype(query.dtype)
