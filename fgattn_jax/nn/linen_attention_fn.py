"""An `attention_fn` for `flax.linen.MultiHeadDotProductAttention` that owns its cached mask."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, DTypeLike, Float

from fgattn_jax.masks import SliceMask
from fgattn_jax.nn import _cached_step, _flax_call
from fgattn_jax.predictors import AbstractPredictor, RefreshPolicy
from fgattn_jax.types import Implementation

COLLECTION = "slice_mask"
"""The variable collection of the cached masks."""


class LinenSliceAttentionFn(nn.Module):
    """Attention over the slices of a mask that it predicts and keeps, in the variable collection `"slice_mask"`.

    `MultiHeadDotProductAttention(attention_fn=LinenSliceAttentionFn(predictor, policy))`. The collection is made by
    `init` for the lengths it is called with, and holds per layer a `SliceMask` (`mask`), the int32 counters
    `num_steps`, `age` and `num_refreshes`, and, where the policy refreshes in one pass, the `lse` of the last step.
    Every call is one step. Pass the collection to `apply` with `mutable=["slice_mask"]` and carry what comes back;
    `jax.tree.map(jnp.zeros_like, ...)` of it starts a new run.

    Make the object where the layer is made, one for each: layers that share one share its mask.

    Attributes:
        predictor: Makes the masks. One that needs the LSE of dense attention makes its mask at a dense step; another
            one makes it first, and attention uses it at once.
        policy: When masks are made; steps are numbered from 0. None refreshes once, at step 0.
        implementation: What runs with a mask: a name as in `fgattn_jax.attention`, or None for the fastest. Dense
            steps take the fastest dense path.
        dense: Whether this layer is always dense: its entry of `policy.dense_layer_flags(num_layers)`, which under
            `nn.scan` over layers is an input of the scanned block.

    Raises:
        ValueError: At the first call: an argument is of another kind, the policy names dense layers and `dense` is
            None, or it refreshes in one pass and the predictor cannot.

    Example:
        >>> import flax.linen as nn
        >>> from fgattn_jax.nn import LinenSliceAttentionFn
        >>> from fgattn_jax.predictors import ExactPredictor, RefreshPolicy
        >>> sparse = LinenSliceAttentionFn(ExactPredictor(16), RefreshPolicy(every=15))
        >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=sparse)
        >>> x = jax.numpy.ones((1, 64, 32))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, masks = layer.apply(variables, x, mutable=["slice_mask"])
        >>> int(masks["slice_mask"]["attention_fn"]["num_refreshes"])
        1

    References:
        FG-Attn, arXiv 2509.16518, cached masks and mean-query masks.
    """

    predictor: AbstractPredictor
    policy: RefreshPolicy | None = None
    _: dataclasses.KW_ONLY
    implementation: Implementation | None = None
    dense: bool | Bool[Array, ""] | None = None

    # Every keyword by name: Linen drops those that the signature does not name, and a dropped mask would be silent.
    @nn.compact
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
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: None = None,
        qk_attn_weights_einsum: None = None,
        attn_weights_value_einsum: None = None,
    ) -> Float[Array, "*B T N H"]:
        """Attention of one step, as `MultiHeadDotProductAttention` asks for it.

        Args:
            query: Queries with any axes in front of the length; they are folded into the batch.
            key: Keys, with the leading axes of the queries.
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
            force_fp32_for_softmax: The softmax is float32 in any case.
            einsum_dot_general: Refused, as are the next two: no einsum runs.
            qk_attn_weights_einsum: Refused.
            attn_weights_value_einsum: Refused.

        Raises:
            UnsupportedError: Something refused was given; the message lists all of it.
            ValueError: The collection is missing or not mutable, was made for other shapes, or arrays do not fit.
        """
        del broadcast_dropout, dropout_rng, precision, force_fp32_for_softmax
        einsum = "scores are computed by the kernel; leave it out"
        _flax_call.refuse(
            bias=bias,
            mask=mask,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            module=module,
            others={
                "einsum_dot_general": (einsum_dot_general, einsum),
                "qk_attn_weights_einsum": (qk_attn_weights_einsum, einsum),
                "attn_weights_value_einsum": (attn_weights_value_einsum, einsum),
            },
        )
        policy, dense = _cached_step.check_settings(self.predictor, self.policy, self.dense, self.implementation)
        query, key, value = _flax_call.promote(dtype, query, key, value)
        folded = _flax_call.fold(query, key, value)
        structure = _cached_step.mask_structure(self.predictor, folded[0], folded[1])
        self._check_collection(one_pass=policy.one_pass)
        kept = self.variable(COLLECTION, "mask", lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), structure))
        fields: list[nn.Variable[Any]] = [
            self.variable(COLLECTION, name, lambda: jnp.zeros((), jnp.int32))
            for name in ("num_steps", "age", "num_refreshes")
        ]
        if policy.one_pass:
            batch, num_queries, num_heads, _ = folded[0].shape
            fields.append(
                self.variable(COLLECTION, "lse", _cached_step.empty_lse, policy, batch, num_heads, num_queries)
            )
        _check_structure(kept.value, structure)
        output, state = _cached_step.attend(
            *folded,
            _cached_step.MaskState(kept.value, *(field.value for field in fields)),
            settings=(self.predictor, policy, self.implementation),
            dense=dense,
            step=None,
        )
        if not self.is_initializing():
            kept.value = state.mask
            for field, new in zip(fields, state[1:], strict=False):  # without `lse` where none is kept
                field.value = new
        return output.reshape(query.shape)

    def _check_collection(self, *, one_pass: bool) -> None:
        if self.is_initializing():
            # Linen shares by reference: one object in two layers is one set of variables. Only `init` is sure to run
            # one forward; later a layer may well be called twice, for two steps.
            assert self.scope is not None  # inside a compact method
            if self.__dict__.get("_initialized_in") is self.scope.root:
                raise ValueError(
                    f"expected one attention object per layer, got one called twice by `init` ({'/'.join(self.path)}): "
                    "layers would share its mask; make a LinenSliceAttentionFn for each"
                )
            object.__setattr__(self, "_initialized_in", self.scope.root)
            return
        # Made anew at every call, the mask would never be used: each step would refresh, dense, without a word.
        if not self.has_variable(COLLECTION, "mask"):
            raise ValueError(
                f"expected the variable collection {COLLECTION!r} in `apply`, got none for {'/'.join(self.path)}: pass "
                f"the one that `init` made, {{'params': params, {COLLECTION!r}: masks}}, and carry the updated one"
            )
        if one_pass and not self.has_variable(COLLECTION, "lse"):
            raise ValueError(
                f"expected `lse` in the collection {COLLECTION!r}, which a policy with one_pass=True keeps, got none "
                f"for {'/'.join(self.path)}: make the collection with `init` and this policy"
            )
        if not self.is_mutable_collection(COLLECTION):
            raise ValueError(
                f"expected the variable collection {COLLECTION!r} to be mutable in `apply`, got an immutable one: pass "
                f"`mutable=[{COLLECTION!r}]` and carry the collection that comes back"
            )


def _check_structure(mask: SliceMask, structure: SliceMask) -> None:
    def describe(x: SliceMask) -> str:
        return f"bits of shape={tuple(x.bits.shape)}, num_queries={x.num_queries}, num_keys={x.num_keys}"

    if not isinstance(mask, SliceMask):
        raise ValueError(
            f"expected a SliceMask as `mask` in the collection {COLLECTION!r}, got {type(mask).__name__}: pass the "
            "collection as `init` or `apply` returned it"
        )
    if describe(mask) != describe(structure) or jax.tree.structure(mask) != jax.tree.structure(structure):
        raise ValueError(
            f"the collection {COLLECTION!r} holds a mask with {describe(mask)}, this call needs {describe(structure)} "
            f"(query_block={structure.query_block}): make the collection for these sizes with `init`"
        )
