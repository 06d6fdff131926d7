"""What Flax hands to an `attention_fn`: keywords refused, dtypes promoted, leading axes folded into the batch."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from fgattn_jax.errors import UnsupportedError


def refuse(
    *, bias: Any, mask: Any, dropout_rate: float, deterministic: bool, module: Any, others: dict[str, tuple[Any, str]]
) -> None:
    """Refuse what the kernels cannot do; all reasons at once.

    Args:
        bias: Additive bias; must be None.
        mask: Boolean mask; must be None.
        dropout_rate: Must be 0, or `deterministic` true.
        deterministic: Whether dropout is off.
        module: The layer, where Flax wants attention weights sown; must be None.
        others: Further arguments that must be None or False, each with what to do instead.

    Raises:
        UnsupportedError: Lists every argument that was given and what to do instead.
    """
    reasons = []
    if bias is not None:
        reasons.append(f"`bias` of shape={jnp.shape(bias)}: scores have no additive bias; leave it out")
    if mask is not None:
        reasons.append(
            f"a boolean `mask` of shape={jnp.shape(mask)}: which slices are kept is the predictor's answer; leave it "
            "out, or use `fgattn_jax.nn.SliceAttention`, which takes a SliceMask (`fgattn_jax.masks.from_dense`, "
            "`keep_lengths` for padding)"
        )
    if dropout_rate > 0.0 and not deterministic:
        reasons.append(
            f"dropout_rate={dropout_rate} with deterministic={deterministic}: attention weights are never held; pass "
            "`deterministic=True`, or drop out after the layer"
        )
    if module is not None:
        reasons.append("`sow_weights=True`: attention weights are never held; call the layer without it")
    reasons += [
        f"`{name}`: {cure}" for name, (value, cure) in others.items() if value is not None and value is not False
    ]
    if reasons:
        raise UnsupportedError("slice attention inside a Flax layer cannot take " + "; nor ".join(reasons))


def promote(dtype: DTypeLike | None, *arrays: Array) -> tuple[Array, ...]:
    """The arrays in one dtype: the one that is given, else the one that JAX promotes them to, as Flax does."""
    target = jnp.result_type(*arrays) if dtype is None else dtype
    return tuple(x.astype(target) for x in arrays)


def fold(
    query: Float[Array, "*B T N H"], key: Float[Array, "*B S K H"], value: Float[Array, "*B S K H"]
) -> tuple[Array, Array, Array]:
    """Queries, keys and values with all axes in front of the length folded into one batch axis.

    Raises:
        ValueError: A rank is below 3, or the leading axes differ.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            raise ValueError(f"expected `{name}` with axes [..., length, heads, head width], got shape={x.shape}")
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"expected `query` and `{name}` with the same leading axes, got query={query.shape} and "
                f"{name}={x.shape}: broadcast them before the layer"
            )
    # Not -1: the size of an empty leading axis cannot be inferred, and `attention` refuses it by name.
    size = 1
    for length in query.shape[:-3]:
        size *= length
    query, key, value = (x.reshape(size, *x.shape[-3:]) for x in (query, key, value))
    return query, key, value
