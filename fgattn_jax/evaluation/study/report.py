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
made after {dense_first} dense steps and again half a run later; refresh steps run dense. Quality is measured with a
dense masked softmax, so that a whole sweep is one compiled program; the last section compares it with
`fgattn_jax.attention`.
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
    devices: dict[str, set[str]] = {}
    for row in rows:
        devices.setdefault(f"{row['device']}, jax {row['jax']}", set()).add(f"{row['date']}, commit {row['commit']}")
    machines = [f"{device} ({'; '.join(sorted(when))})" for device, when in sorted(devices.items())]
    commands = sorted({f"`{row['command']}`" for row in rows})
    return _HEAD.format(
        rows=rows_name,
        provenance=f"Measured on {'; '.join(machines)} by {'; '.join(commands)}.",
        steps=" and ".join(str(number) for number in sorted(steps)),
        clips=" or ".join(str(number) for number in sorted(clips)),
        dense_first=max((row["dense_first"] for row in of_section(rows, "thresholds")), default="a few"),
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
        and row.get("refresh_every") == 15
        and row.get("density") is not None
        and "psnr" in row
    ]
    if not candidates:
        return []
    lines = []
    for most, decibels in plots.BARS:
        for tokens in sorted({row["tokens"] for row in candidates}):
            for dense_first in sorted({row["dense_first"] for row in candidates}):
                setting = [row for row in candidates if (row["tokens"], row["dense_first"]) == (tokens, dense_first)]
                within = [row for row in setting if row["density"] <= most]
                best = max(within, key=lambda row: row["psnr"], default=None)
                if best is not None:
                    verdict = "reached" if best["psnr"] >= decibels else "not reached"
                    bar = f"density <= {most:g} at >= {decibels:g} dB"
                    lines.append([bar, str(tokens), str(dense_first), verdict, *_describe(best)])
    header = ["bar", "tokens", "dense first steps", "verdict", "share", "density", "work", "PSNR", "worst", "SSIM"]
    return [
        "## The bar\n\nCached exact-mass masks, 64 queries per slice, cubes, 30 Euler steps, refreshed after 15 steps; "
        "mean over clips. Shown is the measured share of the mass with the best PSNR within the density: share and "
        "number of dense first steps are picked on the clips that are reported, and no further seeds were run, so that "
        "a verdict that is reached narrowly may not hold on other noise.\n\n" + format_markdown(header, lines)
    ]


def _describe(row: Row) -> list[str]:
    numbers = [f"{row[name]:.3f}" for name in ("density", "work")]
    return [
        f"{row['value']:g}",
        *numbers,
        *(f"{row[name]:.1f}" for name in ("psnr", "psnr_least")),
        f"{row['ssim']:.4f}",
    ]


def _thresholds(rows: Sequence[Row], images: Path, link: str) -> str:
    names = {"mass": "exact mass, share", "peak": "exact peak, threshold c/S"}
    first = max(row["dense_first"] for row in rows)
    curves, tables = [], []
    for statistic, name in names.items():
        for dense_first in dict.fromkeys((first, 0)):
            own = [row for row in rows if row["statistic"] == statistic and row["dense_first"] == dense_first]
            if own:
                when = f"first {dense_first} steps dense" if dense_first else "masks from step 0"
                curves.append((f"{name}; {when}", own))
                column = "share" if statistic == "mass" else "c"
                tables.append(f"{name[0].upper()}{name[1:]}, {when}:\n\n{quality_table(column, own)}")
    plots.quality_curves(images / "study_thresholds.png", curves, title="Cached masks, cubes, M = 64", bars=True)
    return (
        "## Thresholds\n\nCached masks over the share of the mass that is kept, and over the threshold `c / S` on the "
        f"largest probability of a slice (FG-Attn's rule; its default is 0.5).\n\n![PSNR over density]({link}"
        "study_thresholds.png)\n\n" + "\n\n".join(tables)
    )


