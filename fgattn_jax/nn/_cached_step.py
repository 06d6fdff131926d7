"""One step of attention with a cached mask, as a pure function: what the NNX and the Linen objects have in common."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from fgattn_jax import _validation
from fgattn_jax.attention import attention, attention_with_lse
from fgattn_jax.masks import SliceMask
from fgattn_jax.predictors import AbstractPredictor, RefreshPolicy
from fgattn_jax.predictors.refresh import NEVER
from fgattn_jax.types import Implementation

DenseFlag = bool | Bool[Array, ""]


class MaskState(NamedTuple):
    """What is kept from step to step. All zeros (whatever the bits) mean that no mask was made yet.

    Args:
        mask: The mask of the last refresh.
        num_steps: int32 scalar: the step that comes next, if nothing else is said.
        age: int32 scalar: age of the mask at the last step; 0 at the step that made it, negative if it was dropped.
        num_refreshes: int32 scalar: how many masks were made since the last reset.
    """

    mask: SliceMask
    num_steps: Int32[Array, ""]
    age: Int32[Array, ""]
    num_refreshes: Int32[Array, ""]


def check_settings(
    predictor: AbstractPredictor, policy: RefreshPolicy | None, dense: DenseFlag | None, implementation: str | None
) -> tuple[RefreshPolicy, DenseFlag]:
    """The policy and the dense flag with their defaults.

    Raises:
        ValueError: An argument is of another kind, or the policy names dense layers and `dense` is not given.
    """
    if not isinstance(predictor, AbstractPredictor):
        raise ValueError(
            f"expected an `AbstractPredictor` for `predictor`, got {type(predictor).__name__}: give for instance "
            "fgattn_jax.predictors.ExactPredictor(64)"
        )
    policy = RefreshPolicy() if policy is None else policy
    if not isinstance(policy, RefreshPolicy):
        raise ValueError(
            f"expected a `RefreshPolicy` for `policy`, got {type(policy).__name__}: write RefreshPolicy(every=...)"
        )
    _validation.check_implementation(implementation)
    if dense is None:
        if policy.dense_layers:
            raise ValueError(
                f"expected `dense` with a policy that names dense_layers={policy.dense_layers}, got None: a layer does "
                "not know its own number; give it `dense=policy.dense_layer_flags(num_layers)[layer]`"
            )
        return policy, False
    if isinstance(dense, bool | np.bool_):
        return policy, bool(dense)
    if np.shape(dense) != () or getattr(dense, "dtype", None) != jnp.bool_:
        what = f"shape={np.shape(dense)}, dtype={getattr(dense, 'dtype', type(dense).__name__)}"
        raise ValueError(f"expected one boolean for `dense`, got {what}: give the flag of this layer")
    return policy, dense


def mask_structure(predictor: AbstractPredictor, query, key) -> SliceMask:
    """The mask that the predictor would make, as shapes: nothing runs. Takes arrays or `jax.ShapeDtypeStruct`."""
    batch, num_queries, num_heads, _ = query.shape
    lse = jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32)
    operands = (query, key, lse) if predictor.needs_lse else (query, key)
    return jax.eval_shape(predictor, *operands)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    state: MaskState,
    *,
    settings: tuple[AbstractPredictor, RefreshPolicy, Implementation | None],
    dense: DenseFlag,
    step: Int[Array, ""] | int | None,
) -> tuple[Float[Array, "B T N H"], MaskState]:
    """Attention of one step, and the state after it.

    Args:
        query: Queries, keys and values as in `fgattn_jax.attention`.
        key: See `query`.
        value: See `query`.
        state: State after the last step.
        settings: Predictor, policy, and the name of the implementation that runs with masks.
        dense: Whether this layer is always dense.
        step: Number of the denoising step; None counts calls. A step before the last one starts a new run, with a
            new mask. At the step that made the mask it is not made again.
    """
    predictor, policy, implementation = settings
    now = state.num_steps if step is None else jnp.asarray(step, jnp.int32)
    last = state.num_steps - 1
    made = (state.num_refreshes > 0) & (state.age >= 0) & (now >= last)
    age = jnp.where(made, state.age + now - last, NEVER)
    is_dense = policy.is_dense_step(now) | dense
    refresh = policy.should_refresh(now, age) & (age != 0) & ~is_dense

    def run_dense():
        return attention(query, key, value)

    def run_masked(mask):
        return attention(query, key, value, mask, implementation=implementation)

    def predict(lse=None):
        # Bits have no gradient: without this, differentiation walks through every score and search for nothing.
        operands = jax.lax.stop_gradient((query, key) if lse is None else (query, key, lse))
        return predictor(*operands)

    def refresh_with_lse(_):
        output, lse = attention_with_lse(query, key, value)
        return output, predict(lse)

    # Branches that no step can take are not compiled.
    can_be_dense = dense is not False or policy.dense_first > 0
    if dense is True:
        output, mask = run_dense(), state.mask
    elif predictor.needs_lse:
        branches = [lambda mask: (run_masked(mask), mask), refresh_with_lse]
        kind = refresh.astype(jnp.int32)
        if can_be_dense:
            branches.append(lambda mask: (run_dense(), mask))
            kind = jnp.where(is_dense, 2, kind)
        output, mask = jax.lax.switch(kind, branches, state.mask)
    else:
        mask = jax.lax.cond(refresh, lambda _: predict(), lambda mask: mask, state.mask)
        output = jax.lax.cond(is_dense, lambda _: run_dense(), run_masked, mask) if can_be_dense else run_masked(mask)
    return output, MaskState(mask, now + 1, jnp.where(refresh, 0, age), state.num_refreshes + refresh.astype(jnp.int32))
