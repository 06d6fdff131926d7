"""`fgattn mask-stats`: density, kept counts and memory of a saved mask."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_BAR_CELLS = 40
_BINS = 10

_EPILOG = """\
FILE is a mask written by `fgattn_jax.masks.save_mask`.

examples:
  fgattn mask-stats mask.safetensors
  fgattn mask-stats mask.safetensors --json
  fgattn mask-stats mask.safetensors --plot mask.png     densities per head, and a histogram (needs matplotlib)
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the options of `fgattn mask-stats`."""
    parser = subparsers.add_parser(
        "mask-stats",
        description="Density of every head, histogram of the kept keys of the rows, and memory of a saved mask.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="saved mask (.safetensors)")
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the same into this picture")


def run(args: argparse.Namespace) -> int:
    """Prints the figures; returns 0."""
    if not args.file.is_file():
        raise ValueError(f"expected FILE to be a saved mask, found no file at {str(args.file)!r}")

    import numpy as np

    from fgattn_jax.masks import load_mask

    mask = load_mask(args.file)
    stats = _stats(mask, np.asarray(mask.counts()))
    if args.plot is not None:
        _plot(stats, args.plot)
    if args.json:
        print(json.dumps(stats, indent=2))
    else:
        _print_stats(args.file, stats)
    return 0


def _stats(mask: Any, counts: "np.ndarray") -> dict[str, Any]:
    import numpy as np

    edges = np.linspace(0, mask.num_keys, _BINS + 1)
    histogram, _ = np.histogram(counts, bins=edges)
    mean = float(counts.mean())
    as_booleans = counts.size // mask.num_rows * mask.num_queries * mask.num_keys
    return {
        "batch": counts.shape[-3],
        "heads": counts.shape[-2],
        "queries": mask.num_queries,
        "keys": mask.num_keys,
        "query_block": mask.query_block,
        "rows": mask.num_rows,
        "query_order": mask.query_order is not None,
        "density": mean / mask.num_keys,
        # Over everything but the head axis: batch, rows, and stacked axes such as layers.
        "density_per_head": (np.moveaxis(counts, -2, 0).reshape(counts.shape[-2], -1).mean(1) / mask.num_keys).tolist(),
        "count": {
            "min": int(counts.min()),
            "median": float(np.median(counts)),
            "mean": mean,
            "max": int(counts.max()),
            # The longest row by the mean one: what a schedule of rows in equal portions loses.
            "max_by_mean": int(counts.max()) / mean if mean else None,
        },
        "empty_rows": int((counts == 0).sum()),
        "full_rows": int((counts == mask.num_keys).sum()),
        "histogram": {"edges": edges.tolist(), "rows": histogram.tolist()},
        "bytes": {"bits": int(mask.nbytes), "as_booleans": as_booleans},
        "stacked": [*counts.shape[:-3]],
    }


def _bar(share: float) -> str:
    return "#" * round(share * _BAR_CELLS)


def _print_stats(file: Path, stats: dict[str, Any]) -> None:
    count, size = stats["count"], stats["bytes"]
    print(f"{file.name}: {stats['queries']} queries x {stats['keys']} keys, {stats['query_block']} queries per slice")
    stacked = f", stacked {stats['stacked']}" if stats["stacked"] else ""
    order = "with a query order" if stats["query_order"] else "raster order"
    print(f"batch {stats['batch']}, heads {stats['heads']}, rows {stats['rows']} per head{stacked}; {order}")
    print(f"memory {size['bits']:,} bytes, as one boolean per query and key {size['as_booleans']:,} bytes")
    print(f"\ndensity {stats['density']:.4f}")
    for head, density in enumerate(stats["density_per_head"]):
        print(f"  head {head:>3}  {density:.4f}  {_bar(density)}")
    ratio = "" if count["max_by_mean"] is None else f", longest by mean {count['max_by_mean']:.2f}"
    print(
        f"\nkept keys per row: min {count['min']}, median {count['median']:g}, mean {count['mean']:.1f}, "
        f"max {count['max']}{ratio}"
    )
    print(f"empty rows {stats['empty_rows']}, full rows {stats['full_rows']}")
    edges, rows = stats["histogram"]["edges"], stats["histogram"]["rows"]
    most = max(rows)
    for low, high, number in zip(edges[:-1], edges[1:], rows, strict=True):
        print(f"  {low:>8.0f} .. {high:<8.0f} {number:>8}  {_bar(number / most if most else 0.0)}")


def _plot(stats: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    heads, rows = figure.subplots(1, 2)
    heads.bar(range(stats["heads"]), stats["density_per_head"])
    heads.set(xlabel="head", ylabel="density", ylim=(0, 1), title=f"density {stats['density']:.3f}")
    edges = stats["histogram"]["edges"]
    rows.stairs(stats["histogram"]["rows"], edges, fill=True)
    rows.axvline(stats["count"]["mean"], color="black", linestyle="--", linewidth=1, label="mean")
    rows.legend()
    rows.set(xlabel="kept keys", ylabel="rows", xlim=(0, edges[-1]), title="kept keys per row")
    figure.savefig(path, dpi=130)
