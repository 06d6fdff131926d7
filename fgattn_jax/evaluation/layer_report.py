"""Tables and pictures of one attention layer per denoising step, from the rows of `fgattn bench --layer` only."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgattn_jax.evaluation.tables import Row, format_markdown, format_text

_PARTS = {
    "dense": ("#0072b2", "dense attention (refresh steps of exact masks: with LSE)"),
    "mask": ("#e69f00", "mask making"),
    "order": ("#cc79a7", "work order"),
    "sparse": ("#009e73", "sparse attention"),
}
"""Colour (Okabe-Ito: told apart by colour-blind readers) and label of every part of a bar."""

_PHASES = ("dense", "lse", "mask", "order", "sparse", "step")

_EXPLANATION = (
    "One attention layer of a model, batch 1, on smooth random fields with three-axis rotary embedding: sharp enough "
    "that the masks of each predictor have the density shown. Attention, dense and sparse, passed the float64 oracle "
    "on these inputs. Times are medians; *a step* is the mean over the denoising steps, with a new mask every so many "
    "of them. At a refresh step, exact predictors run dense attention with its LSE, whose output is the layer's, and "
    "then make the mask; mean-query masks are made before sparse attention. The mask *pays after* so many uses: (mask "
    "+ what the LSE costs beyond dense) / (dense - order - sparse). The *order* of work is made at every use, by a "
    "kernel where `cuda` runs and inside the sparse call elsewhere. The *model* is a step of all heads, layers and "
    "forwards, by multiplication."
)


def picture_name(device: str) -> str:
    """File name of a device's picture."""
    words = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    return f"layer_{words}.png"


def _by_device(rows: Sequence[Row]) -> dict[str, list[Row]]:
    devices: dict[str, list[Row]] = {}
    for row in rows:
        devices.setdefault(row["device"], []).append(row)
    return devices


def _layer_name(row: Row) -> str:
    heads = "" if row["heads_measured"] == row["heads"] else f", {row['heads_measured']} of {row['heads']} heads"
    return f"{row['case']}{heads}"


def pays_after(row: Row) -> str:
    """Uses after which a mask has paid, in words."""
    uses = row["break_even_uses"]
    if uses is None:
        return "never: sparse is not faster"
    whole = max(1, math.ceil(uses))
    return "1 use" if whole == 1 else f"{whole} uses"


def _refreshes(row: Row) -> str:
    return f"every {row['refresh_every']} of {row['steps']} steps"


def _time(row: Row, name: str) -> str:
    value = row.get(f"{name}_ms")
    if value is None:
        return "in sparse" if name == "order" else "-"
    return f"{value:.4g}"


def _model_seconds(row: Row) -> str:
    return f"{row['model_step_ms'] / 1e3:.3g} ({row['model_dense_ms'] / 1e3:.3g})"


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 2**10:.3g} KiB"


def time_table(rows: Sequence[Row]) -> str:
    """Times of the phases, of a step, and of the whole model, in Markdown."""
    header = ["layer", "masks", "density", "dense, ms", "dense + LSE", "mask", "order", "sparse", "a step", "speed"]
    header += ["pays after", "model, s per step (dense)"]
    lines = [
        [
            _layer_name(row),
            f"{row['predictor']}, {row['rule']}, M={row['query_block']}, {_refreshes(row)}",
            f"{row['density']:.3f}",
            *(_time(row, name) for name in _PHASES),
            f"{row['speed']:.2f}x",
            pays_after(row),
            _model_seconds(row),
        ]
        for row in rows
    ]
    return format_markdown(header, lines)


def memory_table(rows: Sequence[Row]) -> str:
    """Bytes of the programs and of the cached masks, in Markdown."""
    header = ["layer", "masks", "dense", "dense + LSE", "mask making", "sparse", "device peak", "cached mask, layer"]
    header += ["cached masks, model"]
    cells = ("dense", "lse", "mask", "sparse", "device_peak", "cached_layer", "cached_model")
    lines = [
        [_layer_name(row), f"{row['predictor']}, M={row['query_block']}", *(_bytes(row[f"{c}_bytes"]) for c in cells)]
        for row in rows
    ]
    return format_markdown(header, lines)


