"""What the rows of one run say about masks: what making them takes, and after how many uses they have paid."""

from collections.abc import Sequence

from benchmarks.gpu.cases import MASK_CASES, MASKS, ORDER, ORDER_BAR, SPARSE
from benchmarks.gpu.mask_rows import BREAK_EVEN_BENCH, CACHED, MASK_BENCH
from fgattn_jax.evaluation.tables import Row, format_text

_HEADER = ("case", "maker", "keeps", "density", "ms", "runs", "fastest dense", "share", "must", "verdict")

_BREAK_EVEN_TITLE = (
    "break-even: calls with a cached mask, by its density, after which making it has paid "
    "(mask / (dense - sparse - order); - is never)"
)

_BAR_HEAD_DIM = 128


def bar_of(row: Row) -> float | None:
    """Largest share of dense attention that a mask row may take; None where the issue sets none."""
    if row["head_dim"] != _BAR_HEAD_DIM:
        return None
    return ORDER_BAR if row["implementation"] == ORDER else MASKS[row["implementation"]].bar


def met(row: Row) -> bool | None:
    """Whether the bar is met; None without a bar or a share."""
    bar = bar_of(row)
    return None if bar is None or row["share_of_dense"] is None else row["share_of_dense"] <= bar


def summarise(rows: Sequence[Row]) -> list[str]:
    """The two tables, a text each; nothing if no row is about masks.

    Args:
        rows: Of one run.
    """
    masks = [row for row in rows if row["bench"] == MASK_BENCH]
    if not masks:
        return []
    first = masks[0]
    title = (
        f"making masks on one {first['device']}, commit {first['commit']}, {first['date'][:10]}; `share` is that of "
        "one dense attention of the fastest peer (one_pass: what it takes beyond `cuda` on the full mask)"
    )
    parts = [title, format_text(_HEADER, [_line(row) for row in masks])]
    parts += [
        f"{row['case']}, one_pass: {row['ms']:.3f} ms, dense attention with `cuda` {row['own_dense_ms']:.3f} ms, "
        f"together {row['total_share_of_dense']:.3f} of {row['fastest_dense']}"
        for row in masks
        if row["implementation"] == "one_pass" and row["ms"] and row["own_dense_ms"] and row["dense_ms"]
    ]
    if lines := _break_even_lines(rows):
        header = ("case", "maker", "mask ms", *(f"{share:g}" for share in SPARSE.values()))
        parts += [_BREAK_EVEN_TITLE, format_text(header, lines)]
    return parts


def _line(row: Row) -> list[str]:
    bar = bar_of(row)
    return [
        row["case"],
        row["implementation"],
        row["mask"],
        _number(row["density"], 3),
        row["status"] if row["ms"] is None else _number(row["ms"], 3),
        row["runs"] or "-",
        "-" if row["dense_ms"] is None else f"{row['dense_ms']:.3f} {row['fastest_dense']}",
        _number(row["share_of_dense"], 4),
        "reported" if bar is None else f"<= {bar:g}",
        {True: "met", False: "NOT met", None: "-"}[met(row)],
    ]


def _break_even_lines(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for case in MASK_CASES:
        for name in CACHED:
            found = {
                row["sparse"]: row
                for row in rows
                if row["bench"] == BREAK_EVEN_BENCH and row["case"] == case.name and row["implementation"] == name
            }
            if found:
                mask_ms = next(iter(found.values()))["mask_ms"]
                reuses = [_number(found[sparse]["reuses"], 2) if sparse in found else "" for sparse in SPARSE]
                lines.append([case.name, name, _number(mask_ms, 3), *reuses])
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
