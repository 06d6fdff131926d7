"""What `fgattn generate` knows of each model family: defaults of diffusers, loading, random weights, conditions.

JAX and the models are imported inside functions: `--help` and wrong options need neither.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fgattn_jax.evaluation import model_shapes
from fgattn_jax.models.video.stage_files import Arrays, Family, PromptEmbeddings

Size = tuple[int, int]

SIZES: dict[str, Size] = {"480p": (480, 832), "720p": (720, 1280)}
"""Heights and widths by name."""
PIXELS_PER_TOKEN = 16
"""Rows and columns of pixels per token: 8 per latent, 2 latents per token."""


@dataclasses.dataclass(frozen=True)
class FamilyFacts:
    """Defaults of a family, those of its pipeline in diffusers.

    Attributes:
        family: Its name in files.
        title: As people write it.
        class_name: `_class_name` of its transformers.
        size: Height and width in pixels.
        frames: Of a clip.
        frames_per_second: Of the file.
        guidance: Classifier-free guidance of Wan; the scale that HunyuanVideo takes as an input.
    """

    family: Family
    title: str
    class_name: str
    size: Size
    frames: int
    frames_per_second: float
    guidance: float

    @property
    def text_tokens(self) -> int:
        """Text tokens that take part in the attention over the video, with padding."""
        return 256 if self.family == "hunyuan_video" else 0

    @property
    def embedded_guidance(self) -> bool:
        """Whether `guidance` is an input of the model, and needs no second forward."""
        return self.family == "hunyuan_video"

    def flow_shift(self, size: Size) -> float:
        """Shift of the noise levels for a size in pixels."""
        if self.family == "hunyuan_video":
            return 7.0
        # Between 480p and 720p, nearer to the smaller one.
        return 5.0 if size[0] * size[1] > 1.5 * 480 * 832 else 3.0


FAMILIES: dict[Family, FamilyFacts] = {
    "wan": FamilyFacts("wan", "Wan 2.1", "WanTransformer3DModel", SIZES["480p"], 81, 16, 5.0),
    "hunyuan_video": FamilyFacts(
        "hunyuan_video", "HunyuanVideo", "HunyuanVideoTransformer3DModel", SIZES["720p"], 129, 24, 6.0
    ),
}


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A model without weights, for timing.

    Attributes:
        name: As `--random-weights` takes it.
        family: Of the model.
        preset: Name of its config in the family's `PRESETS`; None for the tiny one.
        size: Height and width in pixels.
        frames: Of a clip.
    """

    name: str
    family: Family
    preset: str | None
    size: Size
    frames: int


def _published(name: str, family: Family, preset: str) -> RandomModel:
    frames, height, width = model_shapes.find(name).grid
    return RandomModel(name, family, preset, (height * PIXELS_PER_TOKEN, width * PIXELS_PER_TOKEN), 4 * frames - 3)


RANDOM_MODELS: dict[str, RandomModel] = {
    model.name: model
    for model in (
        _published("wan-1.3b-480p", "wan", "wan-1.3b"),
        _published("wan-1.3b-720p", "wan", "wan-1.3b"),
        _published("wan-14b-480p", "wan", "wan-14b"),
        _published("wan-14b-720p", "wan", "wan-14b"),
        _published("hunyuan-544p", "hunyuan_video", "hunyuan-video"),
        _published("hunyuan-720p", "hunyuan_video", "hunyuan-video"),
        RandomModel("wan-tiny", "wan", None, (96, 128), 9),
        RandomModel("hunyuan-tiny", "hunyuan_video", None, (96, 128), 9),
    )
}


def detect(directory: Path) -> FamilyFacts:
    """The family of a checkpoint directory, by the class of its transformer.

    Raises:
        ValueError: The directory is no diffusers checkpoint, or of another class.
    """
    from fgattn_jax.models.video.layout import read_config

    name = read_config(directory).get("_class_name")
    for facts in FAMILIES.values():
        if facts.class_name == name:
            return facts
    known = " or ".join(facts.class_name for facts in FAMILIES.values())
    raise ValueError(f"expected a transformer of class {known} in {str(directory)!r}, got _class_name={name!r}")


def read_model_config(directory: Path, facts: FamilyFacts) -> Any:
    """Sizes of the transformer in a checkpoint directory, checked.

    Raises:
        ValueError: It is a variant that is not supported.
    """
    return package(facts.family).read_sizes(directory)