def _refresh(rows: Sequence[Row], images: Path, link: str) -> str:
    cases = []
    for statistic, what in (("mass", "exact mass 0.95"), ("peak", "exact peak 0.5/S")):
        for dense_first in sorted({row["dense_first"] for row in rows}, reverse=True):
            own = [row for row in rows if row["statistic"] == statistic and row["dense_first"] == dense_first]
            if own:
                when = f"first {dense_first} steps dense" if dense_first else "masks from step 0"
                cases.append((f"{what}; {when}", own))
    panels = []
    for title, own in cases:
        points = sorted(
            (row["refresh_every"] or row["steps"], row["psnr"], row["psnr_least"])
            for row in own
            if row["density"] is not None
        )
        if points:
            periods, psnr, least = (list(part) for part in zip(*points, strict=True))
            panels.append((title, [("mean", periods, psnr), ("worst clip", periods, least)]))
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

    for title, own in cases:
        ordered = sorted(own, key=lambda row: row["refresh_every"] or row["steps"])
        text += f"\n\n{title[0].upper()}{title[1:]}:\n\n" + quality_table("refresh", ordered, key=period, sort=False)
    return text


def _first_masks(rows: Sequence[Row], images: Path, link: str) -> str:
    firsts = sorted({row["dense_first"] for row in rows})
    curves = [
        (
            f"first {first} steps dense" if first else "masks from step 0",
            [row for row in rows if row["dense_first"] == first],
        )
        for first in firsts
    ]
    plots.quality_curves(
        images / "study_first_masks.png", curves, title="When the first masks are made: exact mass", bars=True
    )
    ordered = sorted(rows, key=lambda row: (row["dense_first"], row["value"]))
    return (
        "## The first masks\n\nThe same masks and refresh period after some dense steps. An error at the first steps "
        "sends a clip elsewhere, and every dense step costs `work`.\n\n"
        f"![PSNR over density by dense first steps]({link}study_first_masks.png)\n\n"
        + quality_table(
            "dense steps, share", ordered, key=lambda row: f"{row['dense_first']}, {row['value']:g}", sort=False
        )
    )


def _orders(rows: Sequence[Row], images: Path, link: str) -> str:
    text = (
        "## Query orders\n\nThe same rule with rows of queries that are neighbours in the clip in different ways. Keys "
        "stay where they are: an order costs nothing at run time. PSNR (dB) at equal density, by straight lines "
        "between measured points; empty where the density was not reached."
    )
    densities = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
    for block in sorted({row["query_block"] for row in rows}):
        own = [row for row in rows if row["query_block"] == block]
        names = list(dict.fromkeys(row["order"] for row in own))
        curves = [(name, [row for row in own if row["order"] == name]) for name in names]
        picture = f"study_orders_{block}.png"
        plots.quality_curves(images / picture, curves, title=f"Query orders, exact mass, M = {block}", bars=True)
        lines = [[f"{target:g}", *(interpolate(curve, target) for _, curve in curves)] for target in densities]
        text += (
            f"\n\nM = {block}:\n\n![PSNR over density by query order]({link}{picture})\n\n"
            + format_markdown(["density", *names], lines)
            + "\n\n"
            + quality_table("order, share", own, key=lambda row: f"{row['order']}, {row['value']:g}", sort=False)
        )
        same = [name for name, curve in curves if name != "cubes" and _equal(curve, dict(curves).get("cubes", []))]
        if same:
            text += (
                f"\n\nOrders that put the same {block} queries into a row as cubes do, on this grid: {', '.join(same)}."
            )
    return text


def _equal(first: Sequence[Row], second: Sequence[Row]) -> bool:
    """Whether two curves hold the same densities to three digits: rows of the same queries in another order."""
    return bool(first) and [round(row["density"], 3) for row in first] == [round(row["density"], 3) for row in second]


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
        "## Few sampling steps\n\nDoes caching survive few steps? Masks from step 0 on, refreshed in the middle of "
        "the run (`half`), made once, or made at every step and used at once (exact masks used at "
        f"once save no work: they only show what staleness costs).\n\n"
        f"![PSNR over sampling steps]({link}study_steps.png)\n\n"
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
    "first masks": _first_masks,
    "orders": _orders,
    "mean query": _mean_query,
    "sampling steps": _sampling_steps,
    "block sizes": _block_sizes,
    "long clips": _long_clips,
    "spread": report_masks.spread,
    "check": report_masks.check,
}
