"""A multi-head attention layer in NNX whose attention skips slices."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Float32, Int

from fgattn_jax import _validation, dispatch
from fgattn_jax.attention import attention, explain
from fgattn_jax.masks import SliceMask
from fgattn_jax.nn import _flax_call
from fgattn_jax.nn.nnx_attention_fn import NNXSliceAttentionFn, check_step
from fgattn_jax.nn.rotary import rotate
from fgattn_jax.predictors import AbstractPredictor, RefreshPolicy
from fgattn_jax.types import Implementation

Rotary = tuple[Array, Array] | Callable[[Array, Array], tuple[Array, Array]]


class SliceAttention(nnx.Module):
    """Multi-head self- or cross-attention over kept slices, with masks passed in, or predicted and cached.

    Project to queries, keys and values; normalise queries and keys per head (optional); rotate them (optional); attend
    with the mask; project out. With a `predictor`, the layer makes its own mask at the steps of `policy` and keeps it
    in `SliceMaskCache` variables, allocated here for `batch`, `num_queries` and `num_keys`. Without one, every call
    takes a mask.

    Attributes:
        in_features: Channels of the inputs.
        num_heads: Query heads, `N`.
        num_kv_heads: Key/value heads, `K`, a divisor of `num_heads`; None is `num_heads`.
        head_dim: Head width, `H`; None is `in_features / num_heads`.
        context_features: Channels of the context of cross-attention; None is `in_features`.
        out_features: Channels of the result; None is `in_features`.
        use_bias: Whether the four projections have a bias.
        qk_norm: Whether queries and keys of every head are divided by their root mean square and scaled, with one
            scale of `H` entries for queries and one for keys (epsilon 1e-6).
        dtype: Dtype of the computation; None promotes inputs and parameters.
        param_dtype: Dtype of the parameters.
        predictor: Makes the masks; None if they are passed in.
        policy: When masks are made; None refreshes once, at the first step.
        batch: Batch size of the cache; with a predictor only, as are the next two and `dense`.
        num_queries: Queries of the cache.
        num_keys: Keys of the cache; None is `num_queries`.
        implementation: What runs with a mask, as in `fgattn_jax.attention`; None takes the fastest.
        dense: Whether this layer is always dense: its entry of `policy.dense_layer_flags(num_layers)`.
        rngs: Random numbers of the parameters.

    Raises:
        ValueError: Sizes do not fit each other, or arguments of the cache are missing or given without a predictor.

    Example:
        >>> from flax import nnx
        >>> from fgattn_jax import masks
        >>> from fgattn_jax.nn import SliceAttention
        >>> layer = SliceAttention(32, num_heads=2, qk_norm=True, rngs=nnx.Rngs(0))
        >>> window = masks.local_window(before=16, after=16, query_block=16, num_queries=64, num_keys=64)
        >>> layer(jax.numpy.ones((1, 64, 32)), mask=window).shape
        (1, 64, 32)

    References:
        FG-Attn, arXiv 2509.16518. RMS normalisation of queries and keys as in Wan 2.1 and Qwen 3, per head.
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_features: int | None = None,
        out_features: int | None = None,
        use_bias: bool = True,
        qk_norm: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        predictor: AbstractPredictor | None = None,
        policy: RefreshPolicy | None = None,
        batch: int | None = None,
        num_queries: int | None = None,
        num_keys: int | None = None,
        implementation: Implementation | None = None,
        dense: bool | Bool[Array, ""] | None = None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                "expected `num_heads` to be a multiple of `num_kv_heads`, got "
                f"num_heads={num_heads} and num_kv_heads={num_kv_heads}"
            )
        if head_dim is None:
            if in_features % num_heads:
                raise ValueError(
                    f"expected in_features={in_features} to be a multiple of num_heads={num_heads}: give `head_dim`"
                )
            head_dim = in_features // num_heads
        _validation.check_implementation(implementation)
        self.in_features = in_features
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.context_features = in_features if context_features is None else context_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation: Implementation | None = implementation
        self.attention_fn = nnx.data(None)
        if predictor is None:
            cache = {"policy": policy, "batch": batch, "num_queries": num_queries, "num_keys": num_keys, "dense": dense}
            given = [name for name, x in cache.items() if x is not None]
            if given:
                raise ValueError(
                    f"expected a `predictor` with {', '.join(f'`{name}`' for name in given)}, got predictor=None: they "
                    "describe the cache of predicted masks; give a predictor or leave them out"
                )
        else:
            missing = [name for name, x in (("batch", batch), ("num_queries", num_queries)) if x is None]
            if batch is None or num_queries is None:
                raise ValueError(
                    f"expected {' and '.join(f'`{name}`' for name in missing)} with a `predictor`, got None: the mask "
                    "cache is allocated up front, so that its shape never changes"
                )
            self.attention_fn = nnx.data(
                NNXSliceAttentionFn(
                    predictor,
                    policy,
                    batch=batch,
                    num_heads=num_heads,
                    num_queries=num_queries,
                    num_keys=num_keys,
                    implementation=implementation,
                    dense=dense,
                )
            )

        def project(features: int, heads: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                features, (heads, head_dim), use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.query = project(in_features, num_heads)
        self.key = project(self.context_features, num_kv_heads)
        self.value = project(self.context_features, num_kv_heads)
        self.query_norm = nnx.data(None)
        self.key_norm = nnx.data(None)
        if qk_norm:
            self.query_norm = nnx.data(nnx.RMSNorm(head_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs))
            self.key_norm = nnx.data(nnx.RMSNorm(head_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs))
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            in_features if out_features is None else out_features,
            axis=(-2, -1),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        inputs: Float[Array, "B T D"],
        context: Float[Array, "B S C"] | None = None,
        *,
        mask: SliceMask | Literal["dense"] | None = None,
        rotary: Rotary | None = None,
        step: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "B T E"]:
        """Attend, and advance the cache of a layer that predicts its masks by one step.

        Args:
            inputs: What asks.
            context: What is attended to; None is `inputs` (self-attention).
            mask: The slices to keep. None uses the predicted mask. "dense" keeps all and leaves the cache alone, for
                training and for comparison.
            rotary: `(cos, sin)` tables of shape `[T, H/2]` or `[B|1, T, H/2]` that turn neighbouring channel pairs
                of queries and keys, in self-attention; or a function from (query, key) `[B, T|S, N|K, H]` to both
                rotated. Applied after the normalisation.
            step: Number of the denoising step for the policy; None counts calls. See `NNXSliceAttentionFn.attend`.

        Raises:
            ValueError: Shapes do not fit the layer or its cache; there is neither a mask nor a predictor, or both; a
                `step` is given without a predictor; tables come with a context.
            UnsupportedError: The named implementation cannot run the call.
        """
        self._check_inputs(inputs, context)
        self._check_mask(mask, step)
        source = inputs if context is None else context
        query, key, value = self.query(inputs), self.key(source), self.value(source)  # [B, T, N, H], [B, S, K, H]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if callable(rotary):
            query, key = rotary(query, key)
        elif rotary is not None:
            if context is not None:
                raise ValueError(
                    "expected a function for `rotary` in cross-attention, got tables: they hold the positions of the "
                    "queries, and those of the context are not known; give a function of (query, key)"
                )
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        query, key, value = _flax_call.promote(self.dtype, query, key, value)
        if mask is None and self.attention_fn is not None:
            output = self.attention_fn.attend(query, key, value, step=step)
        elif isinstance(mask, SliceMask):
            output = attention(query, key, value, mask, implementation=self.implementation)
        else:
            output = attention(query, key, value)
        return self.out(output)

    def density(self) -> Float32[Array, " *L"]:
        """Share of the slices that cached steps compute, per stacked layer; see `NNXSliceAttentionFn.density`.

        Raises:
            ValueError: The layer has no predictor: ask the mask that is passed in.
        """
        return self._cache("density").density()

    def reset(self) -> None:
        """Forget the cached mask and start again at step 0, in place; for all layers, if they are stacked.

        Raises:
            ValueError: The layer has no predictor.
        """
        self._cache("reset").reset()

    def explain(self, mask: SliceMask | None = None) -> dispatch.Explanation:
        """Which implementation this layer runs with masks, and why not the others; nothing runs.

        Args:
            mask: The mask that would be passed in, for a layer without a predictor.

        Raises:
            ValueError: There is neither a mask nor a predictor, or both, or the mask is for other heads.
        """
        self._check_mask(mask, None)
        sizes = mask if isinstance(mask, SliceMask) else self._cache("explain")
        batch = sizes.bits.shape[-4]
        num_queries, num_keys = sizes.num_queries, sizes.num_keys
        dtype = jnp.dtype(self.param_dtype if self.dtype is None else self.dtype)
        query = jax.ShapeDtypeStruct((batch, num_queries, self.num_heads, self.head_dim), dtype)
        key = jax.ShapeDtypeStruct((batch, num_keys, self.num_kv_heads, self.head_dim), dtype)
        if self.attention_fn is None:
            return explain(query, key, key, mask, implementation=self.implementation)
        return self.attention_fn.explain(query, key, key)

    def _cache(self, what: str) -> NNXSliceAttentionFn:
        if self.attention_fn is None:
            raise ValueError(f"`{what}` needs a layer with a `predictor`; this one takes its masks from the caller")
        return self.attention_fn

    def _check_inputs(self, inputs: Array, context: Array | None) -> None:
        named = [("inputs", inputs, self.in_features)]
        named.append(("context", inputs if context is None else context, self.context_features))
        for name, x, features in named:
            if x.ndim != 3:
                raise ValueError(f"expected `{name}` [batch, length, channels], got shape={x.shape}: fold other axes")
            if x.shape[2] != features:
                cure = (
                    "" if context is not None or name == "inputs" else " (there is no context: `inputs` stand for it)"
                )
                raise ValueError(f"expected `{name}` with {features} channels, got shape={x.shape}{cure}")

    def _check_mask(self, mask: SliceMask | str | None, step: Array | int | None) -> None:
        if isinstance(mask, str) and mask != "dense":
            raise ValueError(f'expected a SliceMask, "dense" or None for `mask`, got mask={mask!r}')
        if mask is not None and not isinstance(mask, str | SliceMask):
            raise ValueError(
                f'expected a SliceMask, "dense" or None for `mask`, got {type(mask).__name__}: make one with '
                "`fgattn_jax.masks.from_dense`"
            )
        if mask is None and self.attention_fn is None:
            raise ValueError(
                'expected a `mask` in a layer without a predictor, got None: pass a SliceMask, or "dense" to keep all'
            )
        if isinstance(mask, SliceMask) and self.attention_fn is not None:
            raise ValueError(
                "expected no `mask` in a layer with a predictor, got a SliceMask: leave it out, or make the layer "
                "without a predictor"
            )
        check_step(step)
        if step is not None and (self.attention_fn is None or mask is not None):
            raise ValueError(f"expected `step` only where a mask is predicted, got step={step!r}: leave it out")