def random_config(model: RandomModel) -> Any:
    """Sizes of a model without weights."""
    if model.preset is not None:
        return package(model.family).PRESETS[model.preset]
    config = _config_class(model.family)
    if model.family == "wan":
        return config(num_heads=2, head_dim=32, num_layers=2, hidden_dim=128, text_dim=64)
    return config(
        num_heads=2,
        head_dim=32,
        num_dual_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_dim=64,
        pooled_dim=32,
        rope_dims=(8, 12, 12),
    )


def load_model(
    directory: Path, facts: FamilyFacts, *, dtype: Any, sharding: Any, progress: Callable[[str, int, int], None]
) -> Any:
    """The transformer of a checkpoint directory, where `sharding` says, or on the default device."""
    return package(facts.family).load(directory, dtype=dtype, sharding=sharding, progress=progress)


def random_model(model: RandomModel, *, dtype: Any, seed: int, sharding: Any) -> Any:
    """A transformer of random weights, made where `sharding` says, or on the default device."""
    return package(model.family).random(random_config(model), dtype=dtype, seed=seed, sharding=sharding)


def random_embeddings(model: RandomModel, seed: int) -> PromptEmbeddings:
    """Embeddings of no prompt at all: unit normal, of both branches."""
    config, rng = random_config(model), np.random.default_rng(seed)

    def branch() -> Arrays:
        if model.family == "wan":
            return {"text": rng.standard_normal((1, 512, config.text_dim), np.float32)}
        return {
            "text": rng.standard_normal((1, 256, config.text_dim), np.float32),
            # About as many as a prompt of three sentences has.
            "lengths": np.array([96], np.int32),
            "pooled": rng.standard_normal((1, config.pooled_dim), np.float32),
        }

    return PromptEmbeddings(model.family, "", "", (branch(), branch()))


def conditions(embeddings: PromptEmbeddings, *, num_branches: int, guidance: float, config: Any) -> list[Any]:
    """What the model is told, one named tuple per branch of guidance.

    Args:
        embeddings: Of the prompt, and of the negative prompt where there are two branches.
        num_branches: 1, or 2 with classifier-free guidance.
        guidance: The scale that HunyuanVideo takes as an input.
        config: Of the model.

    Raises:
        ValueError: The embeddings are of another width than the model takes.
    """
    import jax.numpy as jnp

    made = []
    for arrays in embeddings.branches[:num_branches]:
        width = arrays["text"].shape[-1]
        if width != config.text_dim:
            raise ValueError(
                f"expected text embeddings of width {config.text_dim} for this model, got shape={arrays['text'].shape}"
            )
        text = jnp.asarray(arrays["text"])
        if embeddings.family == "wan":
            made.append(package("wan").WanCondition(text))
            continue
        if arrays["pooled"].shape[-1] != config.pooled_dim:
            raise ValueError(
                f"expected pooled embeddings of width {config.pooled_dim} for this model, got "
                f"shape={arrays['pooled'].shape}"
            )
        scale = jnp.full((1,), guidance, jnp.float32) if config.guidance_embeds else None
        lengths, pooled = jnp.asarray(arrays["lengths"]), jnp.asarray(arrays["pooled"])
        made.append(package("hunyuan_video").HunyuanVideoCondition(text, lengths, pooled, scale))
    return made


def scheduler(facts: FamilyFacts, directory: Path | None, shift: float | None, size: Size) -> Any:
    """The scheduler of a run: of the checkpoint's kind, with the shift of the option or of the size.

    Raises:
        ValueError: The checkpoint's scheduler has settings that are not reproduced, or the shift is not positive.
    """
    from fgattn_jax.models.video import schedulers

    file = None if directory is None else directory / "scheduler" / "scheduler_config.json"
    if file is not None and file.exists():
        made = schedulers.from_config(json.loads(file.read_text()))
    else:
        made = schedulers.UniPC() if facts.family == "wan" else schedulers.FlowEuler()
    field = "flow_shift" if isinstance(made, schedulers.UniPC) else "shift"
    if shift is None and facts.family == "wan":
        # Published checkpoints of both sizes say 3.0; diffusers' documentation says which size wants which.
        shift = facts.flow_shift(size)
    return made if shift is None else dataclasses.replace(made, **{field: shift})


def package(family: Family) -> Any:
    """The module of a family: its config, presets, `load` and `random`."""
    import importlib

    return importlib.import_module(f"fgattn_jax.models.{family}")


def _config_class(family: Family) -> Any:
    return getattr(package(family), "WanConfig" if family == "wan" else "HunyuanVideoConfig")
