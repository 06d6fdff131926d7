"""Sampling as one compiled program: Euler or Heun steps in a scan, cached masks in its carry."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fgattn_jax import masks
from fgattn_jax.masks import SliceMask
from fgattn_jax.models.dit.config import CHANNELS, DiTConfig
from fgattn_jax.models.dit.model import DiT
from fgattn_jax.predictors import AbstractPredictor, MaskCache, RefreshPolicy
from fgattn_jax.predictors.refresh import StepKind

Solver = Literal["euler", "heun"]
Progress = Callable[[int, float], Any]


class Sample(NamedTuple):
    """What `sample` gives.

    Attributes:
        video: `[B, F, Y, X, 3]` float32, about [-1, 1] (not clipped).
        density: share of slices that attention computed, per step and layer; 1 at dense steps and at refresh steps,
            which run dense. A Heun step is the mean of its two evaluations.
        refreshed: whether a step made masks.
        cache: the masks after the last step, or None without a predictor.
    """

    video: Float[Array, "B F Y X 3"]
    density: Float[Array, "steps L"]
    refreshed: Bool[Array, " steps"]
    cache: MaskCache | None


def sample(
    model: DiT,
    noise: Array,
    label: Int[Array, " B"],
    *,
    steps: int = 30,
    solver: Solver = "euler",
    guidance: float = 1.0,
    predictor: AbstractPredictor | None = None,
    refresh: RefreshPolicy | None = None,
    progress: Progress | None = None,
) -> Sample:
    """Denoise from t = 1 to t = 0 in equal steps, dense or with cached slice masks.

    All steps are one compiled program: calls with the same shapes, model structure and settings trace once, whatever
    noise, label, weights and strength of guidance. The dense reference of a sparse run is the same call without
    `predictor`.

    Args:
        model: the model.
        noise: unit-normal start `[B, F, Y, X, 3]`, or a jax.random key for one of the model's default clip size.
        label: class per clip; `model.config.null_label` for none.
        steps: steps of the solver; Heun evaluates the model twice in each.
        solver: "euler" (first order) or "heun" (second order).
        guidance: strength of classifier-free guidance; at 1 it is off. Otherwise every evaluation runs the model with
            and without label, and each of the two branches has its own masks.
        predictor: makes the masks at refresh steps; None is dense throughout.
        refresh: when masks are made; None refreshes once, at the first step. Its dense layers get full masks.
        progress: called on the host after every step as `progress(step, density)`, in order. It is part of the
            compiled program: pass the same function again to avoid a second compilation.

    Returns:
        The clip, and what was computed to get it.

    Raises:
        ValueError: a shape, dtype or setting is wrong, or `refresh` comes without `predictor`.

    Note:
        The model must have the attention seam of `DiT`'s default. At refresh steps attention is dense, with the
        predictor beside it; the second evaluation of a Heun step already uses the new masks.

    References:
        FG-Attn (arXiv 2509.16518), cached masks over denoising steps.
    """
    config = model.config
    noise, label = _check_inputs(config, noise, label)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be an integer of at least 1, got steps={steps!r}.")
    if solver not in ("euler", "heun"):
        raise ValueError(f"`solver` must be 'euler' or 'heun', got solver={solver!r}.")
    if not np.isfinite(guidance):
        raise ValueError(f"`guidance` must be a finite number (1 is off), got guidance={guidance}.")
    if predictor is not None and not isinstance(predictor, AbstractPredictor):
        raise ValueError(f"`predictor` must be a predictor of fgattn_jax.predictors, got {type(predictor).__name__}.")
    if predictor is None and refresh is not None:
        raise ValueError("`refresh` says when masks are made, but no `predictor` makes them; give one or drop it.")
    if refresh is not None and not isinstance(refresh, RefreshPolicy):
        raise ValueError(f"`refresh` must be a `RefreshPolicy`, got {type(refresh).__name__}.")
    if refresh is not None and refresh.one_pass:
        raise ValueError(
            "`refresh` must refresh in two passes, got one_pass=True: the sampler keeps no LSE; leave it out."
        )
    policy = (refresh or RefreshPolicy()) if predictor is not None else None
    labels = [label] if guidance == 1 else [label, jnp.full_like(label, config.null_label)]
    graph, state = nnx.split(model)
    return _run(
        state,
        noise,
        jnp.stack(labels),
        jnp.asarray(guidance, jnp.float32),
        graph=graph,
        config=config,
        steps=steps,
        solver=solver,
        predictor=predictor,
        policy=policy,
        progress=progress,
    )


def euler_step(velocity: Callable, x: Array, t: Array, size: Array, carry: Any) -> tuple[Array, Any]:
    """One first-order step from `t` to `t - size`: `x - size * v(x, t)`.

    Args:
        velocity: `velocity(x, t, carry, first) -> (v, carry)`; `first` is true at the first evaluation of a step.
        x: where the step starts.
        t: time there.
        size: length of the step.
        carry: whatever `velocity` hands on.
    """
    v, carry = velocity(x, t, carry, True)
    return x - size * v, carry


def heun_step(velocity: Callable, x: Array, t: Array, size: Array, carry: Any) -> tuple[Array, Any]:
    """One second-order step: the mean of the velocities at both ends of an Euler step. Arguments as `euler_step`."""
    first, carry = velocity(x, t, carry, True)
    second, carry = velocity(x - size * first, t - size, carry, False)
    return x - size * 0.5 * (first + second), carry


_SOLVERS = {"euler": euler_step, "heun": heun_step}


@functools.partial(jax.jit, static_argnames=("graph", "config", "steps", "solver", "predictor", "policy", "progress"))
def _run(state, noise, labels, guidance, *, graph, config, steps, solver, predictor, policy, progress) -> Sample:
    num_branches, batch = labels.shape
    kinds: tuple[StepKind, ...] = ("dense",) * steps if policy is None else policy.schedule(steps)
    ones = jnp.ones((config.num_layers,), jnp.float32)
    dense_layers = (policy or RefreshPolicy()).dense_layer_flags(config.num_layers)

    def forward(x, t, label, **attention):
        return nnx.merge(graph, state)(x, jnp.full((batch,), t), label, **attention)

    def dense(x, t, cache):
        return jax.lax.map(lambda label: forward(x, t, label).velocity, labels), cache, ones

    def refresh(x, t, cache):
        velocity, new = jax.lax.map(lambda label: tuple(forward(x, t, label, predictor=predictor)), labels)
        for branch in range(num_branches):
            mask = jax.tree.map(lambda leaf, branch=branch: leaf[branch], new)
            cache = cache.update(branch, _with_dense_layers(mask, dense_layers))
        return velocity, cache, ones

    def cached(x, t, cache):
        def one(branch):
            return forward(x, t, labels[branch], masks=cache.branch(branch)).velocity

        density = jnp.mean(cache.mask.row_density(), axis=(1, 2, 3, 4))
        return jax.lax.map(one, jnp.arange(num_branches)), cache, density

    # The schedule is known here: kinds of step that do not occur are not compiled.
    again: dict[StepKind, StepKind] = {"dense": "dense", "refresh": "cached", "cached": "cached"}
    used = set(kinds) | ({again[kind] for kind in kinds} if solver == "heun" else set())
    functions = {"dense": dense, "refresh": refresh, "cached": cached}
    names = [name for name in functions if name in used]
    first_index = jnp.asarray([names.index(kind) for kind in kinds], jnp.int32)
    next_index = jnp.asarray([names.index(again[kind]) if again[kind] in names else 0 for kind in kinds], jnp.int32)
    branches = [functions[name] for name in names]

    def step(carry, inputs):
        x, cache = carry
        number, first, following = inputs

        def velocity(x, t, carry, is_first):
            cache, densities = carry
            v, cache, density = jax.lax.switch(first if is_first else following, branches, x, t, cache)
            if num_branches == 2:
                v = v[1] + guidance * (v[0] - v[1])
            else:
                v = v[0]
            return v, (cache, [*densities, density])

        t = 1.0 - number.astype(jnp.float32) / steps
        x, (cache, densities) = _SOLVERS[solver](velocity, x, t, 1.0 / steps, (cache, []))
        density = jnp.mean(jnp.stack(densities), axis=0)
        if progress is not None:
            jax.debug.callback(functools.partial(_tell, progress), number, jnp.mean(density), ordered=True)
        return (x, None if cache is None else cache.advance()), density

    cache = None if policy is None else _empty_cache(config, noise, predictor, num_branches)
    (video, cache), density = jax.lax.scan(step, (noise, cache), (jnp.arange(steps), first_index, next_index))
    return Sample(video, density, jnp.asarray([kind == "refresh" for kind in kinds]), cache)


def _tell(progress: Progress, number: Array, density: Array) -> None:
    progress(int(number), float(density))


def _empty_cache(config: DiTConfig, noise: Array, predictor: Any, num_branches: int) -> MaskCache:
    tokens = int(np.prod(config.grid(*noise.shape[1:4])))
    return MaskCache.create(
        num_layers=config.num_layers,
        batch=noise.shape[0],
        num_heads=config.num_heads,
        num_queries=tokens,
        num_keys=tokens,
        query_block=predictor.query_block,
        query_order=predictor.query_order,
        num_branches=num_branches,
    )


def _with_dense_layers(mask: SliceMask, flags: Bool[np.ndarray, " L"]) -> SliceMask:
    if not flags.any():
        return mask
    everything = masks.full(query_block=mask.query_block, num_queries=mask.num_queries, num_keys=mask.num_keys)
    bits = jnp.where(flags[:, None, None, None, None], everything.bits, mask.bits)
    return SliceMask(
        bits,
        mask.query_order,
        query_block=mask.query_block,
        num_keys=mask.num_keys,
        num_queries=mask.num_queries,
    )


def _check_inputs(config: DiTConfig, noise: Array, label: Array) -> tuple[Array, Array]:
    label = jnp.asarray(label)
    if label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(f"`label` must be integers [B], got shape={label.shape}, dtype={label.dtype}.")
    if not isinstance(label, jax.core.Tracer):
        low, high = int(label.min()), int(label.max())
        if low < 0 or high > config.null_label:
            raise ValueError(f"`label` must be in 0..{config.null_label} (the last is 'none'), got {low}..{high}.")
    if jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        shape = (label.shape[0], config.num_frames, config.height, config.width_pixels, CHANNELS)
        noise = jax.random.normal(noise, shape)
    if noise.ndim != 5 or noise.shape[-1] != CHANNELS or noise.shape[0] != label.shape[0]:
        raise ValueError(
            f"`noise` must be [B={label.shape[0]}, F, Y, X, {CHANNELS}] or a jax.random key, got shape={noise.shape}."
        )
    config.grid(*noise.shape[1:4])
    return noise.astype(jnp.float32), label.astype(jnp.int32)
