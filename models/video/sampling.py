"""Denoising with a video model: one scan over steps, branches of guidance and masks in its carry."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32

from fgattn_jax.models.video.attention import dense, plain
from fgattn_jax.models.video.pipeline_casts import pipeline_condition, pipeline_timestep
from fgattn_jax.models.video.schedulers import FlowEuler, Scheduler, UniPC, round_to
from fgattn_jax.models.video.sharding import VideoSharding
from fgattn_jax.models.video.slice_masks import Call, SliceMasks, VideoMaskState, probe
from fgattn_jax.predictors.refresh import StepKind

Progress = Callable[[int, StepKind, float, float], Any]


class VideoSample(NamedTuple):
    """What `sample` gives.

    Attributes:
        latents: float32 `[B, C, F, Y, X]`, for the decoder of the model.
        density: share of slices that attention computed, per step and layer, mean over batch, heads and branches of
            guidance; 1 where it ran dense, as it does at the refresh steps of an exact predictor. In a joint attention
            a slice is a query block of video or text and one key, padded text included: attention to all valid keys
            alone may be below 1 in a mask, though not at a dense step.
        kinds: what every step was.
        masks: after the last step, None without `SliceMasks`. They may be large: keep only `latents` to free them.
    """

    latents: Float32[Array, "B C F Y X"]
    density: Float32[Array, "steps L"]
    kinds: tuple[StepKind, ...]
    masks: VideoMaskState | None


def sample(
    model: Any,
    conditions: Sequence[Any],
    noise: Any,
    *,
    steps: int = 50,
    scheduler: Scheduler,
    guidance: float = 1.0,
    attention: Literal["dense"] | SliceMasks | Callable[..., Array] | None = None,
    match_diffusers_bf16: bool = False,
    sharding: VideoSharding | None = None,
    progress: Progress | None = None,
) -> VideoSample:
    """Denoise from noise to latents: dense, with slice masks, or with any attention.

    All steps are one compiled program, which holds the model once: calls of the same shapes, model structure and
    settings trace once, whatever weights, noise, conditions, strength of guidance and shift of the scheduler. The dense
    reference of a sparse run is the same call with `attention="dense"`.

    Args:
        model: a `VideoModel`.
        conditions: one condition of the model, or two for classifier-free guidance: the conditional one first. Their
            arrays have the same shapes.
        noise: unit-normal start `[B, C, F, Y, X]`, or a pair of a jax.random key and the latent size `(F, Y, X)`. Noise
            of a jax.random key is not that of a torch generator with the same seed.
        steps: steps of the scheduler.
        scheduler: `UniPC` or `FlowEuler`.
        guidance: strength of classifier-free guidance, `unconditional + guidance * (conditional - unconditional)`; 1
            with a single condition. A guidance scale that the model takes as an input is in its condition.
        attention: None or "dense"; `SliceMasks`; or a function `(query, key, value) -> output` with arrays
            `[B, T, N, H]`, such as `jax.nn.dot_product_attention` (see `plain`). It is part of the compiled program:
            give the same function again to avoid a second compilation.
        match_diffusers_bf16: round to bfloat16 wherever diffusers' pipeline does, for a bfloat16 model; else all that
            is outside the model is float32.
        sharding: makes one clip on several devices; None runs where the weights are. Weights, masks and latents are
            placed as it says; `load(..., sharding=sharding.parameter)` places weights from the start.
        progress: called after every step as `progress(step, kind, density, seconds)` with the mean density over layers.
            The steps then run one at a time, so that seconds are those of the step; the first include compilation where
            it is the first call. Ctrl-C or an exception of `progress` ends the run between two steps.

    Returns:
        The latents, and what was computed to get them.

    Raises:
        ValueError: an argument is of another kind or shape, or guidance and the number of conditions do not fit.

    Note:
        With `match_diffusers_bf16`, as in diffusers: text and pooled text are rounded, guidance is combined in
        bfloat16, and a scheduler multiplies the velocity in bfloat16; `FlowEuler` rounds its latents. Of a model whose
        condition has a field `guidance` (HunyuanVideo) that scale times 1000 is rounded (6.0 becomes 6.016), and so are
        timesteps where latents are. It matters: for HunyuanVideo more than the dtype of the model itself.

    References:
        FG-Attn (arXiv 2509.16518), masks over denoising steps; classifier-free guidance (arXiv 2207.12598).
    """
    stacked = _stack(conditions)
    num_branches, batch = jax.tree.leaves(stacked)[0].shape[:2]
    latents = _noise(noise, batch, model.config)
    _check_guidance(guidance, num_branches)
    if not isinstance(scheduler, UniPC | FlowEuler):
        raise ValueError(
            f"expected `UniPC` or `FlowEuler` for `scheduler`, got {type(scheduler).__name__}: see "
            "fgattn_jax.models.video.schedulers"
        )
    table = scheduler.table(steps)
    steps = len(table.timestep)
    if match_diffusers_bf16 and jnp.dtype(model.dtype) != jnp.bfloat16:
        raise ValueError(
            f"expected a bfloat16 model with `match_diffusers_bf16`, got dtype={jnp.dtype(model.dtype).name}: leave it "
            "out, float32 needs no rounding"
        )
    if match_diffusers_bf16:
        stacked = pipeline_condition(stacked)

    chosen = _check_attention(attention)
    if sharding is not None:
        sharding.check(model.config.num_heads, chosen)
    num_layers = model.config.num_attentions
    schedule: tuple[StepKind, ...] = ("dense",) * steps
    kinds: tuple[StepKind, ...] = ("dense",)
    if isinstance(chosen, SliceMasks):
        kinds = chosen.kinds(steps, num_layers, num_branches)
        schedule = chosen.refresh.schedule(steps) if kinds != ("dense",) else schedule
    graph, state = nnx.split(model)
    # Its shift is in the table: programs of all shifts are one.
    program = _Program(graph, type(scheduler)(), chosen, kinds, num_layers, match_diffusers_bf16, sharding)
    masks = None
    if isinstance(chosen, SliceMasks):
        first = jax.tree.map(lambda leaf: leaf[0], stacked)
        query, key, text = _calls.eval_shape(program, state, latents, first)
        call = Call(query, key, None if text is None else text.shape[0])
        masks = chosen.start(call, kinds=kinds, num_layers=num_layers, num_branches=num_branches)

    numbers = np.asarray([kinds.index(kind) for kind in schedule], np.int32)
    rows = _Rows(np.arange(steps, dtype=np.int32), numbers, table)
    carry = (scheduler.start(latents), masks)
    if sharding is None:
        carry = _beside(state, carry)
    else:
        state, stacked = sharding.place_parameters(state), sharding.replicate(stacked)
        carry = (sharding.replicate(carry[0]), sharding.place_state(masks))
    run = functools.partial(_run, program, state, stacked, jnp.float32(guidance))
    if progress is None:
        (scheduled, masks), density = run(carry, rows)
    else:
        densities = []
        for step, kind in enumerate(schedule):
            started = time.perf_counter()
            carry, density = run(carry, jax.tree.map(lambda column, step=step: column[step : step + 1], rows))
            jax.block_until_ready((carry, density))
            densities.append(density)
            progress(step, kind, float(density.mean()), time.perf_counter() - started)
        (scheduled, masks), density = carry, jnp.concatenate(densities)
    return VideoSample(scheduled.latents, density, schedule, masks)


class _Rows(NamedTuple):
    """What a step is told: its number, its kind as an index into the program's, and its row of the scheduler."""

    number: Any
    kind: Any
    scheduler: Any


