"""What the rows of one run say: the issue's table, the break-even density, how linear time is in kept slices."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.gpu import mask_summary
from benchmarks.gpu.cases import (
    BREAK_EVEN_BAR,
    CASES,
    DENSE,
    EVEN,
    FA4_BLOCKS,
    FLASHINFER,
    LINEARITY_BAR,
    MASK_CASES,
    OURS,
    Bar,
    GpuCase,
)
from benchmarks.gpu.mask_rows import BREAK_EVEN_BENCH
from fgattn_jax.evaluation.tables import Row, format_text

_HEADER = ("case", "must", "ours", "best sparse peer", "ratio", "fastest dense", "speed", "must", "stretch")


class Linearity(NamedTuple):
    """Least-squares line of time over the kept share.

    Attributes:
        fixed_ms: Time at density 0.
        full_ms: What density 1 adds.
        r2: Share of the times' variance that the line explains.
    """

    fixed_ms: float
    full_ms: float
    r2: float


def timed(rows: Sequence[Row], case: str, names: Sequence[str]) -> Row | None:
    """The fastest timed row of a case among contestants, by rate."""
    found = [row for row in rows if row["case"] == case and row["implementation"] in names and row["ms"] is not None]
    return max(found, key=lambda row: row["tflops"], default=None)


def ours_of(rows: Sequence[Row]) -> list[str]:
    """Which of ours were timed anywhere, in the order of `OURS`."""
    measured = {row["implementation"] for row in rows if row["ms"] is not None}
    return [name for name in OURS if name in measured]


def met(bar: Bar | None, rows: Sequence[Row], case: str, ours: str) -> bool | None:
    """Whether a bar is met; None where there is no bar or a figure is missing that could still decide it."""
    row = timed(rows, case, [ours])
    if bar is None or row is None:
        return None
    verdicts: list[bool | None] = [] if bar.tflops is None else [row["tflops"] >= bar.tflops]
    if bar.factor is not None:
        names = [ours] if bar.against == OURS else bar.against
        other = timed(rows, bar.case or case, names)
        verdicts.append(None if other is None else row["tflops"] >= bar.factor * other["tflops"])
    return False if False in verdicts else None if None in verdicts else True


def even_points(rows: Sequence[Row], ours: str) -> list[tuple[float, float]]:
    """(density, ms) of ours under even masks at the shape of the main case, by density."""
    main = next(case for case in CASES if case.name == EVEN)
    same = {"queries": main.num_queries, "keys": main.num_keys, "heads": main.num_heads, "kv_heads": main.num_kv_heads}
    same |= {"head_dim": main.head_dim, "query_block": main.query_block, "dtype": main.dtype, "implementation": ours}
    return sorted(
        (row["density"], row["ms"])
        for row in rows
        if row["ms"] is not None
        and row["mask"] in ("random", "full")
        and all(row[name] == value for name, value in same.items())
    )


def break_even(points: Sequence[tuple[float, float]], dense_ms: float) -> float | None:
    """The density at which ours takes as long as dense attention, between measured densities by straight lines.

    Args:
        points: (density, ms), ascending.
        dense_ms: Time of the fastest dense contestant.

    Returns:
        The largest measured density if even that one is faster; 0 if none is; None without two points.
    """
    if len(points) < 2:
        return None
    densities, ms = np.array(points).T
    slower = np.flatnonzero(ms >= dense_ms)
    if not len(slower):
        return float(densities[-1])
    first = int(slower[0])
    if first == 0:
        return 0.0
    part = (dense_ms - ms[first - 1]) / (ms[first] - ms[first - 1])
    return float(densities[first - 1] + part * (densities[first] - densities[first - 1]))


def linearity(points: Sequence[tuple[float, float]]) -> Linearity | None:
    """Fit a line through (density, ms); None with fewer than three points."""
    if len(points) < 3:
        return None
    density, ms = np.array(points).T
    full, fixed = np.polyfit(density, ms, 1)
    rest = ((ms - fixed - full * density) ** 2).sum()
    spread = ((ms - ms.mean()) ** 2).sum()
    return Linearity(float(fixed), float(full), float(1 - rest / spread) if spread > 0 else 0.0)


def _word(verdict: bool | None) -> str:
    return {True: "met", False: "NOT met", None: "-"}[verdict]


def _rate(row: Row | None) -> str:
    return "-" if row is None else f"{row['tflops']:.0f} {row['implementation']}"


def _line(rows: Sequence[Row], case: GpuCase, ours: str) -> list[str]:
    row, bars = timed(rows, case.name, [ours]), case.bars.get(ours)
    sparse = timed(rows, case.name, (*FLASHINFER, *FA4_BLOCKS))
    dense = timed(rows, case.name, DENSE)
    return [
        case.name,
        bars.must.text if bars else "reported",
        f"{row['tflops']:.0f}" if row else "-",
        _rate(sparse),
        f"{row['tflops'] / sparse['tflops']:.2f}x" if row and sparse else "-",
        _rate(dense),
        f"{dense['ms'] / row['ms']:.2f}x" if row and dense else "-",
        _word(met(bars.must if bars else None, rows, case.name, ours)),
        _word(met(bars.stretch if bars else None, rows, case.name, ours)),
    ]


def summarise(rows: Sequence[Row], cases: Sequence[GpuCase]) -> str:
    """The text that a run prints last: rates in useful TFLOP/s, `4 * T * S * H * N * density / time`, then masks."""
    about_masks = [row for row in rows if is_of_masks(row)]
    attention = [row for row in rows if not is_of_masks(row)]
    parts = _of_attention(attention, [case for case in cases if case not in MASK_CASES])
    parts += mask_summary.summarise(about_masks)
    measured = [row for row in rows if row["bench"] != BREAK_EVEN_BENCH]
    parts += [f"{row['case']}, {row['implementation']}: {row['status']}: {row['note']}" for row in _notes(measured)]
    return "\n".join(parts)


def is_of_masks(row: Row) -> bool:
    """Whether a row belongs to a case about making masks, whoever it measures there."""
    return any(row["case"] == case.name for case in MASK_CASES)


def _of_attention(rows: Sequence[Row], cases: Sequence[GpuCase]) -> list[str]:
    if not cases:
        return []
    parts = ["rates are useful TFLOP/s; `speed` is how many times faster than dense"]
    for name in ours_of(rows) or OURS[:1]:
        parts += _of_kernel(rows, cases, name)
    parts += [f"plan() beside the call: {text}" for text in _plans(rows)]
    parts += [f"timers differ: {text}" for text in _timer_warnings(rows)]
    return parts


def _of_kernel(rows: Sequence[Row], cases: Sequence[GpuCase], name: str) -> list[str]:
    parts = [
        f"ours: {name if name in ours_of(rows) else 'not timed'}",
        format_text(_HEADER, [_line(rows, case, name) for case in cases]),
    ]
    points = even_points(rows, name)
    dense = timed(rows, "480p, full", DENSE)
    # The issue sets these two bars for `cuda`.
    bar, linear = (f", must be >= {BREAK_EVEN_BAR}", f", must be > {LINEARITY_BAR}") if name == OURS[0] else ("", "")
    if dense is not None and (density := break_even(points, dense["ms"])) is not None:
        word = f": {_word(density >= BREAK_EVEN_BAR)}" if bar else ""
        parts.append(
            f"break-even density against {dense['implementation']} ({dense['ms']:.3f} ms): {density:.3f}{bar}{word}"
        )
    if (line := linearity(points)) is not None:
        word = f": {_word(line.r2 > LINEARITY_BAR)}" if linear else ""
        parts.append(
            f"time over kept slices, {len(points)} densities: {line.fixed_ms:.3f} ms + {line.full_ms:.3f} ms x "
            f"density, R^2 {line.r2:.5f}{linear}{word}"
        )
    return parts


def _plans(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row['case']}, {row['implementation']}: {row['plan_ms']:.3f} ms beside {row['ms']:.3f} ms"
        for row in rows
        if row["case"] == EVEN and row["plan_ms"] is not None and row["ms"] is not None
    ]


def _timer_warnings(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row['case']}, {row['implementation']}: {row['ms']:.3f} ms, {row['device_ms']:.3f} ms by the device's timer"
        for row in rows
        if row["ms"] is not None and row["device_ms"] is not None and abs(row["device_ms"] / row["ms"] - 1) > 0.02
    ]


def _notes(rows: Sequence[Row]) -> list[Row]:
    """Rows that say why there is no figure, each reason once per contestant."""
    seen, notes = set(), []
    for row in rows:
        key = (row["implementation"], row["status"], row["note"])
        if row["note"] is not None and key not in seen:
            seen.add(key)
            notes.append(row)
    return notes
