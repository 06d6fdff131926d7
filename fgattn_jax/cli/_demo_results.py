"""Figures of `fgattn demo`: one JSON object, and the tables on the screen that are made from it."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from fgattn_jax.cli._demo_run import AttentionTimes, DemoRun
from fgattn_jax.evaluation.tables import format_text


def results(
    args: argparse.Namespace, source: dict[str, str], dense: DemoRun, sparse: DemoRun, times: AttentionTimes
) -> dict[str, Any]:
    """What goes into metrics.json, but for the quality.

    Args:
        args: Options of the command.
        source: Device, versions, commit, date.
        dense: The dense run.
        sparse: The run with masks.
        times: Of attention alone.
    """
    cached = [step for step, kind in enumerate(sparse.kinds) if kind == "cached"]
    under_masks = sparse.density[cached] if cached else np.full((1, sparse.density.shape[1]), np.nan)
    counts = {step: np.asarray(mask.counts()) for step, mask in sparse.masks.items()}
    num_keys = next(iter(sparse.masks.values())).num_keys
    layers = []
    for layer in range(sparse.density.shape[1]):
        row = {"layer": layer, "density": _number(under_masks[:, layer].mean())}
        for step, count in counts.items():
            row[f"masks_of_step_{step}"] = float(count[layer].mean()) / num_keys
        latest = counts[max(counts)][layer]
        row |= {"least_keys": int(latest.min()), "most_keys": int(latest.max())}
        layers.append(row)
    return {
        **source,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "density": _number(under_masks.mean()),
        "work": float(sparse.density.mean()),
        "steps_run": [
            {
                "step": step,
                "kind": kind,
                "density": float(sparse.density[step].mean()),
                "seconds": sparse.step_seconds[step],
            }
            for step, kind in enumerate(sparse.kinds)
        ],
        "density_by_step_and_layer": sparse.density.tolist(),
        "layers": layers,
        "seconds": {
            "dense": {"attention": times.dense, "masks": 0.0, "all": dense.seconds, "compile": dense.compile_seconds},
            "sparse": {
                "attention": times.sparse,
                "masks": times.predict,
                "all": sparse.seconds,
                "compile": sparse.compile_seconds,
            },
        },
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def print_tables(results: dict[str, Any]) -> None:
    """Print densities by layer and step, times, implementations and quality."""
    made = [name for name in results["layers"][0] if name.startswith("masks_of_step_")]
    lines = [
        [str(row["layer"]), *(f"{row[name]:.3f}" for name in made), f"{row['least_keys']} .. {row['most_keys']}"]
        for row in results["layers"]
    ]
    header = ["layer", *(f"masks of step {name.rsplit('_', 1)[1]}" for name in made), "keys per row, last masks"]
    print("\ndensity of the masks by layer")
    print(format_text(header, lines))

    lines, first = [], 0
    steps = results["steps_run"]
    for number, entry in enumerate(steps):
        following = steps[number + 1] if number + 1 < len(steps) else None
        if following is None or (following["kind"], following["density"]) != (entry["kind"], entry["density"]):
            span = steps[first : number + 1]
            name = str(first) if first == number else f"{first} .. {number}"
            mean = sum(part["seconds"] for part in span) / len(span)
            lines.append([name, entry["kind"], f"{entry['density']:.3f}", f"{mean:.3f}"])
            first = number + 1
    print("\ndensity by step (refresh steps run dense and make masks)")
    print(format_text(["steps", "kind", "density", "seconds per step"], lines))

    seconds = results["seconds"]
    lines = [
        [name, *(f"{seconds[name][part]:.2f}" for part in ("attention", "masks", "all", "compile"))]
        for name in ("dense", "sparse")
    ]
    print("\nseconds of a run (attention and making masks: timed alone on the run's shapes and masks, times the calls)")
    print(format_text(["run", "attention", "making masks", "all", "compile, apart"], lines))
    for name in ("dense", "sparse"):
        print(f"{name} attention runs as {results['implementation'][name]}")

    quality = (
        "identical clips" if results["psnr"] is None else f"PSNR {results['psnr']:.1f} dB, SSIM {results['ssim']:.4f}"
    )
    density = "no step ran under masks" if results["density"] is None else f"density {results['density']:.3f}"
    print(
        f"\nsparse against dense: {quality}; {density} at steps under masks, {results['work']:.3f} over all steps "
        f"(dense and refresh steps count 1)"
    )
