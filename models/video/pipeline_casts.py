"""Where diffusers' pipelines round to bfloat16 outside the model: conditions, guidance scales, timesteps."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from fgattn_jax.models.video.schedulers import FlowEuler, Scheduler, round_to


def pipeline_condition(condition: Any) -> Any:
    """A condition as diffusers' pipeline hands it to a bfloat16 model.

    Floating point arrays are rounded to bfloat16. Of a field `guidance` (HunyuanVideo) what is rounded is 1000 times
    the scale, which the model makes of it: 6.0 becomes 6.016.

    Args:
        condition: a named tuple of the model's own, stacked over branches or not.
    """
    rounded = jax.tree.map(_rounded, condition)
    guidance = getattr(condition, "guidance", None)
    return rounded if guidance is None else rounded._replace(guidance=pipeline_guidance(guidance))


def pipeline_guidance(scale: Array) -> Float32[Array, "..."]:
    """The float32 scale whose product with 1000 is what diffusers makes of `scale` in bfloat16."""
    wanted = round_to(1000 * round_to(jnp.asarray(scale, jnp.float32), jnp.bfloat16), jnp.bfloat16)
    near = wanted / 1000
    # One of the neighbours, or the product would be off by a rounding error of float32.
    candidates = jnp.stack([near, jnp.nextafter(near, jnp.float32(0)), jnp.nextafter(near, jnp.float32(jnp.inf))])
    best = jnp.argmin(jnp.abs(candidates * 1000 - wanted), axis=0)
    return jnp.take_along_axis(candidates, best[None], axis=0)[0]


def pipeline_timestep(
    timestep: Float32[Array, ""], number: Int[Array, ""], condition: Any, scheduler: Scheduler
) -> Float32[Array, ""]:
    """The timestep of step `number` as diffusers' pipeline hands it to a bfloat16 model.

    The HunyuanVideo pipeline, known by the field `guidance` of its condition, casts it to the dtype of the latents:
    float32 at the first step, then bfloat16 if the scheduler rounds latents. Wan's pipeline leaves it as it is.
    """
    if not hasattr(condition, "guidance") or not isinstance(scheduler, FlowEuler):
        return timestep
    return jnp.where(number > 0, round_to(timestep, jnp.bfloat16), timestep)


def _rounded(leaf: Array) -> Array:
    return leaf.astype(jnp.bfloat16) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf
