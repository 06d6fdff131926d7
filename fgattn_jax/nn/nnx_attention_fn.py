"""An `attention_fn` for `flax.nnx.MultiHeadAttention` that owns its cached mask."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Float32, Int

from fgattn_jax import dispatch
from fgattn_jax.attention import explain
from fgattn_jax.masks import SliceMask
from fgattn_jax.nn import _cached_step, _flax_call
from fgattn_jax.predictors import AbstractPredictor, RefreshPolicy
from fgattn_jax.types import Implementation

TEMPLATE_WIDTH = 16
"""Head width at which the shape of the mask is asked for: it does not depend on it."""


class SliceMaskCache(nnx.Cache):
    """Variables of a cached mask: its bits, its query order, and the counters that say how old it is.

    Where the policy refreshes in one pass, the LSE of the last step is one of them.

    Split, carry and reset with this type as the filter: `nnx.split(model, nnx.Param, SliceMaskCache, ...)`. All zeros
    mean that no mask was made yet.
    """


class DenseLayerFlag(nnx.Variable):
    """Whether a layer is always dense, where layers are stacked. Not part of the cache: a reset leaves it alone."""


class NNXSliceAttentionFn(nnx.Module):
    """Attention over the slices of a mask that it predicts and keeps: `MultiHeadAttention(attention_fn=...)`.

    At the steps that `policy` names, the predictor makes a new mask; between them the cached one is used. Every call
    is one step unless `attend` is told its number. A predictor that needs the LSE of dense attention makes its mask at
    a dense step; another one makes it first, and attention uses it at once.

    Give every layer an object of its own (layers that share one share its mask and count steps together). Forwards
    of classifier-free guidance that run apart need a cache each: `nnx.split` one off per branch.

    Attributes:
        predictor: Makes the masks.
        policy: When masks are made; steps are numbered from 0 since the last `reset`. None refreshes once, at step 0.
        batch: Batch size; the product of all axes in front of the length.
        num_heads: Query heads.
        num_queries: Queries.
        num_keys: Keys; None for self-attention.
        implementation: What runs with a mask: a name as in `fgattn_jax.attention`, or None for the fastest. Dense
            steps take the fastest dense path.
        dense: Whether this layer is always dense: its entry of `policy.dense_layer_flags(num_layers)`. A bool decides
            before tracing; an array, as `nnx.vmap` over layers passes it, is kept in a `DenseLayerFlag`.

    Raises:
        ValueError: An argument is of another kind, the policy names dense layers and `dense` is None, it refreshes in
            one pass and the predictor cannot, or the budget or query order of the predictor does not fit the lengths.

    Note:
        Works under nnx.jit, nnx.scan over stacked layers, and `jax.lax.scan` over steps with one trace. Under
        `vmap` over the cache, `lax.cond` becomes a select: every step then computes both ways.

    Example:
        >>> from flax import nnx
        >>> from fgattn_jax.nn import NNXSliceAttentionFn
        >>> from fgattn_jax.predictors import ExactPredictor, RefreshPolicy
        >>> sparse = NNXSliceAttentionFn(
        ...     ExactPredictor(16), RefreshPolicy(every=15), batch=1, num_heads=2, num_queries=64
        ... )
        >>> layer = nnx.MultiHeadAttention(2, 32, decode=False, attention_fn=sparse, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((1, 64, 32))).shape
        (1, 64, 32)
        >>> int(sparse.num_refreshes[...]), 0 < float(sparse.density()) <= 1
        (1, True)

    References:
        FG-Attn, arXiv 2509.16518, cached masks and mean-query masks.
    """

    def __init__(
        self,
        predictor: AbstractPredictor,
        policy: RefreshPolicy | None = None,
        *,
        batch: int,
        num_heads: int,
        num_queries: int,
        num_keys: int | None = None,
        implementation: Implementation | None = None,
        dense: bool | Bool[Array, ""] | None = None,
    ):
        self.policy, flag = _cached_step.check_settings(predictor, policy, dense, implementation)
        self.predictor = predictor
        self.implementation: Implementation | None = implementation
        num_keys = num_queries if num_keys is None else num_keys
        self.batch = _size("batch", batch)
        self.num_heads = _size("num_heads", num_heads)
        self.num_queries = _size("num_queries", num_queries)
        self.num_keys = _size("num_keys", num_keys)
        self.dense = flag if isinstance(flag, bool) else DenseLayerFlag(flag)
        template = _cached_step.mask_structure(
            predictor,
            jax.ShapeDtypeStruct((batch, num_queries, num_heads, TEMPLATE_WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((batch, num_keys, num_heads, TEMPLATE_WIDTH), jnp.float32),
        )
        self.query_block = template.query_block
        order = template.query_order
        self.bits = SliceMaskCache(jnp.zeros(template.bits.shape, jnp.uint32))
        self.query_order = nnx.data(None if order is None else SliceMaskCache(jnp.zeros(order.shape, jnp.int32)))
        self.num_steps = SliceMaskCache(jnp.zeros((), jnp.int32))
        self.age = SliceMaskCache(jnp.zeros((), jnp.int32))
        self.num_refreshes = SliceMaskCache(jnp.zeros((), jnp.int32))
        lse = _cached_step.empty_lse(self.policy, batch, num_heads, num_queries)
        self.lse = nnx.data(None if lse is None else SliceMaskCache(lse))

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K H"],
        bias: None = None,
        mask: None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: None = None,
        is_causal: bool = False,
        input_positions: None = None,
    ) -> Float[Array, "*B T N H"]:
        """Attention of one step, as `MultiHeadAttention` asks for it. Use `attend` in code of your own.

        Args:
            query: Queries with any axes in front of the length; they are folded into the batch.
            key: Keys, with the leading axes of the queries; `K` divides `N` (`num_kv_heads`).
            value: Values.
            bias: Refused.
            mask: Refused: the predictor says which slices are kept.
            broadcast_dropout: Says how dropout is drawn; there is none.
            dropout_rng: As above.
            dropout_rate: Refused above 0 unless `deterministic`.
            deterministic: Turns dropout off.
            dtype: Dtype of the computation; None promotes the inputs.
            precision: Never lower than asked: scores and sums are float32 at the highest precision.
            module: Refused: there are no weights to sow.
            is_causal: Refused.
            input_positions: Refused: rotate queries and keys before.

        Raises:
            UnsupportedError: Something refused was given; the message lists all of it.
            ValueError: The shapes are not those the cache was made for, or do not fit each other.
        """
        del broadcast_dropout, dropout_rng, precision
        _flax_call.refuse(
            bias=bias,
            mask=mask,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            module=module,
            others={
                "is_causal": (is_causal, _CAUSAL),
                "input_positions": (input_positions, "rotate in `fgattn_jax.nn.SliceAttention(...)(x, rotary=...)`"),
            },
        )
        query, key, value = _flax_call.promote(dtype, query, key, value)
        return self.attend(*_flax_call.fold(query, key, value)).reshape(query.shape)

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        *,
        step: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attention of one step; the cache is advanced in place.

        Args:
            query: Queries, keys and values as in `fgattn_jax.attention`.
            key: See `query`.
            value: See `query`.
            step: Number of the denoising step, an integer or a traced one; None counts calls. The same step may come
                again (a second evaluation of the solver): a mask made at this step is not made again. A lower step
                than the last one starts a new run, whose mask is made anew.

        Raises:
            ValueError: The shapes are not those the cache was made for, `step` is not a step, or arrays do not fit.
        """
        if query.ndim == 4 and key.ndim == 4:
            self._check_shapes(query.shape, key.shape)
        check_step(step)
        counters = (self.num_steps[...], self.age[...], self.num_refreshes[...])
        state = _cached_step.MaskState(self.mask, *counters, None if self.lse is None else self.lse[...])
        output, state = _cached_step.attend(
            query,
            key,
            value,
            state,
            settings=(self.predictor, self.policy, self.implementation),
            dense=self.dense if isinstance(self.dense, bool) else self.dense[...],
            step=step,
        )
        self.bits[...] = state.mask.bits
        if self.query_order is not None:
            self.query_order[...] = state.mask.query_order
        self.num_steps[...] = state.num_steps
        self.age[...] = state.age
        self.num_refreshes[...] = state.num_refreshes
        if self.lse is not None:
            self.lse[...] = state.lse
        return output

    @property
    def mask(self) -> SliceMask:
        """The cached mask (of all layers, if they are stacked). Empty until the first refresh."""
        order = None if self.query_order is None else self.query_order[...]
        return self._mask(self.bits[...], order)

    def density(self) -> Float32[Array, " *L"]:
        """Share of the slices that cached steps compute: a scalar, or one per stacked layer.

        1 for a layer that is always dense, NaN where no mask was made yet.
        """
        density = jnp.mean(self.mask.row_density(), axis=(-3, -2, -1))
        density = jnp.where(self.num_refreshes[...] > 0, density, jnp.nan)
        return jnp.where(self.dense if isinstance(self.dense, bool) else self.dense[...], 1.0, density)

    def explain(
        self,
        query: Float[Array, "B T N H"] | jax.ShapeDtypeStruct,
        key: Float[Array, "B S K H"] | jax.ShapeDtypeStruct,
        value: Float[Array, "B S K H"] | jax.ShapeDtypeStruct,
    ) -> dispatch.Explanation:
        """Which implementation steps with a mask run, and why not the others; shapes are enough, nothing runs.

        Raises:
            ValueError: The shapes are not those the cache was made for, or do not fit each other.
        """
        if query.ndim == 4 and key.ndim == 4:
            self._check_shapes(query.shape, key.shape)
        if self.dense is True:
            return explain(query, key, value)
        abstract = jax.eval_shape(lambda: self._empty_mask())
        return explain(query, key, value, abstract, implementation=self.implementation)

    def reset(self) -> None:
        """Forget the mask and start again at step 0, in place; for all layers, if they are stacked."""
        for variable in (self.bits, self.query_order, self.num_steps, self.age, self.num_refreshes, self.lse):
            if variable is not None:
                variable[...] = jnp.zeros_like(variable[...])

    def _mask(self, bits, query_order) -> SliceMask:
        return SliceMask(
            bits, query_order, query_block=self.query_block, num_keys=self.num_keys, num_queries=self.num_queries
        )

    def _empty_mask(self) -> SliceMask:
        # Of one layer, where layers are stacked.
        order = None if self.query_order is None else jnp.zeros(self.query_order[...].shape[-3:], jnp.int32)
        bits = jnp.zeros(self.bits[...].shape[-4:], jnp.uint32)
        return self._mask(bits, order)

    def _check_shapes(self, query: tuple[int, ...], key: tuple[int, ...]) -> None:
        have = {"batch": query[0], "num_heads": query[2], "num_queries": query[1], "num_keys": key[1]}
        want = {name: getattr(self, name) for name in have}
        if have != want:
            raise ValueError(
                f"the mask cache is made for {_list(want)}, got {_list(have)}: make the attention object for these "
                "sizes (masks of other lengths mean nothing here)"
            )


_CAUSAL = (
    "predicted masks are not causal; intersect with `fgattn_jax.masks.causal` and call `fgattn_jax.attention` yourself"
)


def check_step(step: Any) -> None:
    """Raise ValueError unless `step` is None, an integer from 0 on, or a traced integer."""
    if step is None:
        return
    is_integer = not isinstance(step, bool) and jnp.issubdtype(jnp.result_type(step), jnp.integer)
    if not is_integer or np.shape(step) != ():
        raise ValueError(f"expected one integer for `step`, got step={step!r}: give the number of the denoising step")
    if isinstance(step, int | np.integer) and step < 0:
        raise ValueError(f"expected `step` >= 0, got step={step}: steps count from 0")


def _size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"expected an integer `{name}` >= 1, got {name}={value!r}")
    return int(value)


def _list(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
