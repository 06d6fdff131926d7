"""Rows about masks: what making one takes beside dense attention, and how often it must be used to pay for itself."""

from collections.abc import Sequence

from benchmarks.gpu.cases import DENSE, MAKERS, MASKS, ORDER, OURS, SPARSE
from fgattn_jax.evaluation.tables import Row

MASK_BENCH, BREAK_EVEN_BENCH = "mask", "break_even"

CACHED = tuple(name for name in MASKS if name != "one_pass")
"""Makers whose break-even is asked for: a call of its own, whose mask later calls use."""

_SHAPE = ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "query_block", "dtype")


def complete(rows: Sequence[Row]) -> list[Row]:
    """The rows of one case with the columns of masks filled in, and its break-even rows after them.

    Rows of contestants that make masks get

    - `bench`: "mask";
    - `fastest_dense`, `dense_ms`: the fastest dense peer of the case and its time; `own_dense_ms`: that of `cuda` on
      the full mask;
    - `share_of_dense`: time over `dense_ms`. For `one_pass`, which computes dense attention as well, its time beyond
      `own_dense_ms`, and the whole is in `total_share_of_dense`;
    - `share_of_any_dense`: the same over the fastest of peers and our own kernels on the full mask.

    Shares are None where one of their times is.
    """
    done = [_with_shares(row, rows) if row["implementation"] in MAKERS else row for row in rows]
    return [*done, *_break_even_rows(rows)]


def _timed(rows: Sequence[Row], names: Sequence[str]) -> Row | None:
    found = [row for row in rows if row["implementation"] in names and row["ms"] is not None]
    return min(found, key=lambda row: row["ms"], default=None)


def _with_shares(row: Row, rows: Sequence[Row]) -> Row:
    peer, own, fastest = _timed(rows, DENSE), _timed(rows, OURS[:1]), _timed(rows, (*DENSE, *OURS))
    both = row["implementation"] == "one_pass"
    extra = row["ms"]
    if both and extra is not None:
        extra = None if own is None else extra - own["ms"]

    def share(ms: float | None, dense: Row | None) -> float | None:
        return None if ms is None or dense is None else round(ms / dense["ms"], 5)

    return row | {
        "bench": MASK_BENCH,
        "fastest_dense": None if peer is None else peer["implementation"],
        "dense_ms": None if peer is None else peer["ms"],
        "own_dense_ms": None if own is None else own["ms"],
        "share_of_dense": share(extra, peer),
        "share_of_any_dense": share(extra, fastest),
        "total_share_of_dense": share(row["ms"], peer) if both else None,
    }


def _break_even_rows(rows: Sequence[Row]) -> list[Row]:
    """One row for each mask and density; none where a time is missing, which the other rows say.

    `reuses` is mask time over what a call with the mask saves, dense time less sparse time less work order; None where
    it saves nothing.
    """
    dense, order = _timed(rows, DENSE), _timed(rows, [ORDER])
    if dense is None or order is None:
        return []
    found = []
    for name in CACHED:
        made = _timed(rows, [name])
        for sparse in [_timed(rows, [sparse]) for sparse in SPARSE]:
            if made is None or sparse is None:
                continue
            saved = dense["ms"] - sparse["ms"] - order["ms"]
            found.append(
                {"bench": BREAK_EVEN_BENCH, "implementation": name, "case": made["case"]}
                | {column: made[column] for column in _SHAPE}
                | {
                    "density": sparse["density"],
                    "ms": None,
                    "mask_ms": made["ms"],
                    "fastest_dense": dense["implementation"],
                    "dense_ms": dense["ms"],
                    "sparse": sparse["implementation"],
                    "sparse_ms": sparse["ms"],
                    "order_ms": order["ms"],
                    "reuses": round(made["ms"] / saved, 4) if saved > 0 else None,
                    "runs": made["runs"],
                    "status": "timed",
                    "note": None if saved > 0 else "a call with a mask of this density saves nothing",
                }
            )
    return found