def text_table(rows: Sequence[Row]) -> str:
    """Times of the rows of a run and the size of their masks, for a terminal."""
    header = [
        "masks",
        "density",
        "dense, ms",
        "dense + LSE",
        "mask",
        "order",
        "sparse",
        "a step",
        "speed",
        "pays after",
    ]
    header += ["model, s (dense)", "cached masks"]
    lines = [
        [
            f"{row['predictor']}, {row['rule']}",
            f"{row['density']:.3f}",
            *(_time(row, name) for name in _PHASES),
            f"{row['speed']:.2f}x",
            pays_after(row),
            _model_seconds(row),
            _bytes(row["cached_model_bytes"]),
        ]
        for row in rows
    ]
    first = rows[0]
    return (
        f"{_layer_name(first)}: a step is the mean of {first['steps']} with new masks every {first['refresh_every']}; "
        f"the model is {first['layers']} layers x {first['branches']} forwards x {first['heads']} heads\n\n"
        f"{format_text(header, lines)}"
    )


def short_table(rows: Sequence[Row]) -> str:
    """What the README shows, in Markdown."""
    header = ["layer", "masks", "density", "dense, ms", "a step, ms", "speed", "pays after"]
    lines = [
        [
            _layer_name(row),
            f"{row['predictor']}, {_refreshes(row)}",
            f"{row['density']:.3f}",
            _time(row, "dense"),
            _time(row, "step"),
            f"{row['speed']:.2f}x",
            pays_after(row),
        ]
        for row in rows
    ]
    return format_markdown(header, lines)


def _sources(rows: Sequence[Row]) -> str:
    names = {
        f"commit {row['commit']}, {row['date']}, jax {row['jax']}, `{row['implementation']}`, {row['dtype']}, "
        f"masks made by {row['mask_made']}, `{row['command']}`, {row['rounds']} rounds": None
        for row in rows
    }
    return "; ".join(names)


def _spread(rows: Sequence[Row]) -> float:
    """The largest 90th percentile over the median, of any phase."""
    return max(
        row[f"{name}_ms_p90"] / row[f"{name}_ms"]
        for row in rows
        for name in ("dense", "lse", "mask", "order", "sparse")
        if row.get(f"{name}_ms")
    )


def _faster_dense(rows: Sequence[Row]) -> list[str]:
    """A sentence where dense attention with its LSE, by another kernel, beats the dense call of the table."""
    shares = [1 - row["lse_ms"] / row["dense_ms"] for row in rows if row.get("lse_ms")]
    if max(shares, default=0.0) <= 0:
        return []
    less = f"takes up to {100 * max(shares):.0f} % less; against it speeds are so much lower."
    first = "Speeds are against the dense call without an LSE. Dense attention with its LSE runs by another kernel and"
    return [f"{first} {less}"]


def section(rows: Sequence[Row], images: str) -> str:
    """The section of docs/benchmarks.md.

    Args:
        rows: Rows of bench "layer", of all devices.
        images: Path of the pictures' folder, as links have it.
    """
    parts = ["## One layer, step by step", _EXPLANATION]
    for device, members in _by_device(rows).items():
        parts += [
            f"### {device}",
            f"From {_sources(members)}. In nine rounds of ten phases took at most {_spread(members):.2f} x the median.",
            f"![One attention layer per denoising step on {device}]({images}/{picture_name(device)})",
            time_table(members),
            *_faster_dense(members),
        ]
        peers = {_layer_name(row): row["jax_nn_cudnn_ms"] for row in members if row.get("jax_nn_cudnn_ms") is not None}
        if peers:
            said = "; ".join(f"{name}: {ms:.4g} ms" for name, ms in peers.items())
            parts.append(f"Dense by `jax.nn.dot_product_attention(implementation='cudnn')`: {said}.")
        memory = (
            "Memory: arguments, results and temporaries of each program as compiled; the most that the device held in "
            "the whole run, where it says so; masks as `MaskCache` holds them, for all heads, layers and forwards."
        )
        parts += [memory, memory_table(members)]
    return "\n\n".join(parts)


