"""The denoising stage of `fgattn generate`: model, noise and attention of a job, and its one or two runs."""

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

import fgattn_jax
from fgattn_jax import masks
from fgattn_jax.cli import _generate_families, _generate_progress
from fgattn_jax.cli._generate_options import GenerateJob
from fgattn_jax.implementations import dense
from fgattn_jax.models.video.sampling import sample
from fgattn_jax.models.video.sharding import VideoSharding, make_mesh
from fgattn_jax.models.video.slice_masks import SliceMasks
from fgattn_jax.models.video.stage_files import PromptEmbeddings


@dataclasses.dataclass(frozen=True)
class Denoised:
    """What one run gave.

    Attributes:
        title: "cached", "mean-query" or "dense".
        latents: On the host, as the sampler gives them.
        kinds: What every step was.
        density: Share of the slices that attention computed, per step and layer.
        step_seconds: Wall-clock time of every step.
        first_step_compiled: Whether the time of the first step includes compilation.
        seconds: Of the whole call, compiling included.
        peak_bytes: Most device memory that was ever in use, of the process so far; None where the device does not say.
    """

    title: str
    latents: Float32[np.ndarray, "1 C F Y X"]
    kinds: tuple[str, ...]
    density: Float[np.ndarray, "steps L"]
    step_seconds: tuple[float, ...]
    first_step_compiled: bool
    seconds: float
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Stage:
    """Everything a run needs, on its device.

    Attributes:
        model: The transformer.
        conditions: One per branch of guidance.
        noise: float32 `[1, C, F, Y, X]`.
        scheduler: Of the run.
        dtype: Of the model.
        sharding: Over several devices; None is one.
    """

    model: Any
    conditions: list[Any]
    noise: jax.Array
    scheduler: Any
    dtype: Any
    sharding: VideoSharding | None


def prepare(job: GenerateJob, embeddings: PromptEmbeddings) -> Stage:
    """Load or make the model, draw the noise."""
    # What may be refused comes before the weights.
    scheduler = _generate_families.scheduler(job.facts, job.model, job.flow_shift, job.size)
    conditions = _generate_families.conditions(
        embeddings, num_branches=job.num_branches, guidance=job.guidance, config=job.config
    )
    dtype, sharding = model_dtype(job), sharding_of(job)
    place = None if sharding is None else sharding.parameter
    if job.random is not None:
        model = _generate_families.random_model(job.random, dtype=dtype, seed=job.seed, sharding=place)
    else:
        assert job.model is not None
        with _generate_progress.leaves_progress("weights") as progress:
            model = _generate_families.load_model(job.model, job.facts, dtype=dtype, sharding=place, progress=progress)
    noise = jax.random.normal(jax.random.key(job.seed), job.latent_shape, jnp.float32)
    return Stage(model, conditions, noise, scheduler, dtype, sharding)


