"""Plots of the study, from data rows only; matplotlib (extra `demo`) is imported when one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fgattn_jax.evaluation.tables import Row

BARS: tuple[tuple[float, float], ...] = ((0.35, 35.0), (0.5, 45.0))
"""What cached exact-mass masks should reach: density at most the first at no less than the second, in decibels."""
_COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8e5ea2", "#e09f3e", "#555555", "#17a2a2", "#a0522d")


def quality_curves(
    path: Path, curves: Sequence[tuple[str, Sequence[Row]]], *, title: str, bars: bool = False, x: str = "density"
) -> None:
    """PSNR over density, one line per curve; a thin line goes to the least PSNR of any clip.

    Args:
        path: PNG to write.
        curves: Label and rows of every line.
        title: Of the plot.
        bars: Whether to mark `BARS`.
        x: Cell on the horizontal axis, "density" or "work".
    """
    figure, (axes,) = _figure(1)
    for (label, rows), colour in zip(curves, _COLOURS, strict=False):
        points = sorted((row[x], row["psnr"], row["psnr_least"]) for row in rows if row[x] is not None)
        if not points:
            continue
        density, psnr, least = np.array(points).T
        axes.plot(density, psnr, marker="o", markersize=4, color=colour, label=label)
        axes.plot(density, least, linewidth=0.8, linestyle=":", color=colour)
    if bars:
        for most, decibels in BARS:
            axes.plot([0, most], [decibels, decibels], color="black", linewidth=0.8)
            axes.plot([most, most], [decibels, decibels + 4], color="black", linewidth=0.8)
            axes.annotate(f"{decibels:g} dB at {most:g}", (0.01, decibels + 0.6), fontsize=8)
    axes.set(xlabel="density under masks" if x == "density" else "work (dense steps count 1)", ylabel="PSNR (dB)")
    axes.set(title=title, xlim=(0, 1))
    axes.legend(fontsize=8, title="mean; dotted: worst clip", title_fontsize=8)
    _save(figure, path)


def lines(
    path: Path,
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[float], Sequence[float]]]]],
    *,
    x_label: str,
    y_label: str,
    y_limits: tuple[float, float] | None = (0.0, 1.0),
) -> None:
    """Panels side by side, each with lines.

    Args:
        path: PNG to write.
        panels: Title and lines (label, x, y) of every panel.
        x_label: Of all panels.
        y_label: Of the first panel.
        y_limits: Of all panels; None fits the data.
    """
    figure, all_axes = _figure(len(panels))
    for axes, (title, entries) in zip(all_axes, panels, strict=True):
        for (label, xs, ys), colour in zip(entries, _COLOURS * 2, strict=False):
            style = "--" if label.startswith("random") else "-"
            axes.plot(xs, ys, style, marker="o", markersize=3, color=colour, label=label)
        axes.set(title=title, xlabel=x_label)
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        # Below the plot: lines fill all of it.
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    all_axes[0].set_ylabel(y_label)
    _save(figure, path)


def bars(
    path: Path, groups: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], *, title: str, y_label: str
) -> None:
    """Bars in groups, one bar per series; values from 0 to 1, written above the bars.

    Args:
        path: PNG to write.
        groups: Names of the groups.
        series: Label and one value per group.
        title: Of the plot.
        y_label: Of the vertical axis.
    """
    figure, (axes,) = _figure(1, width=8.5)
    width = 0.8 / len(series)
    for number, ((label, values), colour) in enumerate(zip(series, _COLOURS, strict=False)):
        places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
        drawn = axes.bar(places, values, width, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.set_xticks(np.arange(len(groups)), groups)
    axes.set(title=title, ylabel=y_label, ylim=(0, 1.05))
    axes.legend(fontsize=8)
    _save(figure, path)


def _figure(panels: int, width: float | None = None) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("The plots of the study need matplotlib: pip install 'fgattn-jax[demo]'") from error
    figure = Figure(figsize=(width or (6.5 if panels == 1 else 4.6 * panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes in all_axes:
        axes.grid(alpha=0.3)
    return figure, all_axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No software version in the file: equal rows give equal bytes.
    figure.savefig(path, dpi=100, metadata={"Software": None})
