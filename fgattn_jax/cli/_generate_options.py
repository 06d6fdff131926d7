"""The options of `fgattn generate`, checked before anything is loaded, as one job."""

import argparse
import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any, Literal

from fgattn_jax.cli._generate_families import (
    FAMILIES,
    PIXELS_PER_TOKEN,
    RANDOM_MODELS,
    SIZES,
    FamilyFacts,
    RandomModel,
    Size,
    detect,
    random_config,
    read_model_config,
)
from fgattn_jax.cli._generate_masks import MaskOptions, check_masks
from fgattn_jax.evaluation.clips import check_clip_path

_TORCH_MODULES = ("torch", "diffusers", "transformers")
_DECODE_OPTIONS = {"model", "decode", "out", "fps", "vae_dtype"}
_ENCODE_OPTIONS = {"model", "prompt", "negative_prompt", "save_embeddings", "dtype"}
_TEXT_OPTIONS = {"prompt", "negative_prompt", "from_embeddings", "save_embeddings"}
_MOST_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class DecodeJob:
    """Latents of an earlier run to a clip. Attributes as the options."""

    model: Path
    facts: FamilyFacts
    latents: Path
    out: Path
    frames_per_second: float
    vae_dtype: str | None


@dataclasses.dataclass(frozen=True)
class EncodeJob:
    """A prompt to embeddings in a file. Attributes as the options."""

    model: Path
    facts: FamilyFacts
    prompt: str
    negative_prompt: str
    save_embeddings: Path
    dtype: str | None


@dataclasses.dataclass(frozen=True)
class GenerateJob:
    """A run of the denoising stage, and of the others where the options ask for them.

    Attributes:
        model: Checkpoint directory; None with random weights.
        random: The model without weights; None with a checkpoint.
        facts: Of the family.
        config: Sizes of the transformer.
        prompt: None with embeddings from a file or at random.
        negative_prompt: Of the unconditional branch; None without one.
        from_embeddings: File.
        save_embeddings: File.
        out: The clip.
        latents_out: File.
        report: File.
        frames_per_second: Of the clip.
        vae_dtype: None is the default of the family.
        size: Height and width in pixels.
        frames: Of the clip.
        latent_shape: `[1, C, F, Y, X]`.
        grid: Tokens per axis.
        steps: Denoising steps.
        guidance: What the model takes as an input (HunyuanVideo), or that of `branch_guidance`.
        branch_guidance: Strength of classifier-free guidance; 1 is off.
        flow_shift: None is the default.
        seed: Of the noise.
        dtype: None is the default of the device.
        match_diffusers_bf16: As the option.
        masks: How masks are made; None is dense.
        compare_dense: As the option.
        devices: That make the clip together.
        divide: What each of them has a part of, "tokens" or "heads".
        split_weights: As the option.
    """

    model: Path | None
    random: RandomModel | None
    facts: FamilyFacts
    config: Any
    prompt: str | None
    negative_prompt: str | None
    from_embeddings: Path | None
    save_embeddings: Path | None
    out: Path | None
    latents_out: Path | None
    report: Path | None
    frames_per_second: float
    vae_dtype: str | None
    size: Size
    frames: int
    latent_shape: tuple[int, int, int, int, int]
    grid: tuple[int, int, int]
    steps: int
    guidance: float
    branch_guidance: float
    flow_shift: float | None
    seed: int
    dtype: str | None
    match_diffusers_bf16: bool
    masks: MaskOptions | None
    compare_dense: bool
    devices: int
    divide: Literal["tokens", "heads"]
    split_weights: bool

    @property
    def num_branches(self) -> int:
        """Forwards per step."""
        return 1 if self.branch_guidance <= 1 else 2

    @property
    def name(self) -> str:
        """The model, as text."""
        return str(self.model) if self.random is None else f"{self.random.name}, random weights"


