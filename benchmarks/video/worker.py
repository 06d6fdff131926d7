"""One attention of one model in a process of its own, so that its peak of device memory is its own."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from fgattn_jax.cli import _generate_families as families

QUERY_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of a denoising step, all branches of guidance, by its kind; medians.

    Attributes:
        seconds: by "dense", "refresh" or "cached"; kinds that did not run are missing.
        density: share of slices that steps under masks computed; 1 where all were dense.
        peak_bytes: most device memory that was in use; None where the device does not say, and for "none".
        mask_bytes: of the masks that are kept.
        first_step_s: seconds of the first step, compilation included.
    """

    seconds: dict[str, float]
    density: float
    peak_bytes: int | None
    mask_bytes: int
    first_step_s: float


def measure(
    shape: str,
    asked: Sequence[tuple[str, float]],
    *,
    layers: int | None = None,
    frames: int | None = None,
    repeats: int = 2,
    on_host: bool = False,
) -> list[StepTimes]:
    """Time denoising steps of a model with random weights.

    Args:
        shape: a name of `fgattn generate --random-weights`.
        asked: attentions, one after the other, and the share of the keys that every row keeps. "dense"; "none",
            values handed on as they are; "cached", exact masks that are kept; "mean-query", masks made at every step.
            The same attention with other shares takes the same memory: what is kept are bits.
        layers: that many layers instead of all.
        frames: of the clip, instead of those of the name.
        repeats: steps of each kind that are timed, after one that is not.
        on_host: keep masks in host memory.
    """
    import jax
    import jax.numpy as jnp

    chosen = families.RANDOM_MODELS[shape]
    facts, config = families.FAMILIES[chosen.family], families.random_config(chosen)
    if layers is not None:
        config = with_layers(config, layers)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = families.package(chosen.family).random(config, dtype=dtype, seed=0)
    branches = 1 if facts.embedded_guidance else 2
    conditions = families.conditions(
        families.random_embeddings(chosen, 0), num_branches=branches, guidance=facts.guidance, config=config
    )
    latent = (((frames or chosen.frames) - 1) // 4 + 1, chosen.size[0] // 8, chosen.size[1] // 8)
    settings = {
        "scheduler": families.scheduler(facts, None, None, chosen.size),
        "guidance": 1.0 if facts.embedded_guidance else facts.guidance,
    }
    return [
        _steps(model, conditions, latent, attention, density, on_host=on_host, repeats=repeats, settings=settings)
        for attention, density in asked
    ]


def _steps(
    model: Any, conditions: Any, latent: Any, attention: str, density: float, *, on_host: bool, repeats: int,
    settings: dict[str, Any],
) -> StepTimes:  # fmt: skip
    """Times of one attention."""
    import jax
    import jax.numpy as jnp

    from fgattn_jax.models.video.sampling import sample

    kinds = 2 if attention == "cached" else 1
    times: list[tuple[str, float, float]] = []
    result = sample(
        model,
        conditions,
        (jax.random.key(1), latent),
        steps=kinds * (repeats + 1),
        attention=_attention(attention, model.config.grid(*latent), density, on_host),
        progress=lambda step, kind, kept, seconds: times.append((kind, kept, seconds)),
        **settings,
    )
    assert bool(jnp.isfinite(result.latents).all())
    timed = times[kinds:]  # the first step compiles
    seconds = {
        kind: statistics.median(taken for other, _, taken in timed if other == kind)
        for kind in dict.fromkeys(kind for kind, _, _ in timed)
    }
    kept = [kept for kind, kept, _ in timed if kind == "cached" or (attention == "mean-query" and kind == "refresh")]
    stored = None if result.masks is None else result.masks.stored
    stats = jax.local_devices()[0].memory_stats() or {}
    return StepTimes(
        seconds,
        statistics.mean(kept) if kept else 1.0,
        # "none" runs behind another attention, whose peak this is.
        None if attention == "none" else stats.get("peak_bytes_in_use"),
        0 if stored is None else sum(leaf.nbytes for leaf in jax.tree.leaves(stored)),
        times[0][2],
    )


def with_layers(config: Any, layers: int) -> Any:
    """The config with that many attentions; HunyuanVideo keeps its one dual block to two single ones."""
    if hasattr(config, "num_layers"):
        return dataclasses.replace(config, num_layers=layers)
    if layers % 3:
        raise ValueError(f"expected `--layers` to be a multiple of 3 for HunyuanVideo, got {layers}")
    return dataclasses.replace(config, num_dual_layers=layers // 3, num_single_layers=2 * layers // 3)


def _attention(name: str, grid: tuple[int, int, int], density: float, on_host: bool) -> Any:
    from fgattn_jax.models.video.slice_masks import SliceMasks
    from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor, RefreshPolicy

    if name == "dense":
        return "dense"
    if name == "none":
        return hand_on
    num_keys = grid[0] * grid[1] * grid[2]
    budget = Budget(top_k=max(1, round(density * num_keys)))
    if name == "mean-query":
        return SliceMasks(MeanQueryPredictor(QUERY_BLOCK, budget=budget), RefreshPolicy(every=1))
    predictor = ExactPredictor(QUERY_BLOCK, statistic="mass", budget=budget)
    return SliceMasks(predictor, RefreshPolicy(every=2), on_host=on_host)


def hand_on(query: Any, key: Any, value: Any, key_value_seq_lengths: Any = None) -> Any:
    """In the place of attention: what all else of a step takes."""
    del key, key_value_seq_lengths
    return value + 0 * query
