"""Rotary position embeddings by tables of cosines and sines."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "*B T half"], sin: Float[Array, "*B T half"]
) -> Float[Array, "B T N H"]:
    """Turn the channel pairs (0, 1), (2, 3), ... of every head by the angles of its position, in float32.

    Args:
        x: Queries or keys; `H` is even.
        cos: Cosines `[T, H / 2]` or `[B|1, T, H / 2]`, one per position and pair of channels.
        sin: Sines of the same shape.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: The tables do not fit `x` or each other.
    """
    batch, length, _, width = x.shape
    if width % 2:
        raise ValueError(f"expected an even head width for rotary tables, got head_dim={width}")
    for name, table in (("cos", cos), ("sin", sin)):
        if (
            table.ndim not in (2, 3)
            or table.shape[-2:] != (length, width // 2)
            or table.shape[:-2] not in ((), (1,), (batch,))
        ):
            raise ValueError(
                f"expected rotary table `{name}` of shape [T, H/2]={(length, width // 2)} or with a batch axis of 1 or "
                f"{batch} in front, got shape={table.shape}"
            )
    # [B|1, T, 1, H/2], against the even and the odd channels
    cos, sin = (jnp.expand_dims(table.astype(jnp.float32), -2) for table in (cos, sin))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], width // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