def read_options(args: argparse.Namespace) -> DecodeJob | EncodeJob | GenerateJob:
    """Check all that can be checked without loading weights, and say what is to be done.

    Raises:
        ValueError: An option is wrong, conflicts with another one, or has no effect; a file or folder is missing or
            cannot be written; an extra is not installed.
    """
    if (args.model is None) == (args.random_weights is None):
        got = "neither" if args.model is None else "both"
        raise ValueError(f"expected one of `--model DIR` and `--random-weights NAME`, got {got}")
    if args.decode is not None:
        return _decode_job(args)
    if args.save_embeddings is not None and args.out is None and args.latents_out is None:
        return _encode_job(args)
    return _generate_job(args)


def _decode_job(args: argparse.Namespace) -> DecodeJob:
    _refuse_others(args, _DECODE_OPTIONS, "--decode")
    if args.out is None:
        raise ValueError("expected `--out FILE` with `--decode`, got none: say where the clip goes")
    facts = detect(args.model)
    _check_torch("--decode")
    _check_stage(args.model, facts, "decode")
    _check_readable("--decode", args.decode)
    _check_outputs(args)
    _check_clip_options(args)
    fps = args.fps or facts.frames_per_second
    return DecodeJob(args.model, facts, args.decode, args.out, fps, args.vae_dtype)


def _encode_job(args: argparse.Namespace) -> EncodeJob:
    if args.prompt is None:
        raise ValueError("expected `--prompt TEXT` with `--save-embeddings`, got none")
    _refuse_others(args, _ENCODE_OPTIONS, "--save-embeddings without --out or --latents-out")
    facts = detect(args.model)
    _check_torch("--prompt")
    _check_stage(args.model, facts, "encode")
    _check_outputs(args)
    return EncodeJob(args.model, facts, args.prompt, args.negative_prompt or "", args.save_embeddings, args.dtype)