def readme_part(rows: Sequence[Row]) -> list[str]:
    """Tables for the README, one per device."""
    return [
        f"One attention layer per denoising step, mask making included, on {device} "
        + "\n\n".join(
            [
                "([phases, memory, picture](docs/benchmarks.md#one-layer-step-by-step)):",
                short_table(members),
                *_faster_dense(members),
            ]
        )
        for device, members in _by_device(rows).items()
    ]


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the picture of every device.

    Raises:
        ValueError: matplotlib is missing.
    """
    paths = []
    for device, members in _by_device(rows).items():
        paths.append(folder / picture_name(device))
        draw(members, paths[-1])
    return paths


def require_matplotlib() -> None:
    """Say so before minutes of measuring, not after them.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "The picture of the layer needs matplotlib: pip install 'fgattn-jax[demo]', or give `--rows-only`"
        ) from error


def _panels(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that share a dense time: one layer of one run."""
    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        panels.setdefault((_layer_name(row), row["implementation"], row["dense_ms"]), []).append(row)
    return list(panels.values())


def draw(rows: Sequence[Row], path: Path) -> None:
    """Stacked bars: a step of one layer under each predictor, beside dense attention; one panel per layer.

    Args:
        rows: Rows of one device.
        path: PNG to write.

    Raises:
        ValueError: There are no rows, or matplotlib is missing.
    """
    if not rows:
        raise ValueError("expected rows of `fgattn bench --layer` to draw, got none")
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(rows)
    heights = [len(panel) + 2.8 for panel in panels]
    figure = Figure(figsize=(9.5, 1.1 + 0.42 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel)
    all_axes[-1].set_xlabel("ms per denoising step of one layer, mean over the steps")
    has_order = any(row["step_order_ms"] > 0 for row in rows)
    shown = {part: look for part, look in _PARTS.items() if part != "order" or has_order}
    if not has_order:
        shown["sparse"] = (shown["sparse"][0], f"{shown['sparse'][1]}, order of work inside")
    handles = [_patch(colour, label) for colour, label in shown.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle(f"One attention layer per denoising step: {rows[0]['device']}", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No software version in the file: equal rows give equal bytes.
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _draw_panel(axes: Any, panel: Sequence[Row]) -> None:
    first = panel[0]
    names = ["dense at every step"] + [f"{row['predictor']}, density {row['density']:.2f}" for row in panel]
    totals = [first["dense_ms"]] + [row["step_ms"] for row in panel]
    left = [0.0] * len(names)
    for part, (colour, _) in _PARTS.items():
        own = [first["dense_ms"] if part == "dense" else 0.0] + [row[f"step_{part}_ms"] for row in panel]
        axes.barh(range(len(names)), own, left=left, color=colour, height=0.7)
        left = [a + b for a, b in zip(left, own, strict=True)]
    speeds = ["", *(f"  ({row['speed']:.2f}x)" for row in panel)]
    for place, (total, speed) in enumerate(zip(totals, speeds, strict=True)):
        axes.annotate(f" {total:.4g} ms{speed}", (left[place], place), va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(totals))  # room for the figures behind the bars
    axes.set_title(
        f"{_layer_name(first)}\n{first['queries']} tokens, M={first['query_block']}, {first['implementation']} in "
        f"{first['dtype']}, new masks every {first['refresh_every']} of {first['steps']} steps",
        fontsize=9,
        loc="left",
    )
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, label=label)
