"""Flow-matching training as pure functions: config, state, one jitted chunk of steps, validation, checkpoints."""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from fgattn_jax.models.dit import data, layers, weights
from fgattn_jax.models.dit.config import DiTConfig
from fgattn_jax.models.dit.model import DiT

_VALIDATION_STREAM = 1 << 20  # far from any step, so that validation draws are its own


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; wrong values raise when the config is made.

    Attributes:
        batch: clips per step; steps with long clips take half as many.
        learning_rate: peak, reached after `warmup_steps` and falling along a cosine to `final_share` of it.
        warmup_steps: steps of linear rise.
        final_share: last learning rate over the peak.
        weight_decay: AdamW's, on matrices only (not on norms, tables and embeddings).
        clip_norm: largest gradient norm.
        adam_b2: decay of the second moment.
        ema_decay: decay of the averaged parameters; warms up over the first steps.
        label_dropout: share of clips trained without their label, for guidance.
        scene_share: share of a batch that is generated.
        time_mean: mean of the logit of the diffusion time; above 0 favours noise.
        long_every: every so many chunks trains on clips twice as long; 0 never does.
        chunk: steps per jitted call.
        seed: of parameters and data.
    """

    batch: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    final_share: float = 0.005
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    adam_b2: float = 0.95
    ema_decay: float = 0.9995
    label_dropout: float = 0.1
    scene_share: float = 0.1875
    time_mean: float = 0.3
    long_every: int = 4
    chunk: int = 20
    seed: int = 0

    def __post_init__(self):
        if self.batch < 2 or self.batch % 2:
            raise ValueError(f"`batch` must be even (long clips take half), got batch={self.batch}.")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {name}={getattr(self, name)}.")
        for name in ("ema_decay", "adam_b2", "label_dropout", "scene_share", "final_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {name}={getattr(self, name)}.")
        for name, least in (("chunk", 1), ("warmup_steps", 1), ("long_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {name}={getattr(self, name)}.")

    def is_long(self, chunk_number: int) -> bool:
        """Whether a chunk of steps trains on clips of twice the length."""
        return self.long_every > 0 and chunk_number % self.long_every == self.long_every - 1


class TrainState(NamedTuple):
    """All that a run needs to go on: parameters, optimizer moments, averaged parameters, steps done."""

    params: Any
    moments: Any
    ema: Any
    step: Int[Array, ""]


def init_state(config: TrainConfig, dit: DiTConfig, *, dtype: Any, remat: bool = False) -> tuple[Any, TrainState]:
    """Make a fresh model for training.

    Returns:
        The graph definition (static) and the state.
    """
    model = DiT(dit, dtype=dtype, attention=layers.training_attention, remat=remat, rngs=nnx.Rngs(params=config.seed))
    graph, params, _ = nnx.split(model, nnx.Param, ...)
    return graph, TrainState(
        params, _optimizer(config).init(params), jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32)
    )


def learning_rate(config: TrainConfig, step: Int[Array, ""], total_steps: Int[Array, ""]) -> Float[Array, ""]:
    """Linear warm-up, then a cosine that ends at `final_share` of the peak after `total_steps`.

    `total_steps` may be traced: a run that learns its length from a measurement does not compile again.
    """
    warm = (step + 1) / config.warmup_steps
    progress = jnp.clip((step - config.warmup_steps) / jnp.maximum(total_steps - config.warmup_steps, 1), 0.0, 1.0)
    cosine = config.final_share + (1 - config.final_share) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return config.learning_rate * jnp.minimum(warm, cosine)


def flow_loss(
    model: DiT, video: Float[Array, "B F Y X 3"], t: Float[Array, " B"], noise: Float[Array, "B F Y X 3"], label: Array
) -> Float[Array, ""]:
    """Mean square error of the velocity at `(1 - t) * video + t * noise` (Lipman et al. 2023; Liu et al. 2023)."""
    mix = t[:, None, None, None, None]
    velocity = model((1 - mix) * video + mix * noise, t, label).velocity
    return jnp.mean(jnp.square(velocity - (noise - video)))


@functools.partial(jax.jit, static_argnames=("graph", "config", "dit", "long", "num_steps"), donate_argnames=("state",))
def train_chunk(
    state: TrainState,
    clips: data.ClipSet,
    total_steps: Int[Array, ""],
    *,
    graph: Any,
    config: TrainConfig,
    dit: DiTConfig,
    long: bool,
    num_steps: int,
) -> tuple[TrainState, Float[Array, " num_steps"]]:
    """Run `num_steps` training steps on the device, data made from the step number.

    Args:
        state: donated.
        clips: real clips.
        total_steps: length of the whole run, for the learning rate.
        graph: from `init_state`.
        config: how to train.
        dit: sizes.
        long: twice the frames, half the batch.
        num_steps: steps in this call.

    Returns:
        The new state and the loss of each step.
    """
    batch, frames = (config.batch // 2, 2 * dit.num_frames) if long else (config.batch, dit.num_frames)
    num_scenes = round(batch * config.scene_share)
    optimizer = _optimizer(config)

    def step(state: TrainState, _) -> tuple[TrainState, Array]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        key_data, key_time, key_noise, key_drop = jax.random.split(key, 4)
        clip = data.training_batch(
            key_data, clips, batch=batch, num_frames=frames, size=dit.height, num_scenes=num_scenes
        )
        t = jax.nn.sigmoid(config.time_mean + jax.random.normal(key_time, (batch,)))
        noise = jax.random.normal(key_noise, clip.video.shape)
        drop = jax.random.bernoulli(key_drop, config.label_dropout, (batch,))
        label = jnp.where(drop, dit.null_label, clip.label)

        def loss_of(params):
            return flow_loss(nnx.merge(graph, params), clip.video, t, noise, label)

        loss, gradient = jax.value_and_grad(loss_of)(state.params)
        updates, moments = optimizer.update(gradient, state.moments, state.params)
        rate = learning_rate(config, state.step, total_steps)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        # The average forgets the start: its decay grows from 0.1 with the steps done.
        decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, params)
        return TrainState(params, moments, ema, state.step + 1), loss

    return jax.lax.scan(step, state, None, length=num_steps)


@functools.partial(jax.jit, static_argnames=("graph", "config", "dit", "num_batches"))
def validation_loss(
    params: Any, clips: data.ClipSet, *, graph: Any, config: TrainConfig, dit: DiTConfig, num_batches: int = 8
) -> Float[Array, ""]:
    """Loss on frames that training never sees, on the same crops, times and noise every time."""
    model_params = params

    def one(_, number):
        key = jax.random.fold_in(jax.random.key(config.seed), _VALIDATION_STREAM + number)
        key_data, key_noise = jax.random.split(key)
        clip = data.real_batch(
            key_data, clips, batch=config.batch, num_frames=dit.num_frames, size=dit.height, split="validation"
        )
        t = (jnp.arange(config.batch) + 0.5) / config.batch
        noise = jax.random.normal(key_noise, clip.video.shape)
        return None, flow_loss(nnx.merge(graph, model_params), clip.video, t, noise, clip.label)

    return jnp.mean(jax.lax.scan(one, None, jnp.arange(num_batches))[1])


@functools.partial(jax.jit, static_argnames=("graph", "dit", "steps", "num_frames"))
def sample_grid(
    params: Any, *, graph: Any, dit: DiTConfig, steps: int = 30, num_frames: int | None = None, seed: int = 7
) -> Float[Array, "B F Y X 3"]:
    """One dense Euler sample per class, for looking at while training."""
    model_params = params
    labels = jnp.arange(dit.num_classes)
    shape = (dit.num_classes, num_frames or dit.num_frames, dit.height, dit.width_pixels, 3)

    def step(x, number):
        t = 1 - number / steps
        velocity = nnx.merge(graph, model_params)(x, jnp.full(shape[:1], t), labels).velocity
        return x - velocity / steps, None

    return jax.lax.scan(step, jax.random.normal(jax.random.key(seed), shape), jnp.arange(steps))[0]


def save_checkpoint(path: str | pathlib.Path, state: TrainState, facts: dict[str, Any]) -> None:
    """Write everything a run needs to go on, exactly, to one safetensors file.

    The file is written beside its place and then moved there, so that a run killed while saving leaves the old one.
    """
    from safetensors.numpy import save_file

    path = pathlib.Path(path)
    arrays = {name: np.asarray(leaf) for name, leaf in weights.named_leaves(state).items()}
    partial = path.with_suffix(".partial")
    save_file(arrays, str(partial), metadata={"facts": json.dumps(facts, sort_keys=True)})
    partial.replace(path)


def load_checkpoint(path: str | pathlib.Path, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Raises:
        ValueError: the file is missing, corrupt or of another model.
    """
    from safetensors import SafetensorError, safe_open

    source = f"Checkpoint {str(path)!r}"
    try:
        with safe_open(str(path), framework="numpy") as stored:
            facts = json.loads((stored.metadata() or {}).get("facts", "{}"))
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{source} cannot be read: {error}.") from error
    return weights.fill_leaves(template, arrays, source), facts


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate, which depends on a traced number of steps."""

    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: weights.leaf_name(path).endswith("kernel"), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b2=config.adam_b2),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
    )