def _generate_job(args: argparse.Namespace) -> GenerateJob:
    random = None if args.random_weights is None else RANDOM_MODELS[args.random_weights]
    _check_text(args)
    if random is not None:
        facts, config = FAMILIES[random.family], random_config(random)
        size, frames = random.size, random.frames
    else:
        facts = detect(args.model)
        config = read_model_config(args.model, facts)
        size, frames = facts.size, facts.frames
    size = size if args.size is None else _size(args.size)
    frames = frames if args.frames is None else args.frames
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"expected `--frames` of 4 k + 1 (1, 5, .. 81, .. 129), got frames={frames}")
    shape = (1, config.in_channels, (frames - 1) // 4 + 1, size[0] // 8, size[1] // 8)
    grid = config.grid(*shape[2:])
    steps = 50 if args.steps is None else args.steps
    if not 1 <= steps <= _MOST_STEPS:
        raise ValueError(f"expected `--steps` in 1 .. {_MOST_STEPS}, got steps={steps}")
    guidance, branch_guidance = _guidance(args, facts, config)
    if args.flow_shift is not None and not 0 < args.flow_shift < math.inf:
        raise ValueError(f"expected `--flow-shift` > 0, got flow_shift={args.flow_shift}")
    seed = 0 if args.seed is None else args.seed
    if not 0 <= seed < 2**32:
        raise ValueError(f"expected `--seed` in 0 .. {2**32 - 1}, got seed={seed}")
    if args.match_diffusers_bf16 and args.dtype == "float32":
        raise ValueError(
            "expected `--dtype bfloat16` with `--match-diffusers-bf16`, got dtype=float32, where nothing is rounded: "
            "drop one of them"
        )
    masks = check_masks(
        args,
        num_tokens=math.prod(grid),
        num_layers=config.num_attentions,
        steps=steps,
        num_branches=1 if branch_guidance <= 1 else 2,
        default_density=None if random is None else 0.35,
    )
    if masks is not None:
        # Names of orders are known to their module only; what it needs is NumPy.
        masks.order_of(grid)
    devices = _devices(args, config.num_heads)
    _check_clip_options(args)
    if random is None:
        if args.prompt is not None:
            _check_torch("--prompt")
            _check_stage(args.model, facts, "encode")
        if args.out is not None:
            _check_torch("--out")
            _check_stage(args.model, facts, "decode")
        if args.from_embeddings is not None:
            _check_readable("--from-embeddings", args.from_embeddings)
    _check_outputs(args)
    two_branches = branch_guidance > 1
    return GenerateJob(
        model=args.model,
        random=random,
        facts=facts,
        config=config,
        prompt=args.prompt,
        negative_prompt=(args.negative_prompt or "") if two_branches else None,
        from_embeddings=args.from_embeddings,
        save_embeddings=args.save_embeddings,
        out=args.out,
        latents_out=args.latents_out,
        report=args.report,
        frames_per_second=args.fps or facts.frames_per_second,
        vae_dtype=args.vae_dtype,
        size=size,
        frames=frames,
        latent_shape=shape,
        grid=grid,
        steps=steps,
        guidance=guidance,
        branch_guidance=branch_guidance,
        flow_shift=args.flow_shift,
        seed=seed,
        dtype="bfloat16" if args.match_diffusers_bf16 else args.dtype,
        match_diffusers_bf16=args.match_diffusers_bf16,
        masks=masks,
        compare_dense=args.compare_dense,
        devices=devices,
        divide=args.divide or "tokens",
        split_weights=args.split_weights,
    )


def _check_text(args: argparse.Namespace) -> None:
    if args.random_weights is not None:
        given = [name for name in sorted(_TEXT_OPTIONS) if getattr(args, name) is not None]
        if given:
            raise ValueError(f"`{_flag(given[0])}` has no effect with `--random-weights`, which knows no text: drop it")
        if args.out is not None:
            raise ValueError(
                "expected no `--out` with `--random-weights`, whose latents no VAE could decode: drop it; "
                "`--latents-out` keeps them, `--report` the times"
            )
        return
    if (args.prompt is None) == (args.from_embeddings is None):
        got = "neither" if args.prompt is None else "both"
        raise ValueError(f"expected one of `--prompt TEXT` and `--from-embeddings FILE`, got {got}")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("expected a text for `--prompt`, got an empty one")
    for name in ("negative_prompt", "save_embeddings"):
        if args.from_embeddings is not None and getattr(args, name) is not None:
            raise ValueError(f"`{_flag(name)}` has no effect with `--from-embeddings`, whose text is encoded: drop it")
    if args.out is None and args.latents_out is None:
        raise ValueError(
            "expected `--out FILE` for the clip or `--latents-out FILE` for what a VAE decodes later, got neither"
        )


def _guidance(args: argparse.Namespace, facts: FamilyFacts, config: Any) -> tuple[float, float]:
    """What the model takes as an input, and the strength of classifier-free guidance."""
    for name in ("guidance", "true_guidance"):
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"expected a finite `{_flag(name)}`, got {name}={value}")
    guidance = facts.guidance if args.guidance is None else args.guidance
    if not facts.embedded_guidance:
        if args.true_guidance is not None:
            raise ValueError("`--true-guidance` is for HunyuanVideo; Wan's classifier-free guidance is `--guidance`")
        strength = guidance
    else:
        if args.guidance is not None and not config.guidance_embeds:
            raise ValueError("`--guidance` has no effect on a model without guidance embeddings: use `--true-guidance`")
        strength = 1.0 if args.true_guidance is None else args.true_guidance
    # diffusers runs the second branch above 1 only.
    strength = max(strength, 1.0)
    if strength <= 1 and args.negative_prompt is not None:
        name = "--true-guidance" if facts.embedded_guidance else "--guidance"
        raise ValueError(f"`--negative-prompt` has no effect without `{name}` above 1: raise it, or drop the prompt")
    return guidance, strength


