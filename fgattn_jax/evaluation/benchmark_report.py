"""docs/benchmarks.md and the README's table, from data rows only."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fgattn_jax.evaluation import layer_report
from fgattn_jax.evaluation.tables import Row, format_markdown
from fgattn_jax.types import IMPLEMENTATIONS

README_MARKS = ("<!-- benchmarks:begin (written by `fgattn bench`; do not edit) -->", "<!-- benchmarks:end -->")

_DENSE = ("jax_nn", "cudnn", "dense")
_SIZES = ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "query_block", "dtype")


def _runs(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one device, commit and command together, in the order in which they came."""
    runs: dict[tuple, list[Row]] = {}
    for row in rows:
        runs.setdefault(tuple(row.get(k) for k in ("device", "jax", "commit", "date", "command")), []).append(row)
    return list(runs.values())


def _by_case(rows: Sequence[Row], bench: str) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row["bench"] == bench:
            cases.setdefault(row["case"], []).append(row)
    return cases


def _spread(row: Row) -> str:
    return f"{row['ms']:.4g} ({row['ms_p10']:.4g}-{row['ms_p90']:.4g})"


def _baseline(rows: Sequence[Row]) -> Row:
    """What ratios are against: `jax.nn` where it ran, else the fastest dense peer."""
    dense = [row for row in rows if row["implementation"] in _DENSE]
    named = [row for row in dense if row["implementation"] == "jax_nn"]
    return named[0] if named else min(dense, key=lambda row: row["ms"])


def attention_lines(rows: Sequence[Row]) -> list[list]:
    """Lines of the attention table: case, implementation, density, time, rate, times faster than dense."""
    lines = []
    for case, members in _by_case(rows, "attention").items():
        base = _baseline(members)
        for row in members:
            lines.append(
                [
                    case,
                    row["implementation"],
                    f"{row['density']:.3f}",
                    _spread(row),
                    f"{row['tflops']:.3g}",
                    f"{base['ms'] / row['ms']:.2f}x {base['implementation']}",
                ]
            )
    return lines


def _is_even_case(row: Row) -> bool:
    return row["case"].count(",") == 1  # "4096 tokens, density 0.2": nothing but the density changes


def linearity(rows: Sequence[Row], implementation: str = "xla") -> tuple[float, float, float] | None:
    """Fit time = fixed + slope * kept share over the even random cases from 0.05 to 0.5, of the first case's sizes.

    Returns:
        Fixed milliseconds, milliseconds at density 1, and the largest relative distance of a case from the line
        (weighted fit of relative errors); None with fewer than three cases.
    """
    even = [
        row
        for row in rows
        if row["bench"] == "attention"
        and row["implementation"] == implementation
        and row["mask"] == "random"
        and row["density"] <= 0.51
        and _is_even_case(row)
    ]
    points = [(row["density"], row["ms"]) for row in even if all(row[k] == even[0][k] for k in _SIZES)]
    if len(points) < 3:
        return None
    density, ms = np.array(points).T
    columns = np.stack([np.ones_like(density), density], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(columns / ms[:, None], np.ones_like(ms), rcond=None)
    return float(fixed), float(slope), float(np.abs((fixed + slope * density) / ms - 1).max())


def _bench_table(rows: Sequence[Row], bench: str) -> str:
    lines = []
    for case, members in _by_case(rows, bench).items():
        base = next((r for r in members if r["implementation"] in _DENSE), members[-1])
        if bench == "predictors":
            base = _baseline(members)
        lines += [
            [case, r["implementation"], _spread(r), f"{r['ms'] / base['ms']:.3f} of {base['implementation']}"]
            for r in members
        ]
    return format_markdown(["case", "program", "ms, median (10-90 %)", "time"], lines)


def _section(rows: Sequence[Row]) -> str:
    first = rows[0]
    parts = [
        f"## {first['device']}, jax {first['jax']}",
        f"Commit {first['commit']}, {first['date']}, `{first['command']}`, {first['rounds']} rounds.",
    ]
    if lines := attention_lines(rows):
        parts += [
            "### Attention",
            "TFLOP/s count the kept slices only: `4 * B * N * T * S * H * density / time`.",
            format_markdown(["case", "implementation", "density", "ms, median (10-90 %)", "TFLOP/s", "speed"], lines),
        ]
    for name in IMPLEMENTATIONS:
        if (fit := linearity(rows, name)) is None:
            continue
        fixed, slope, distance = fit
        parts.append(
            f"Time of `{name}` over density up to 0.5: {fixed:.3g} ms + {slope:.3g} ms x density; the farthest case "
            f"lies {100 * distance:.0f} % from this line."
        )
    titles = {"gradient": "Forward and backward", "predictors": "Mask making"}
    for bench, title in titles.items():
        if any(row["bench"] == bench for row in rows):
            parts += [f"### {title}", _bench_table(rows, bench)]
    return "\n\n".join(parts)


def render(rows: Sequence[Row], path: Path, *, rows_name: str, layer_rows: Sequence[Row] = ()) -> None:
    """Write docs/benchmarks.md, and the pictures of the layers into `images` beside it.

    Args:
        rows: Rows of `fgattn bench`.
        path: The document.
        rows_name: The file that `rows` are in, as the document names it.
        layer_rows: Rows of `fgattn bench --layer`.

    Raises:
        ValueError: There are no rows, or there are layers and matplotlib is missing.
    """
    if not rows and not layer_rows:
        raise ValueError(f"expected benchmark rows in {rows_name!r}, got none; run `fgattn bench` first")
    beside = " and the rows of layers beside it" if layer_rows else ""
    head = (
        "# Benchmarks\n\n"
        f"Written by `fgattn bench --render-only` from `{rows_name}`{beside}; edit none by hand. Every program passed "
        "the float64 oracle before it was timed; the programs of a case took turns in every round, so that ratios "
        "inside a table hold, while times of different runs cannot be compared."
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = []
    if layer_rows:
        layer_report.draw_all(layer_rows, path.parent / "images")
        layers = [layer_report.section(layer_rows, "images")]
    path.write_text("\n\n".join([head, *layers, *map(_section, _runs(rows))]) + "\n")


def update_readme(rows: Sequence[Row], path: Path, *, layer_rows: Sequence[Row] = ()) -> bool:
    """Put the tables between the marks of a README; False where the file or the marks are missing."""
    begin, end = README_MARKS
    if not path.exists() or begin not in (text := path.read_text()) or end not in text:
        return False
    tables = []
    for members in _runs(rows):
        sparse = (line for line in attention_lines(members) if line[1] in IMPLEMENTATIONS)
        lines = [line for line in sparse if line[0].count(",") == 1]
        if lines:
            first = members[0]
            table = format_markdown(
                ["case", "implementation", "density", "ms, median (10-90 %)", "TFLOP/s", "speed"], lines
            )
            where = f"{first['device']}, jax {first['jax']}, commit {first['commit']}"
            tables.append(f"{where} ([all rows](docs/benchmarks.md)):\n\n{table}")
    tables += layer_report.readme_part(layer_rows)
    before, after = text.split(begin)[0], text.split(end)[1]
    path.write_text(f"{before}{begin}\n\n" + "\n\n".join(tables) + f"\n\n{end}{after}")
    return True