def model_dtype(job: GenerateJob) -> Any:
    """That of the option; else 16 bits, but float32 on a CPU."""
    if job.dtype is not None:
        return jnp.dtype(job.dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def sharding_of(job: GenerateJob) -> VideoSharding | None:
    """How the devices share the clip; None on one.

    Raises:
        ValueError: There are fewer devices.
    """
    if job.devices == 1:
        return None
    return VideoSharding(make_mesh(job.devices), job.divide, job.split_weights)


def attention_of(job: GenerateJob) -> SliceMasks | None:
    """Attention of the job; None is dense."""
    if job.masks is None:
        return None
    return SliceMasks(
        job.masks.predictor_for(job.grid),
        job.masks.policy(),
        shared_branches=job.masks.shared,
        on_host=job.masks.on_host,
    )


class _FirstStepDoneError(Exception):
    """Ends a run that was there to compile."""


def denoise(job: GenerateJob, stage: Stage, attention: SliceMasks | None) -> Denoised:
    """Run all steps, from the noise of the stage to latents on the host.

    Where times are the point (random weights, comparisons), one step runs before, so that no step that counts compiles.

    Raises:
        ValueError: The latents came out as NaN or infinite.
    """
    title = "dense" if attention is None or job.masks is None else job.masks.method
    seconds: list[float] = []
    start = time.perf_counter()
    _generate_progress.say(f"{title}: compiling ...")
    warm = job.random is not None or job.compare_dense

    def run(progress: Any) -> Any:
        return sample(
            stage.model,
            stage.conditions,
            stage.noise,
            steps=job.steps,
            scheduler=stage.scheduler,
            guidance=job.branch_guidance,
            attention=attention,
            match_diffusers_bf16=job.match_diffusers_bf16,
            sharding=stage.sharding,
            progress=progress,
        )

    def stop(*_: Any) -> None:
        raise _FirstStepDoneError

    if warm:
        with contextlib.suppress(_FirstStepDoneError):
            run(stop)
    with _generate_progress.steps_progress(title, job.steps) as advance:

        def progress(step: int, kind: str, density: float, taken: float) -> None:
            seconds.append(taken)
            advance(step, kind, density, taken)

        result = run(progress)
    latents = np.asarray(result.latents, np.float32)
    if not np.isfinite(latents).all():
        raise ValueError(
            f"expected finite latents from the {title} run, got NaN or infinity: the checkpoint or the embeddings are "
            "broken, or 16 bits do not hold the model's activations (`--dtype float32` tells)"
        )
    return Denoised(
        title,
        latents,
        tuple(result.kinds),
        np.asarray(result.density, np.float64),
        tuple(seconds),
        not warm,
        time.perf_counter() - start,
        peak_device_bytes(),
    )


def implementations(job: GenerateJob, dtype: Any) -> dict[str, str]:
    """What implementation runs without masks and under them, in words."""
    tokens = num_tokens(job) + job.facts.text_tokens
    query = jax.ShapeDtypeStruct((1, tokens, job.config.num_heads, job.config.head_dim), dtype)

    def under_mask(block: int) -> str:
        mask = jax.eval_shape(lambda: masks.full(query_block=block, num_queries=tokens, num_keys=tokens))
        answer = fgattn_jax.explain(query, query, query, mask)
        return f"{answer.implementation} ({answer.kernel})"

    # Dense attention of the models asks for the LSE, and is under a mask where text has padding.
    if job.facts.text_tokens:
        texts = {"dense": f"{under_mask(128)}, all valid keys kept"}
    elif not dense.kernel_reasons(fgattn_jax.explain(query, query, query).spec):
        texts = {"dense": "cuda (all keys kept)"}
    else:
        texts = {"dense": "xla (in query chunks)"}
    if job.masks is not None:
        texts["masked"] = under_mask(job.masks.query_block)
    return texts


def num_tokens(job: GenerateJob) -> int:
    """Video tokens."""
    return int(np.prod(job.grid))


def mask_bytes(job: GenerateJob) -> int:
    """Bytes of the masks that are kept between steps; 0 where none are."""
    if job.masks is None or not job.masks.keeps_masks:
        return 0
    tokens = num_tokens(job) + job.facts.text_tokens
    rows, words = -(-tokens // job.masks.query_block), -(-tokens // 128) * 4
    branches = 1 if job.masks.shared else job.num_branches
    return branches * job.config.num_attentions * job.config.num_heads * rows * words * 4


def peak_device_bytes() -> int | None:
    """Most memory of the first device that was ever in use; None where it does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else int(stats.get("peak_bytes_in_use", 0)) or None


def peak_host_bytes() -> int:
    """Most memory that the process ever had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release_device() -> None:
    """Give the device's memory back to whoever asks next: torch, which shares it.

    JAX keeps what it once took as long as its client lives. Arrays made before are lost: the caller holds none. On a
    CPU nothing is shared and nothing is done.
    """
    if jax.default_backend() == "cpu":
        return
    import gc

    from jax.extend.backend import clear_backends

    jax.clear_caches()
    gc.collect()
    clear_backends()


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the wall-clock time of a block to `seconds[name]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
