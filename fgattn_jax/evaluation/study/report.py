"""docs/study.md from data rows: every number in it is a cell of a row or computed from cells here."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from fgattn_jax.evaluation.study import plots, report_masks
from fgattn_jax.evaluation.study.report_masks import of_section, quality_table
from fgattn_jax.evaluation.tables import Row, format_markdown

_HEAD = """\
# Study: what can be skipped, when, and what it costs

Written by `fgattn study` from the data rows in `{rows}`; do not edit. Model: the shipped video DiT
([model card](../models/dit/MODEL_CARD.md)). {provenance}

How it was measured, unless a section says otherwise: {steps} Euler steps without guidance; {clips} clips (every class
with {seeds} seeds of noise), each compared with the dense run of the same noise. *Density* is the share of slices kept,
mean over layers, heads, rows and the steps that ran under masks; *work* also counts dense and refresh steps, as 1. PSNR
and SSIM compare clips clipped to [-1, 1] (range 2); SSIM uses a Gaussian window of 11 x 11 pixels and sigma 1.5, as
scikit-image does with `gaussian_weights=True, use_sample_covariance=False`. *Worst* is the worst clip. Cached masks are
made at step 0 and again in the middle of the run; refresh steps run dense. Quality is measured with a dense masked
softmax, so that a whole sweep is one compiled program; the last section compares it with `fgattn_jax.attention`.
"""


def render(rows: Sequence[Row], path: Path, *, rows_name: str, images: Path) -> None:
    """Write the report and its plots.

    Args:
        rows: Data rows of any sections; sections without rows are left out.
        path: Markdown file to write.
        rows_name: How the report names the file of the rows.
        images: Folder of the plots, beside or below the report.

    Raises:
        ValueError: There are no rows, or matplotlib is missing.
    """
    if not rows:
        raise ValueError("expected data rows to render, got none: measure first (`fgattn study --rows-only`)")
    parts = [_head(rows, rows_name), *_summary(rows)]
    link = f"{images.name}/" if images.parent == path.parent else ""
    for section, render_section in _RENDERERS.items():
        own = of_section(rows, section)
        if own:
            parts.append(render_section(own, images, link))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n")


def _head(rows: Sequence[Row], rows_name: str) -> str:
    quality = [row for row in rows if "clips" in row and "psnr" in row] or [row for row in rows if "clips" in row]
    steps = {row["steps"] for row in of_section(rows, "thresholds")} or {row["steps"] for row in rows if "steps" in row}
    clips = {row["clips"] for row in quality} or {0}
    labels = max((sum(name.startswith("psnr_") for name in row) - 1 for row in quality), default=0)
    machines = sorted({f"{row['device']}, jax {row['jax']}, commit {row['commit']}, {row['date']}" for row in rows})
    commands = sorted({f"`{row['command']}`" for row in rows})
    return _HEAD.format(
        rows=rows_name,
        provenance=f"Measured on {'; '.join(machines)}: {'; '.join(commands)}.",
        steps=" and ".join(str(number) for number in sorted(steps)),
        clips=" or ".join(str(number) for number in sorted(clips)),
        seeds=max(clips) // labels if labels else "several",
    )


def _summary(rows: Sequence[Row]) -> list[str]:
    """The quality bar, and what cached exact-mass masks of 64 queries in cube order reached."""
    candidates = [
        row
        for row in rows
        if row.get("section") != "check"
        and row.get("statistic") == "mass"
        and row.get("order") == "cubes"
        and row.get("query_block") == 64
        and row.get("steps") == 30
        and row.get("dense_at_refresh")
        and row.get("refresh_every") != 1
        and row.get("density") is not None
        and "psnr" in row
    ]
    if not candidates:
        return []
    lines = []
    for most, decibels in plots.BARS:
        reached = [row for row in candidates if row["density"] <= most]
        best = max(reached, key=lambda row: row["psnr"], default=None)
        cheapest = min(
            (row for row in candidates if row["psnr"] >= decibels), key=lambda row: row["density"], default=None
        )
        lines.append(
            [
                f"density <= {most:g} at >= {decibels:g} dB",
                "reached" if best is not None and best["psnr"] >= decibels else "not reached",
                _describe(best),
                _describe(cheapest),
            ]
        )
    header = ["Bar", "Verdict", "Best PSNR within the density", "Lowest density at the PSNR"]
    return [
        "## The bar\n\nCached exact-mass masks, 64 queries per slice, cubes, 30 Euler steps; mean over clips.\n\n"
        + format_markdown(header, lines)
    ]


def _describe(row: Row | None) -> str:
    if row is None:
        return "none measured"
    every = "once" if row["refresh_every"] is None else f"every {row['refresh_every']}"
    first = f", first {row['dense_first']} steps dense" if row["dense_first"] else ""
    return (
        f"density {row['density']:.3f}, {row['psnr']:.1f} dB (worst {row['psnr_least']:.1f}), work {row['work']:.3f}: "
        f"share {row['value']:g}, {row['tokens']} tokens, refresh {every}{first}"
    )


def _thresholds(rows: Sequence[Row], images: Path, link: str) -> str:
    mass = [row for row in rows if row["statistic"] == "mass"]
    peak = [row for row in rows if row["statistic"] == "peak"]
    curves = [("exact mass, share", mass), ("exact peak, threshold c/S", peak)]
    plots.quality_curves(images / "study_thresholds.png", curves, title="Cached masks, cubes, M = 64", bars=True)
    return (
        "## Thresholds\n\nCached masks over the share of the mass that is kept, and over the threshold `c / S` on the "
        f"largest probability of a slice (FG-Attn's rule; its default is 0.5).\n\n![PSNR over density]({link}"
        "study_thresholds.png)\n\n"
        + quality_table("share of the mass", mass)
        + "\n\n"
        + quality_table("threshold c", peak)
    )


def _refresh(rows: Sequence[Row], images: Path, link: str) -> str:
    plain = [row for row in rows if not row["dense_first"]]
    panels = []
    for statistic, what in (("mass", "exact mass 0.95"), ("peak", "exact peak 0.5/S")):
        points = sorted(
            (row["refresh_every"] or row["steps"], row["psnr"], row["psnr_least"])
            for row in plain
            if row["statistic"] == statistic and row["density"] is not None
        )
        if points:
            periods, psnr, least = (list(part) for part in zip(*points, strict=True))
            panels.append((what, [("mean", periods, psnr), ("worst clip", periods, least)]))
    text = (
        "## Refresh\n\nHow many steps masks are kept. Period 1 is dense at every step: exact masks are made from dense "
        "scores."
    )
    if panels:
        plots.lines(
            images / "study_refresh.png", panels, x_label="steps between refreshes", y_label="PSNR (dB)", y_limits=None
        )
        text += f"\n\n![PSNR over refresh periods]({link}study_refresh.png)"

    def period(row: Row) -> str:
        return "once" if row["refresh_every"] is None else f"every {row['refresh_every']}"

    for statistic, what in (("mass", "exact mass 0.95"), ("peak", "exact peak 0.5/S")):
        chosen = [row for row in plain if row["statistic"] == statistic]
        if chosen:
            text += "\n\n" + quality_table(what, chosen, key=period, sort=False)
    late = [row for row in rows if row["dense_first"]]
    if late:
        late = sorted(late, key=lambda row: (row["value"], row["refresh_every"] or 99, row["dense_first"]))
        text += "\n\nMasks made later, after some dense steps (share of the mass, refresh, dense steps):\n\n"
        text += quality_table(
            "setting", late, key=lambda row: f"{row['value']:g}, {period(row)}, {row['dense_first']}", sort=False
        )
    return text


def _orders(rows: Sequence[Row], images: Path, link: str) -> str:
    names = list(dict.fromkeys(row["order"] for row in rows))
    curves = [(name, [row for row in rows if row["order"] == name]) for name in names]
    plots.quality_curves(images / "study_orders.png", curves, title="Query orders, exact mass, M = 64", bars=True)
    densities = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
    lines = [[f"{target:g}", *(interpolate(own, target) for _, own in curves)] for target in densities]
    return (
        "## Query orders\n\nThe same rule with rows of queries that are neighbours in the clip in different ways. Keys "
        "stay where they are: an order costs nothing at run time. PSNR (dB) at equal density, by straight lines "
        "between measured points; empty where the density was not reached.\n\n"
        + format_markdown(["density", *names], lines)
        + f"\n\n![PSNR over density by query order]({link}study_orders.png)\n\n"
        + quality_table("order, share", rows, key=lambda row: f"{row['order']}, {row['value']:g}", sort=False)
    )


def interpolate(rows: Sequence[Row], density: float) -> float | None:
    """PSNR at a density, by a straight line between the two nearest measured densities; None outside them."""
    points = sorted((row["density"], row["psnr"]) for row in rows)
    for (low, psnr_low), (high, psnr_high) in itertools.pairwise(points):
        if low <= density <= high:
            share = 0.0 if high == low else (density - low) / (high - low)
            return round(psnr_low + share * (psnr_high - psnr_low), 1)
    return None


def _mean_query(rows: Sequence[Row], images: Path, link: str) -> str:
    every_step = [row for row in rows if not row["dense_at_refresh"]]
    cached = [row for row in rows if row["dense_at_refresh"]]
    curves = [
        (f"{name}, {what}", [row for row in own if row["rule"] == rule])
        for name, own in (("every step", every_step), ("cached", cached))
        for rule, what in (("top_p", "share"), ("threshold", "threshold"))
    ]
    plots.quality_curves(images / "study_mean_query.png", curves, title="Mean-query masks, cubes, M = 64")

    def name(row: Row) -> str:
        return f"share {row['value']:g}" if row["rule"] == "top_p" else f"threshold {row['value']:g}/S"

    return (
        "## Mean-query masks\n\nEvery key scored against the mean of a row's queries: cheap enough to be made at every "
        f"step and used at once, or cached as exact masks are.\n\n![PSNR over density]({link}study_mean_query.png)\n\n"
        + quality_table("every step", every_step, key=name, sort=False)
        + "\n\n"
        + quality_table("cached", cached, key=name, sort=False)
    )


def _sampling_steps(rows: Sequence[Row], images: Path, link: str) -> str:
    rows = sorted(rows, key=lambda row: (-row["steps"], row["value"], row["schedule"]))
    panels = []
    for theta in sorted({row["value"] for row in rows}):
        entries = []
        for schedule in dict.fromkeys(row["schedule"] for row in rows):
            points = [row for row in rows if row["schedule"] == schedule and row["value"] == theta]
            entries.append((schedule, [row["steps"] for row in points], [row["psnr"] for row in points]))
        panels.append((f"share {theta:g}", entries))
    plots.lines(
        images / "study_steps.png", panels, x_label="Euler steps of the run", y_label="PSNR (dB)", y_limits=None
    )
    return (
        "## Few sampling steps\n\nDoes caching survive few steps? Masks refreshed in the middle of the run (`half`), "
        "made once, or made at every step and used at once (exact masks used at once save no work: they only show what "
        f"staleness costs).\n\n![PSNR over sampling steps]({link}study_steps.png)\n\n"
        + quality_table(
            "steps, share, masks",
            rows,
            key=lambda row: f"{row['steps']}, {row['value']:g}, {row['schedule']}",
            sort=False,
        )
    )


def _block_sizes(rows: Sequence[Row], images: Path, link: str) -> str:
    sizes = sorted({row["query_block"] for row in rows})
    curves = [(f"M = {size}", [row for row in rows if row["query_block"] == size]) for size in sizes]
    plots.quality_curves(images / "study_block_sizes.png", curves, title="Queries per slice, exact mass, cubes")
    return (
        "## Queries per slice\n\nFiner slices keep less at equal quality; kernels prefer coarser ones.\n\n"
        f"![PSNR over density by queries per slice]({link}study_block_sizes.png)\n\n"
        + quality_table("M, share", rows, key=lambda row: f"{row['query_block']}, {row['value']:g}", sort=False)
    )


def _long_clips(rows: Sequence[Row], images: Path, link: str) -> str:
    tokens = sorted({row["tokens"] for row in rows})
    return (
        f"## Longer clips\n\nThe same weights and settings on clips of twice the length ({tokens[0]} tokens).\n\n"
        + quality_table("rule", rows, key=lambda row: f"{row['statistic']} {row['value']:g}", sort=False)
    )


_RENDERERS: dict[str, Callable[[Sequence[Row], Path, str], str]] = {
    "negligible": report_masks.negligible,
    "agreement": report_masks.agreement,
    "thresholds": _thresholds,
    "refresh": _refresh,
    "orders": _orders,
    "mean query": _mean_query,
    "sampling steps": _sampling_steps,
    "block sizes": _block_sizes,
    "long clips": _long_clips,
    "spread": report_masks.spread,
    "check": report_masks.check,
}
