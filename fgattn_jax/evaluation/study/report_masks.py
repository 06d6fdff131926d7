"""The parts of the report about masks themselves, and the table that its other parts share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fgattn_jax.evaluation.study import plots
from fgattn_jax.evaluation.tables import Row, format_markdown


def of_section(rows: Sequence[Row], section: str) -> list[Row]:
    """The rows of a section, as they come."""
    return [row for row in rows if row.get("section") == section]


def quality_table(what: str, rows: Sequence[Row], *, key: Callable[[Row], str] | None = None, sort: bool = True) -> str:
    """Density, work, PSNR and SSIM of every row.

    Args:
        what: Header of the first column.
        rows: Rows of quality points.
        key: Text of the first column; by default the rule's value.
        sort: Whether to sort by the rule's value.
    """
    labels = [name for name in rows[0] if name.startswith("psnr_") and name != "psnr_least"] if rows else []
    header = [what, "density", "work", "PSNR", "worst", "SSIM", "worst SSIM", *(name[5:] for name in labels)]
    ordered = sorted(rows, key=lambda row: row["value"]) if sort else rows
    lines = []
    for row in ordered:
        density = "-" if row["density"] is None else f"{row['density']:.3f}"
        first = key(row) if key else f"{row['value']:g}"
        numbers = [f"{row[name]:.1f}" for name in ("psnr", "psnr_least")]
        similar = [f"{row[name]:.4f}" for name in ("ssim", "ssim_least")]
        lines.append([first, density, f"{row['work']:.3f}", *numbers, *similar, *(f"{row[n]:.1f}" for n in labels)])
    return format_markdown(header, lines)


def negligible(rows: Sequence[Row], images: Path, link: str) -> str:
    """Table 2 of the paper on this model."""
    shapes = [row["shape"] for row in rows if row["order"] == rows[0]["order"]]
    shapes = sorted(shapes, key=lambda shape: (shape.endswith("x1"), -int(shape.split("x")[0])))
    orders = list(dict.fromkeys(row["order"] for row in rows))
    cells = {(row["order"], row["shape"]): row for row in rows}
    layers = sorted((name for name in rows[0] if name.startswith("share_layer_")), key=lambda name: int(name[12:]))
    plots.bars(
        images / "study_negligible.png",
        shapes,
        [(order, [cells[order, shape]["share"] for shape in shapes]) for order in orders],
        title="Negligible: largest probability below 0.5 / S",
        y_label="share of blocks or slices",
    )
    lines, by_layer = [], []
    for shape in shapes:
        for order in orders:
            row = cells[order, shape]
            thirds = [f"{100 * row[f'share_third_{number}']:.1f} %" for number in (1, 2, 3)]
            lines.append([shape, order, f"{100 * row['share']:.1f} %", *thirds])
            by_layer.append([shape, order, *(f"{100 * row[name]:.0f}" for name in layers)])
    return (
        "## Negligible blocks and slices\n\nThe paper's table 2 on this model: the share of blocks (queries x keys) "
        "whose largest probability is below `0.5 / S`, mean over layers, heads, steps and "
        f"{rows[0]['clips']} clips of the dense run; {rows[0]['tokens']} tokens. In cube order the queries, and for "
        "blocks the keys, of a 4x4x4 cube of tokens stand together. The paper (arXiv 2509.16518) finds 5.5 % of "
        "128x128 blocks, 22.8 % of 64x64 blocks and about 55 % of 128x1 slices negligible, on its larger models.\n\n"
        f"![Negligible shares]({link}study_negligible.png)\n\n"
        + format_markdown(["shape", "order", "negligible", "first third", "middle third", "last third"], lines)
        + "\n\nBy layer, in percent:\n\n"
        + format_markdown(["shape", "order", *(f"layer {name[12:]}" for name in layers)], by_layer)
    )


def agreement(rows: Sequence[Row], images: Path, link: str) -> str:
    """Old masks against new ones, step by step."""
    references = sorted({row["reference_step"] for row in rows})
    text = (
        "## Agreement over steps\n\nThe mask of a reference step against the masks that later steps of the dense run "
        "would make: intersection over union of the kept slices, the share of the later mask that the old one holds "
        "(recall), the probability mass under the old mask at the later step, and the IoU that random masks of "
        "the same row counts would have. Mean over layers, heads and clips."
    )
    for statistic in dict.fromkeys(row["statistic"] for row in rows):
        own = [row for row in rows if row["statistic"] == statistic]
        rule = own[0]["rule"]
        table, panels = [], []
        for cell, title in (("iou", "IoU"), ("mass_recall", "mass under the old mask")):
            entries = []
            for reference in references:
                steps = sorted({row["step"] for row in own if row["reference_step"] == reference})
                means = [_mean(own, reference, step, cell) for step in steps]
                entries.append((f"mask of step {reference}", steps, means))
            if cell == "iou":
                first = references[0]
                steps = entries[0][1]
                entries.append((f"random (step {first})", steps, [_mean(own, first, s, "iou_random") for s in steps]))
            panels.append((f"{title}, {rule}", entries))
        plots.lines(images / f"study_agreement_{statistic}.png", panels, x_label="step", y_label="share of 1")
        last = max(row["step"] for row in own)
        for reference in references:
            for step in sorted({min(reference + 1, last), min(reference + 5, last), min(reference + 14, last), last}):
                cells = [
                    f"{_mean(own, reference, step, cell):.3f}"
                    for cell in ("density", "iou", "iou_random", "recall", "mass_recall")
                ]
                if step > reference:
                    table.append([str(reference), str(step), *cells])
        header = ["mask of step", "at step", "density", "IoU", "random IoU", "recall", "mass"]
        text += (
            f"\n\nExact {statistic}, {rule}, M = {own[0]['query_block']}, cubes:\n\n"
            f"![Agreement of masks over steps]({link}study_agreement_{statistic}.png)\n\n"
            + format_markdown(header, table)
        )
    return text


def _mean(rows: Sequence[Row], reference: int, step: int, cell: str) -> float:
    return float(np.mean([row[cell] for row in rows if row["reference_step"] == reference and row["step"] == step]))


def spread(rows: Sequence[Row], images: Path, link: str) -> str:
    """Load imbalance."""
    lines, by_layer = [], []
    for row in rows:
        name = f"{row['statistic']} {row['value']:g}" + ("/S" if row["rule"] == "threshold" else "")
        cells = [f"{row[cell]:.2f}" for cell in ("within_heads", "between_heads", "largest_by_mean")]
        line = [name, row["order"], f"{row['density']:.3f}", *cells]
        if row["layer"] == "all":
            lines.append(line)
        else:
            by_layer.append([*line[:2], str(row["layer"]), *line[2:]])
    header = ["rule", "order", "density", "within heads", "between heads", "longest by mean"]
    text = (
        "## Spread of the kept counts\n\nHow unevenly rows are filled, after the last refresh: coefficient of "
        "variation (standard deviation by mean) over the rows of a head, between the means of all heads of all layers, "
        "and the longest row of a head by its mean row: what a schedule of rows in equal portions would lose.\n\n"
        + format_markdown(header, lines)
    )
    if by_layer:
        table = format_markdown([*header[:2], "layer", *header[2:]], by_layer)
        text += f"\n\n<details><summary>By layer</summary>\n\n{table}\n\n</details>"
    return text


def check(rows: Sequence[Row], images: Path, link: str) -> str:
    """The study's own attention against the shipped one."""
    lines = [
        [row["what"], f"{row['psnr']:.1f}", f"{row['psnr_least']:.1f}", row.get("density"), row.get("density_shipped")]
        for row in rows
    ]
    return (
        "## Is the study's attention the shipped one?\n\nThe same noise denoised by the study's dense masked softmax "
        "and by `fgattn_jax.models.dit.sample` with `fgattn_jax.attention` and the library's predictor: PSNR between "
        "the two clips. Their difference is rounding (16-bit products in another order), which a run of many steps "
        "carries on; it bounds the PSNR that the tables above can tell from dense.\n\n"
        + format_markdown(["compared", "PSNR", "worst", "density here", "density there"], lines)
    )
