"""From a prompt to a clip through `fgattn generate`, offline, against the whole pipeline of diffusers in torch."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints

from fgattn_jax.cli.main import main
from fgattn_jax.models.video import stage_files, stages
from fgattn_jax.models.video.stage_files import Family

pytestmark = pytest.mark.usefixtures("torch_models")

PROMPT, NEGATIVE, SEED = "A cat surfs, 2 dogs look on.", "blurry", 5
FRAMES, HEIGHT, WIDTH, STEPS = 5, 48, 64, 6
COMMON = ["--size", f"{HEIGHT}x{WIDTH}", "--frames", str(FRAMES), "--steps", str(STEPS), "--seed", str(SEED)]


class Case(NamedTuple):
    """A family: how its checkpoint is made, what guides it in diffusers and here."""

    family: Family
    save: str
    pipeline: str
    transformer: str
    guidance: dict
    options: list[str]


CASES = [
    Case(
        "wan",
        "save_tiny_wan",
        "WanPipeline",
        "WanTransformer3DModel",
        {"guidance_scale": 4.0},
        ["--guidance", "4"],
    ),
    Case(
        "hunyuan_video",
        "save_tiny_hunyuan",
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {"guidance_scale": 5.0, "true_cfg_scale": 2.5},
        ["--guidance", "5", "--true-guidance", "2.5"],
    ),
]


class Run(NamedTuple):
    """One call of the command, and what diffusers gives for the same noise."""

    case: Case
    checkpoint: Path
    folder: Path
    report: dict
    latents: np.ndarray
    frames: np.ndarray


@pytest.fixture(scope="module", params=CASES, ids=[case.family for case in CASES])
def made(request, torch_models, tmp_path_factory):
    case = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        checkpoint = getattr(tiny_checkpoints, case.save)(tmp_path_factory.mktemp("checkpoint"))
        folder = tmp_path_factory.mktemp("run")
        argv = ["generate", "--model", str(checkpoint), "--prompt", PROMPT, "--negative-prompt", NEGATIVE, *COMMON]
        argv += ["--out", str(folder / "clip.mp4"), "--latents-out", str(folder / "latents.safetensors")]
        argv += ["--save-embeddings", str(folder / "text.safetensors"), "--report", str(folder / "run.json")]
        # A threshold of 0 keeps everything: masks, but nothing is skipped.
        argv += ["--attention", "cached", "--predictor", "exact", "--tau", "0", "--query-block", "16"]
        assert main([*argv, "--refresh-every", "4", "--compare-dense", *case.options]) == 0
        latents, frames = whole_pipeline(case, checkpoint)
    report = json.loads((folder / "run.json").read_text())
    return Run(case, checkpoint, folder, report, latents, frames)


def whole_pipeline(case: Case, checkpoint: Path) -> tuple[np.ndarray, np.ndarray]:
    """Latents and frames of diffusers, in float32."""
    import diffusers
    import torch
    from safetensors.torch import load_file

    # Not from_pretrained: with modules that are kept in float32 it wants accelerate.
    kind = getattr(diffusers, case.transformer)
    transformer = kind.from_config(kind.load_config(checkpoint, subfolder="transformer"))
    transformer.load_state_dict(load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"))
    pipeline = getattr(diffusers, case.pipeline).from_pretrained(
        checkpoint, transformer=transformer.eval(), low_cpu_mem_usage=False, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    shape = (1, 16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    noise = torch.from_numpy(np.array(jax.random.normal(jax.random.key(SEED), shape, jnp.float32)))
    arguments = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, **case.guidance}
    arguments |= {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    latents = pipeline(**arguments, latents=noise.clone(), output_type="latent").frames.numpy()
    frames = pipeline(**arguments, latents=noise.clone(), output_type="np").frames[0]
    return latents, frames


def relative(value: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(value - wanted) / np.linalg.norm(wanted))


def test_latents_are_those_of_the_pipeline(made):
    saved = stage_files.load_latents(made.folder / "latents.safetensors")
    assert saved.family == made.case.family
    assert saved.facts["prompt"] == PROMPT
    assert relative(saved.latents, made.latents) < 1e-5


def test_frames_are_those_of_the_pipeline(made):
    saved = stage_files.load_latents(made.folder / "latents.safetensors")
    frames = stages.decode_latents(made.checkpoint, made.case.family, saved.latents)
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    # Random weights show something: neither black nor grey.
    assert made.frames.std() > 0.02
    np.testing.assert_allclose(frames, made.frames, atol=1e-4)


def test_the_prompt_matters(made):
    """Other text, other embeddings, beyond the length alone: the comparisons above could fail."""
    ours = stage_files.load_embeddings(made.folder / "text.safetensors")
    other = stages.encode_prompt(made.checkpoint, made.case.family, PROMPT.replace("cat", "dog"))
    assert relative(other.branches[0]["text"], ours.branches[0]["text"]) > 0.01
    assert len(other.branches) == 1
    assert other.negative_prompt is None


def test_masks_that_skip_nothing_give_the_dense_run(made):
    run = made.report["runs"]["cached"]
    assert [step["kind"] for step in run["steps"]] == ["refresh", "cached", "cached", "cached", "refresh", "cached"]
    if made.case.family == "wan":
        assert run["density"] == 1.0
    assert made.report["comparison"]["latents_relative_error"] < 1e-5
    worst = made.report["comparison"]["psnr_worst"]
    assert worst is None or worst > 80  # None: equal frames
    assert made.report["comparison"]["ssim_worst"] > 0.9999


def test_the_clips_hold_these_frames(made):
    import imageio_ffmpeg

    for name in ("clip.mp4", "clip.dense.mp4"):
        reader = imageio_ffmpeg.read_frames(str(made.folder / name))
        facts = next(reader)
        frames = np.stack([np.frombuffer(frame, np.uint8).reshape(HEIGHT, WIDTH, 3) for frame in reader])
        assert facts["fps"] == {"wan": 16, "hunyuan_video": 24}[made.case.family]
        assert frames.shape == made.frames.shape
        # H.264 halves the resolution of colours; this is noise, the worst there is for it.
        assert np.abs(frames / 255 - made.frames).mean() < 0.1


def test_stage_by_stage_is_the_same_run(made, tmp_path, capsys):
    """Text in one call, denoising in another one, the clip in a third one."""
    text, latents, clip = tmp_path / "text.safetensors", tmp_path / "latents.safetensors", tmp_path / "clip.gif"
    model = ["generate", "--model", str(made.checkpoint)]
    assert main([*model, "--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--save-embeddings", str(text)]) == 0
    kept, again = stage_files.load_embeddings(made.folder / "text.safetensors"), stage_files.load_embeddings(text)
    for first, second in zip(kept.branches, again.branches, strict=True):
        for name, array in first.items():
            np.testing.assert_array_equal(second[name], array)
    argv = [*model, "--from-embeddings", str(text), "--latents-out", str(latents), "--attention", "dense", *COMMON]
    assert main([*argv, *made.case.options]) == 0
    assert f"--decode {latents}" in capsys.readouterr().out
    assert relative(stage_files.load_latents(latents).latents, made.latents) < 1e-5
    assert main([*model, "--decode", str(latents), "--out", str(clip)]) == 0
    from PIL import Image

    with Image.open(clip) as image:
        assert (image.n_frames, image.size) == (FRAMES, (WIDTH, HEIGHT))


def test_latents_survive_a_decoder_that_fails(made, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise OSError("no memory left on the device")

    monkeypatch.setattr(stages, "decode_latents", fails)
    argv = ["generate", "--model", str(made.checkpoint), "--attention", "dense", *COMMON, *made.case.options]
    argv += ["--from-embeddings", str(made.folder / "text.safetensors"), "--out", str(tmp_path / "clip.gif")]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "no memory left" in err
    assert "--decode" in err
    saved = stage_files.load_latents(tmp_path / "clip.latents.safetensors")
    assert relative(saved.latents, made.latents) < 1e-5


def test_sixteen_bits_stay_near_the_pipeline(made):
    """Decoding in bfloat16 is an option; it costs less than a shade or two of 256."""
    saved = stage_files.load_latents(made.folder / "latents.safetensors")
    frames = stages.decode_latents(made.checkpoint, made.case.family, saved.latents, dtype="bfloat16")
    assert 0 < np.abs(frames - made.frames).mean() < 0.02


def test_latents_of_another_family_are_refused(made, tmp_path, capsys):
    other = "hunyuan_video" if made.case.family == "wan" else "wan"
    path = tmp_path / "other.safetensors"
    stage_files.save_latents(path, stage_files.SavedLatents(other, made.latents, {}))
    assert main(["generate", "--model", str(made.checkpoint), "--decode", str(path), "--out", "x.gif"]) == 2
    assert f"got those of {other}" in capsys.readouterr().err