@dataclasses.dataclass(frozen=True)
class _Program:
    """What is compiled for; equal programs share what was traced."""

    graph: Any
    scheduler: Scheduler
    attention: SliceMasks | Callable[..., Array] | None
    kinds: tuple[StepKind, ...]
    num_layers: int
    rounded: bool
    sharding: VideoSharding | None

    def attend(self, kind: Array, branch: Array) -> Any:
        """The attention of one forward."""
        if isinstance(self.attention, SliceMasks):
            masked = functools.partial(self.attention.attention, kinds=self.kinds, num_layers=self.num_layers)
            if self.sharding is None:
                return masked(kind, branch)
            # What is traced outside of a `shard_map` goes in as an argument.
            return self.sharding.attention(lambda numbers: masked(*numbers), (jnp.asarray(kind), branch))
        attend = dense if self.attention is None else plain(self.attention)
        return attend if self.sharding is None else self.sharding.attention(lambda _: attend, ())

    def step(self, state, conditions, guidance, carry, row: _Rows):
        """One denoising step: the carry after it, and the density of every layer."""
        scheduled, masks = carry
        latents = scheduled.latents
        timestep = row.scheduler.timestep
        if self.rounded:
            timestep = pipeline_timestep(timestep, row.number, conditions, self.scheduler)
        timestep = jnp.full((latents.shape[0],), timestep)

        # A loop over a traced number, so that masks of all branches stay in one buffer and the model is traced once.
        def branch(masks, number):
            condition = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), conditions
            )
            model = nnx.merge(self.graph, state)
            model.parallel = self.sharding
            output = model(latents, timestep, condition, attention=self.attend(row.kind, number), state=masks)
            return output.state, output.velocity

        num_branches = jax.tree.leaves(conditions)[0].shape[0]
        masks, velocities = jax.lax.scan(branch, masks, jnp.arange(num_branches))
        velocity = self.guide(velocities, guidance)
        ones = jnp.ones((self.num_layers,), jnp.float32)
        density = ones if masks is None else masks.computed.mean(axis=0)
        return (self.scheduler.step(scheduled, row.scheduler, velocity), masks), density

    def guide(self, velocities: Float[Array, "branches B C F Y X"], guidance: Array) -> Float[Array, "B C F Y X"]:
        """The velocity of all branches together; in the dtype of the model where diffusers' rounding is matched."""
        dtype = velocities.dtype if self.rounded else jnp.dtype(jnp.float32)
        parts = velocities.astype(jnp.float32)
        velocity = parts[0]
        if parts.shape[0] == 2:
            difference = round_to(parts[0] - parts[1], dtype)
            velocity = round_to(parts[1] + round_to(guidance * difference, dtype), dtype)
        return velocity.astype(dtype)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _run(program: _Program, state, conditions, guidance, carry, rows: _Rows):
    carry, density = jax.lax.scan(functools.partial(program.step, state, conditions, guidance), carry, rows)
    if program.sharding is not None:
        # As it came in: else a run step by step would be compiled a second time for what the first step gives.
        carry = (program.sharding.keep_whole(carry[0]), program.sharding.keep_divided(carry[1]))
    return carry, density


