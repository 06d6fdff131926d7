"""One step of attention with a cached mask, as a pure function: what the NNX and the Linen objects have in common."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from fgattn_jax import _validation
from fgattn_jax.attention import attention, attention_with_lse
from fgattn_jax.masks import SliceMask
from fgattn_jax.predictors import AbstractPredictor, RefreshPolicy, one_pass_refresh
from fgattn_jax.predictors.one_pass import check_one_pass
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
        lse: `[B, N, T]` float32, natural logarithm: of the last step that used or made a mask, by whichever attention
            that step ran. None unless the policy refreshes in one pass.
    """

    mask: SliceMask
    num_steps: Int32[Array, ""]
    age: Int32[Array, ""]
    num_refreshes: Int32[Array, ""]
    lse: Float32[Array, "B N T"] | None = None


def check_settings(
    predictor: AbstractPredictor, policy: RefreshPolicy | None, dense: DenseFlag | None, implementation: str | None
) -> tuple[RefreshPolicy, DenseFlag]:
    """The policy and the dense flag with their defaults.

    Raises:
        ValueError: An argument is of another kind, the policy names dense layers and `dense` is not given, or it
            refreshes in one pass and the predictor cannot.
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
    if policy.one_pass:
        check_one_pass(predictor)
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


def empty_lse(policy: RefreshPolicy, batch: int, num_heads: int, num_queries: int) -> Float32[Array, "B N T"] | None:
    """The LSE of a state before the first step; None where none is kept."""
    return jnp.zeros((batch, num_heads, num_queries), jnp.float32) if policy.one_pass else None


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

    def run_cached(mask, lse):
        if lse is None:
            return run_masked(mask), mask, None
        output, new_lse = attention_with_lse(query, key, value, mask, implementation=implementation)
        # A query of an empty row would count as nothing at the next refresh, and its row stay empty for good.
        return output, mask, jax.lax.stop_gradient(jnp.where(new_lse > -jnp.inf, new_lse, lse))

    def predict(lse=None):
        # Bits have no gradient: without this, differentiation walks through every score and search for nothing.
        operands = jax.lax.stop_gradient((query, key) if lse is None else (query, key, lse))
        return predictor(*operands)

    def refresh_with_lse(_, last_lse):
        output, lse = attention_with_lse(query, key, value)
        return output, predict(lse), None if last_lse is None else jax.lax.stop_gradient(lse)

    def refresh_in_one_pass(_, last_lse):
        output, lse, mask = one_pass_refresh(predictor, query, key, value, last_lse)
        return output, mask, jax.lax.stop_gradient(lse)

    # Branches that no step can take are not compiled.
    can_be_dense = dense is not False or policy.dense_first > 0
    lse = state.lse
    if dense is True:
        output, mask = run_dense(), state.mask
    elif predictor.needs_lse:
        branches = [run_cached, refresh_with_lse]
        kind = refresh.astype(jnp.int32)
        if policy.one_pass:
            branches.append(refresh_in_one_pass)
            kind = jnp.where(refresh & (age >= 0), 2, kind)  # the first one of a run knows no LSE
        if can_be_dense:
            branches.append(lambda mask, lse: (run_dense(), mask, lse))
            kind = jnp.where(is_dense, len(branches) - 1, kind)
        output, mask, lse = jax.lax.switch(kind, branches, state.mask, state.lse)
    else:
        mask = jax.lax.cond(refresh, lambda _: predict(), lambda mask: mask, state.mask)
        output = jax.lax.cond(is_dense, lambda _: run_dense(), run_masked, mask) if can_be_dense else run_masked(mask)
    num_refreshes = state.num_refreshes + refresh.astype(jnp.int32)
    return output, MaskState(mask, now + 1, jnp.where(refresh, 0, age), num_refreshes, lse)
