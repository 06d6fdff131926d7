"""The stages of `fgattn generate` one after the other, each releasing what it held before the next one starts."""

import argparse
import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fgattn_jax.cli import _generate_families, _generate_progress
from fgattn_jax.cli._generate_options import DecodeJob, EncodeJob, GenerateJob
from fgattn_jax.evaluation import clips
from fgattn_jax.models.video import stage_files, stages
from fgattn_jax.models.video.stage_files import Family, PromptEmbeddings, SavedLatents

say = _generate_progress.say


def encode_file(job: EncodeJob) -> None:
    """A prompt to embeddings in a file, of both branches of guidance."""
    embeddings = stages.encode_prompt(
        job.model, job.facts.family, job.prompt, job.negative_prompt, dtype=_text_dtype(job.dtype)
    )
    stage_files.save_embeddings(job.save_embeddings, embeddings)
    print(f"embeddings in {job.save_embeddings}: fgattn generate --model DIR --from-embeddings {job.save_embeddings}")


def decode_file(job: DecodeJob) -> None:
    """Latents in a file to a clip."""
    saved = stage_files.load_latents(job.latents)
    if saved.family != job.facts.family:
        raise ValueError(
            f"expected latents of {job.facts.family} in {str(job.latents)!r}, got those of {saved.family}: decode with "
            "the checkpoint that made them"
        )
    frames = _decode(job.model, job.facts.family, saved.latents, job.vae_dtype)
    clips.write_clip(job.out, frames, frames_per_second=job.frames_per_second)
    print(_clip_line(job.out, frames))


def generate(job: GenerateJob, args: argparse.Namespace) -> None:
    """A clip, latents, or times, as the job says; prints tables and writes the report."""
    seconds: dict[str, float] = {}
    embeddings = _embeddings(job, seconds)
    # JAX takes most of a GPU's memory when it starts: after the text encoders, which need it before.
    from fgattn_jax.cli import _generate_report, _generate_run

    with _generate_run.timed(seconds, "load"):
        source = _generate_report.source()
        print(_generate_report.header(job, source, _generate_run.model_dtype(job)), flush=True)
        attention = _generate_run.attention_of(job)
        stage = _generate_run.prepare(job, embeddings)
    facts = _generate_report.settings(job, stage)
    runs = []
    # The run that was asked for comes first: interrupted, it is the one that is there.
    for each in [attention, None] if job.compare_dense else [attention]:
        run = _generate_run.denoise(job, stage, each)
        seconds[f"denoise, {run.title}"] = run.seconds
        runs.append(run)
        if each is attention and job.latents_out is not None:
            stage_files.save_latents(job.latents_out, SavedLatents(job.facts.family, run.latents, facts))
            print(_latents_line(job))
    del stage, attention

    decoded: list[np.ndarray] = []
    if job.out is not None:
        assert job.model is not None
        _generate_run.release_device()
        paths = [job.out, dense_path(job.out)]
        for run, path in zip(runs, paths, strict=False):
            with _generate_run.timed(seconds, "decode"), _rescued(job, run.latents, facts):
                decoded.append(_decode(job.model, job.facts.family, run.latents, job.vae_dtype))
                clips.write_clip(path, decoded[-1], frames_per_second=job.frames_per_second)
            print(_clip_line(path, decoded[-1]))
    report = _generate_report.report(job, args, source, facts, runs, decoded, seconds)
    _generate_report.print_tables(report)
    if job.report is not None:
        _generate_report.write(job.report, report)
        print(f"report in {job.report}")


def dense_path(out: Path) -> Path:
    """Where the dense clip of a comparison goes: beside the other one."""
    return out.with_name(f"{out.stem}.dense{out.suffix}")


def _embeddings(job: GenerateJob, seconds: dict[str, float]) -> PromptEmbeddings:
    start = time.perf_counter()
    if job.random is not None:
        return _generate_families.random_embeddings(job.random, job.seed)
    if job.from_embeddings is not None:
        return _checked(stage_files.load_embeddings(job.from_embeddings), job)
    assert job.model is not None
    assert job.prompt is not None
    say(f"text: encoding on {stages.torch_device()} ...")
    embeddings = stages.encode_prompt(
        job.model, job.facts.family, job.prompt, job.negative_prompt, dtype=_text_dtype(job.dtype)
    )
    if job.save_embeddings is not None:
        stage_files.save_embeddings(job.save_embeddings, embeddings)
        print(f"embeddings in {job.save_embeddings}")
    seconds["encode"] = time.perf_counter() - start
    return embeddings


def _checked(embeddings: PromptEmbeddings, job: GenerateJob) -> PromptEmbeddings:
    path = str(job.from_embeddings)
    if embeddings.family != job.facts.family:
        raise ValueError(
            f"expected embeddings of {job.facts.family} in {path!r}, got those of {embeddings.family}: encode the "
            "prompt with the text encoders of this checkpoint"
        )
    if len(embeddings.branches) < job.num_branches:
        raise ValueError(
            f"expected embeddings of a prompt and a negative prompt in {path!r} for guidance "
            f"{job.branch_guidance:g}, got those of a prompt alone: encode again with guidance, or turn it off"
        )
    return embeddings


def _decode(model: Path, family: Family, latents: np.ndarray, dtype: str | None) -> np.ndarray:
    device = stages.torch_device()
    if dtype is None:
        dtype = "float16" if family == "hunyuan_video" and device != "cpu" else "float32"
    say(f"clip: decoding on {device} in {dtype} ...")
    chosen: Any = dtype
    return stages.decode_latents(model, family, latents, dtype=chosen)


@contextlib.contextmanager
def _rescued(job: GenerateJob, latents: np.ndarray, facts: Mapping[str, Any]) -> Iterator[None]:
    """Minutes of work are kept beside the clip if decoding fails or is interrupted."""
    assert job.out is not None
    try:
        yield
    except BaseException:
        path = job.out.with_suffix(".latents.safetensors")
        stage_files.save_latents(path, SavedLatents(job.facts.family, latents, facts))
        say(
            f"clip: decoding failed; the latents are kept: fgattn generate --model {job.model} --decode {path} "
            f"--out {job.out}"
        )
        raise


def _text_dtype(dtype: str | None) -> Any:
    if dtype is not None:
        return dtype
    return "float32" if stages.torch_device() == "cpu" else "bfloat16"


def _latents_line(job: GenerateJob) -> str:
    line = f"latents in {job.latents_out}"
    if job.out is None and job.model is not None:
        line += f"; to a clip: fgattn generate --model {job.model} --decode {job.latents_out} --out clip.mp4"
    return line


def _clip_line(path: Path, frames: np.ndarray) -> str:
    count, height, width = frames.shape[:3]
    return f"clip in {path}: {count} frames of {height}x{width}"