@functools.partial(jax.jit, static_argnums=0)
def _calls(program: _Program, state, latents, condition):
    """Query, key and as many zeros as there are text tokens; for `eval_shape`, which keeps what it traced."""
    calls: list[Call] = []

    def forward(latents, condition):
        timestep = jnp.zeros((latents.shape[0],), jnp.float32)
        return nnx.merge(program.graph, state)(latents, timestep, condition, attention=probe(calls)).velocity

    jax.eval_shape(forward, latents, condition)
    same = set(map(str, calls))
    if len(same) != 1:
        raise ValueError(f"expected one shape of queries in all layers, got {sorted(same)}: their masks are one array")
    query, key, num_text = calls[0]
    arrays = [jnp.zeros(shape.shape, shape.dtype) for shape in (query, key)]
    return *arrays, None if num_text is None else jnp.zeros((num_text,))


def _beside(state: Any, carry: Any) -> Any:
    """The carry committed to the devices of the weights where those, or some of the carry, have a place of their own.

    Else a run step by step would be compiled a second time for the carry that the first step gives.
    """
    leaves = [*jax.tree.leaves(state), *jax.tree.leaves(carry)]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) or not any(leaf.committed for leaf in leaves):
        return carry
    sharding = leaves[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding.with_memory_kind(leaf.sharding.memory_kind)), carry)


def _check_attention(attention: Any) -> Any:
    if attention is None or attention is dense or (isinstance(attention, str) and attention == "dense"):
        return None
    if not isinstance(attention, SliceMasks) and not callable(attention):
        raise ValueError(
            "expected None, 'dense', `SliceMasks` or a function of (query, key, value) for `attention`, got "
            f"{attention!r}"
        )
    return attention


def _check_guidance(guidance: Any, num_branches: int) -> None:
    if isinstance(guidance, jax.core.Tracer):
        return
    if np.ndim(guidance) != 0 or not math.isfinite(guidance):
        raise ValueError(f"expected a finite number for `guidance`, got guidance={guidance!r}: 1 is off")
    if (num_branches == 2) != (guidance != 1):
        advice = "give the unconditional condition too" if num_branches == 1 else "give the conditional one alone"
        raise ValueError(
            f"expected two conditions with guidance and one without, got {num_branches} with guidance={guidance}: "
            f"{advice}"
        )


def _stack(conditions: Any) -> Any:
    """The conditions with a leading axis over branches."""
    if not isinstance(conditions, list | tuple) or hasattr(conditions, "_fields") or len(conditions) not in (1, 2):
        what = type(conditions).__name__
        if isinstance(conditions, list | tuple) and not hasattr(conditions, "_fields"):
            what = f"{len(conditions)} conditions"
        raise ValueError(f"expected a list of one or two conditions for `conditions`, got {what}")
    structures = [jax.tree.structure(condition) for condition in conditions]
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(condition)] for condition in conditions]
    if not shapes[0] or not all(shapes[0]):
        raise ValueError(f"expected arrays with a batch axis in `conditions`, got shapes={shapes[0]}")
    if structures[0] != structures[-1] or shapes[0] != shapes[-1]:
        raise ValueError(
            f"expected two conditions of one structure and equal shapes, got shapes={shapes[0]} and {shapes[-1]}, "
            f"{structures[0]} and {structures[-1]}: pad text to one length"
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *conditions)


def _noise(noise: Any, batch: int, config: Any) -> Float32[Array, "B C F Y X"]:
    """The start, drawn if it is a key and a size."""
    expected = batch, config.in_channels
    if isinstance(noise, tuple):
        key, size = noise if len(noise) == 2 else (None, ())
        if (
            not isinstance(key, jax.Array)
            or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
            or np.shape(size) != (3,)
        ):
            raise ValueError(
                f"expected a jax.random key and the latent size (F, Y, X) for `noise`, got {type(key).__name__} and "
                f"{size!r}"
            )
        latents = jax.random.normal(key, (*expected, *size), jnp.float32)
    elif jnp.ndim(noise) != 5 or jnp.shape(noise)[:2] != expected:
        raise ValueError(
            f"expected `noise` of shape [B={batch}, C={expected[1]}, F, Y, X] or a pair (jax.random key, (F, Y, X)), "
            f"got shape={jnp.shape(noise)}"
        )
    else:
        latents = jnp.asarray(noise, jnp.float32)
    config.grid(*latents.shape[2:])
    return latents
