"""The report of `fgattn generate`: one JSON object, and the tables on the screen that are made from it."""

import argparse
import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fgattn_jax
from fgattn_jax.cli import _generate_progress, _generate_run
from fgattn_jax.cli._generate_options import GenerateJob
from fgattn_jax.cli._generate_run import Denoised, Stage
from fgattn_jax.evaluation import frames, tables

_PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers")


def source() -> dict[str, Any]:
    """Device, versions, commit, date."""
    versions: dict[str, str | None] = {"fgattn_jax": fgattn_jax.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {**tables.provenance("fgattn generate"), "versions": versions}


def header(job: GenerateJob, source: Mapping[str, Any], dtype: Any) -> str:
    """What is about to run, in a few lines."""
    height, width = job.size
    guidance = f"guidance {job.guidance:g}"
    if job.facts.embedded_guidance and job.num_branches == 2:
        guidance += f" and classifier-free {job.branch_guidance:g}"
    tokens, layers = _generate_run.num_tokens(job), job.config.num_attentions
    clip = f"{job.frames} frames of {height}x{width}, {tokens} tokens, {layers} layers of {job.config.num_heads} heads"
    forwards = "one forward a step" if job.num_branches == 1 else "two forwards a step"
    lines = [
        f"{job.facts.title} ({job.name}): {clip}",
        f"{job.steps} steps, {guidance}, {forwards}; {source['device']}, {dtype.name}",
        "dense attention" if job.masks is None else f"masks: {job.masks.describe()}",
    ]
    if (kept := _generate_run.mask_bytes(job)) > 0:
        lines.append(f"masks that are kept take {_generate_progress.bytes_text(kept)}")
    return "\n".join(lines)


def settings(job: GenerateJob, stage: Stage) -> dict[str, Any]:
    """What the run is, as JSON holds it: also kept beside latents."""
    return {
        "model": job.name,
        "family": job.facts.family,
        "random_weights": job.random is not None,
        "dtype": stage.dtype.name,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "frames": job.frames,
        "height": job.size[0],
        "width": job.size[1],
        "grid": list(job.grid),
        "tokens": _generate_run.num_tokens(job),
        "layers": job.config.num_attentions,
        "heads": job.config.num_heads,
        "head_dim": job.config.head_dim,
        "steps": job.steps,
        "guidance": job.guidance,
        "forwards_per_step": job.num_branches,
        "branch_guidance": job.branch_guidance,
        "scheduler": {"name": type(stage.scheduler).__name__, **dataclasses.asdict(stage.scheduler)},
        "seed": job.seed,
        "match_diffusers_bf16": job.match_diffusers_bf16,
        "masks": None if job.masks is None else dataclasses.asdict(job.masks),
        "kept_mask_bytes": _generate_run.mask_bytes(job),
        "implementation": _generate_run.implementations(job, stage.dtype),
    }


def report(
    job: GenerateJob,
    args: argparse.Namespace,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    runs: Sequence[Denoised],
    clips: Sequence[np.ndarray],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything there is to say about the runs.

    Args:
        job: What was asked for.
        args: The options as given.
        source: Device, versions, commit, date.
        settings: What `settings` gave.
        runs: The run, and the dense one of a comparison.
        clips: Their frames, where they were decoded.
        seconds: Of the stages.
    """
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    made = {
        **source,
        "options": {name: value for name, value in options.items() if value not in (None, False)},
        "settings": dict(settings),
        "seconds": dict(seconds),
        "runs": {run.title: _run(run) for run in runs},
        "peak_host_bytes": _generate_run.peak_host_bytes(),
    }
    if job.compare_dense:
        made["comparison"] = _comparison(runs[0], runs[1], clips)
    return made


def _run(run: Denoised) -> dict[str, Any]:
    cached = [step for step, kind in enumerate(run.kinds) if kind == "cached"]
    by_kind: dict[str, list[float]] = {}
    for kind, second in zip(run.kinds, run.step_seconds, strict=True):
        by_kind.setdefault(kind, []).append(second)
    return {
        "steps": [
            {"step": step, "kind": kind, "density": float(run.density[step].mean()), "seconds": run.step_seconds[step]}
            for step, kind in enumerate(run.kinds)
        ],
        "density_by_step_and_layer": np.round(run.density, 5).tolist(),
        "density_of_cached_steps": float(run.density[cached].mean()) if cached else None,
        "density": float(run.density.mean()),
        "median_seconds_by_kind": {kind: float(np.median(times)) for kind, times in by_kind.items()},
        "first_step_compiled": run.first_step_compiled,
        "seconds_of_steps": sum(run.step_seconds),
        "seconds": run.seconds,
        "peak_device_bytes": run.peak_bytes,
    }


def _comparison(run: Denoised, dense: Denoised, clips: Sequence[np.ndarray]) -> dict[str, Any]:
    error = np.linalg.norm(run.latents - dense.latents) / np.linalg.norm(dense.latents)
    made: dict[str, Any] = {
        "speed_of_steps": sum(dense.step_seconds) / sum(run.step_seconds),
        "latents_relative_error": float(error),
    }
    if len(clips) != 2:
        return made
    quality = frames.frame_quality(clips[0], clips[1])
    made |= _frame_values("psnr", quality.psnr, best=max) | _frame_values("ssim", quality.ssim, best=max)
    reason = frames.lpips_reason()
    if reason is None:
        made |= _frame_values("lpips", frames.frame_lpips(clips[0], clips[1]), best=min)
    else:
        made["lpips_left_out"] = reason
    return made


def _frame_values(name: str, values: np.ndarray, *, best: Any) -> dict[str, Any]:
    """Mean, worst and all; an infinite PSNR (equal frames) is None, as JSON has no infinity."""

    def number(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    worst = values.min() if best is max else values.max()
    return {
        f"{name}_mean": number(values.mean()),
        f"{name}_worst": number(worst),
        f"{name}_by_frame": [number(value) for value in values],
    }


def print_tables(report: Mapping[str, Any]) -> None:
    """Print steps, times, memory and, after a comparison, quality."""
    lines = []
    for title, run in report["runs"].items():
        for span in _spans(run["steps"]):
            first, last = span[0]["step"], span[-1]["step"]
            mean = sum(step["seconds"] for step in span) / len(span)
            density = sum(step["density"] for step in span) / len(span)
            name = str(first) if first == last else f"{first} .. {last}"
            lines.append([title, name, span[0]["kind"], f"{density:.3f}", f"{mean:.3f}"])
    print()
    print(tables.format_text(["run", "steps", "kind", "density", "seconds per step"], lines))
    print()
    for title, run in report["runs"].items():
        where = (
            ""
            if run["peak_device_bytes"] is None
            else f", device memory so far {_generate_progress.bytes_text(run['peak_device_bytes'])}"
        )
        compiled = " (the first one compiled)" if run["first_step_compiled"] else ""
        print(
            f"{title}: {run['seconds_of_steps']:.1f} s of steps{compiled}, {run['seconds']:.1f} s in all, density "
            f"{run['density']:.3f} over all steps{where}"
        )
    implementation = report["settings"]["implementation"]
    print("; ".join(f"{name} attention runs as {text}" for name, text in implementation.items()))
    print("seconds by stage: " + ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items()))
    if "comparison" in report:
        _print_comparison(report["comparison"])


def _print_comparison(comparison: Mapping[str, Any]) -> None:
    if "psnr_by_frame" in comparison:
        names = [name for name in ("psnr", "ssim", "lpips") if f"{name}_by_frame" in comparison]
        lines = [
            [number, *(_value(comparison[f"{name}_by_frame"][number]) for name in names)]
            for number in range(len(comparison["psnr_by_frame"]))
        ]
        for label in ("mean", "worst"):
            lines.append([label, *(_value(comparison[f"{name}_{label}"]) for name in names)])
        print("\nframes against those of the dense run, from the same noise (agreement, not beauty)")
        print(tables.format_text(["frame", *(name.upper() for name in names)], lines))
        if "lpips_left_out" in comparison:
            print(f"LPIPS is left out: {comparison['lpips_left_out']}")
    print(
        f"against dense: {comparison['speed_of_steps']:.2f} times as fast, latents differ by "
        f"{comparison['latents_relative_error']:.2e} of their norm"
    )


def _value(value: float | None) -> str:
    return "equal" if value is None else f"{value:.4f}"


def _spans(steps: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Neighbouring steps of one kind."""
    spans: list[list[Mapping[str, Any]]] = []
    for step in steps:
        if not spans or spans[-1][-1]["kind"] != step["kind"]:
            spans.append([])
        spans[-1].append(step)
    return spans


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report in one move."""
    tables.write_text(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
