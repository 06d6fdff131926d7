"""Figures of the model card from a run's files: `python -m fgattn_jax.models.dit.card --help`."""

import argparse
import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from fgattn_jax.models.dit.config import DiTConfig
from fgattn_jax.models.dit.model import num_parameters
from fgattn_jax.models.dit.weights import PRETRAINED, load_weights

BEGIN, END = "<!-- facts: begin -->", "<!-- facts: end -->"
"""What stands between these lines of the model card is generated."""


def read_log(path: pathlib.Path) -> dict[str, Any]:
    """Read the `log.json` of a training run.

    Raises:
        ValueError: the file is missing or is no such log.
    """
    try:
        log = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"Training log {str(path)!r} cannot be read: {error}.") from error
    missing = {"curve", "validation", "seconds", "total_steps", "device", "command"} - set(log)
    if missing:
        raise ValueError(f"{str(path)!r} is no training log: it lacks {sorted(missing)}.")
    return log


def facts_table(log: dict[str, Any], weights: pathlib.Path) -> str:
    """The generated part of the model card, as a Markdown table.

    Args:
        log: from `read_log`.
        weights: the file of the averaged parameters.

    Raises:
        ValueError: the weights cannot be read.
    """
    model, _ = load_weights(weights)
    last = [loss for _, loss in log["curve"][-50:]]
    train, config = log["config"], model.config
    clips = log["total_steps"] * train["batch"] * (1 - 0.5 / train["long_every"] if train["long_every"] else 1)
    rows = {
        "parameters": f"{num_parameters(model):,}",
        "file": f"`{weights.name}`, {weights.stat().st_size / 1e6:.1f} MB, 16-bit (bfloat16)",
        "SHA-256": f"`{hashlib.sha256(weights.read_bytes()).hexdigest()}`",
        "steps": f"{log['total_steps']:,} ({clips:,.0f} clips)",
        "seconds": f"{log['seconds']:,.0f}, compilation, validation and checkpoints included",
        "device": f"one {log['device']}, jax {log['jax']}, {log['dtype']} products, float32 parameters",
        "loss": f"{sum(last) / len(last):.4f} (training, mean of the last {len(last)} entries of the log), "
        f"{log['validation'][-1][1]:.4f} (held-out frames, averaged weights, times spread evenly)",
        "tokens": f"{_tokens(config, 1):,} for {config.num_frames} frames, {_tokens(config, 2):,} for twice as many",
        "commit": f"`{log.get('commit') or 'not noted'}`",
        "command": f"`{log['command']}`",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def insert_facts(card: str, table: str) -> str:
    """Replace what stands between the marks of a model card.

    Raises:
        ValueError: the card lacks a mark.
    """
    if card.count(BEGIN) != 1 or card.count(END) != 1:
        raise ValueError(f"The model card must hold the lines {BEGIN!r} and {END!r} once each.")
    before, rest = card.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def plot_loss(log: dict[str, Any], path: pathlib.Path) -> None:
    """Write the loss curve of a run as a PNG. Needs matplotlib (extra `demo`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*log["curve"], strict=True), linewidth=0.6, label="training (chunks of steps)")
    axes.plot(
        *zip(*log["validation"], strict=True), marker="o", markersize=3, label="held-out frames, averaged weights"
    )
    axes.set(xlabel="step", ylabel="velocity error (mean square)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: draw the loss curve and renew the generated part of the card."""
    parser = argparse.ArgumentParser(
        prog="python -m fgattn_jax.models.dit.card",
        description="Draw the loss curve of a training run and write its facts into a model card.",
    )
    package = pathlib.Path(str(importlib.resources.files("fgattn_jax.models.dit")))
    parser.add_argument("--log", type=pathlib.Path, default=package / "weights" / "training_log.json", help="log.json")
    parser.add_argument(
        "--weights", type=pathlib.Path, default=package / "weights" / PRETRAINED, help="averaged weights"
    )
    parser.add_argument("--card", type=pathlib.Path, default=package / "MODEL_CARD.md", help="card to renew")
    parser.add_argument("--plot", type=pathlib.Path, default=package / "images" / "loss_curve.png", help="PNG to write")
    options = parser.parse_args(arguments)
    log = read_log(options.log)
    options.card.write_text(insert_facts(options.card.read_text(), facts_table(log, options.weights)))
    plot_loss(log, options.plot)
    print(f"wrote {options.plot.name} and the facts in {options.card.name}")


def _tokens(config: DiTConfig, times: int) -> int:
    frames, rows, columns = config.grid(times * config.num_frames, config.height, config.width_pixels)
    return frames * rows * columns


if __name__ == "__main__":
    main()