def _devices(args: argparse.Namespace, num_heads: int) -> int:
    """Devices that make the clip; whether there are as many is seen when they are asked for."""
    devices = 1 if args.devices is None else args.devices
    if devices < 1 or num_heads % devices:
        fitting = [n for n in range(1, max(devices, 1) + 1) if num_heads % n == 0]
        raise ValueError(
            f"expected a number of `--devices` that divides the {num_heads} heads of this model, got "
            f"devices={devices}: take {fitting[-1]}"
        )
    if devices == 1:
        for name in ("divide", "split_weights"):
            if getattr(args, name):
                raise ValueError(f"`{_flag(name)}` has no effect on one device: give `--devices`, or drop it")
    if args.split_weights and args.divide == "heads":
        raise ValueError("`--split-weights` has no effect with `--divide heads`, which divides the weights: drop it")
    if devices > 1 and args.masks_on_host:
        raise ValueError(
            "expected masks on the devices with `--devices`, got `--masks-on-host`: each keeps those of its own heads; "
            "drop it"
        )
    return devices


def _size(text: str) -> Size:
    if text in SIZES:
        return SIZES[text]
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(
            f"expected `--size` as HxW in pixels, for instance 480x832, or {' or '.join(SIZES)}; got {text!r}"
        )
    height, width = int(sides[0]), int(sides[1])
    if min(height, width) < 1 or height % PIXELS_PER_TOKEN or width % PIXELS_PER_TOKEN:
        near = [max(1, round(side / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN for side in (height, width)]
        raise ValueError(
            f"expected `--size` in multiples of {PIXELS_PER_TOKEN} pixels, got {text!r}: try {near[0]}x{near[1]}"
        )
    return height, width


def _refuse_others(args: argparse.Namespace, allowed: set[str], option: str) -> None:
    own = {"command", "traceback", *allowed}
    for name, value in vars(args).items():
        if name not in own and value is not None and value is not False:
            raise ValueError(f"`{_flag(name)}` has no effect with `{option}`: drop it")


def _check_torch(option: str) -> None:
    missing = [name for name in _TORCH_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        other = {
            "--prompt": "give `--from-embeddings FILE`, made on a machine that has it",
            "--out": "keep `--latents-out FILE`, and decode it on a machine that has it",
            "--decode": "decode on a machine that has it",
        }[option]
        raise ValueError(
            f"`{option}` needs {', '.join(missing)}, not installed here: pip install 'fgattn-jax[torch]', or {other}"
        )


def _check_stage(directory: Path, facts: FamilyFacts, stage: Any) -> None:
    from fgattn_jax.models.video.stages import check_stage

    check_stage(directory, facts.family, stage)


def _check_readable(option: str, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"expected an existing file for `{option}`, got {str(path)!r}")


def _check_outputs(args: argparse.Namespace) -> None:
    """All files can be written, and none is named twice or read before."""
    if args.out is not None:
        check_clip_path(args.out)
    names = ("out", "latents_out", "save_embeddings", "report")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    read = {name: getattr(args, name) for name in ("decode", "from_embeddings") if getattr(args, name) is not None}
    seen: dict[Path, str] = {path.resolve(): name for name, path in read.items()}
    for name, path in given.items():
        if path.is_dir():
            raise ValueError(f"expected a file name for `{_flag(name)}`, {str(path)!r} is a folder")
        if not path.resolve().parent.is_dir():
            raise ValueError(
                f"expected `{_flag(name)}` in an existing folder, there is no {str(path.parent)!r}: make it first"
            )
        if path.resolve() in seen:
            other = _flag(seen[path.resolve()])
            raise ValueError(f"expected different files for `{other}` and `{_flag(name)}`, got {str(path)!r} for both")
        seen[path.resolve()] = name


def _check_clip_options(args: argparse.Namespace) -> None:
    for name in ("fps", "vae_dtype"):
        if args.out is None and getattr(args, name) is not None:
            raise ValueError(f"`{_flag(name)}` has no effect without `--out`: drop it")
    if args.fps is not None and not 0 < args.fps <= 240:
        raise ValueError(f"expected 0 < `--fps` <= 240, got fps={args.fps}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
