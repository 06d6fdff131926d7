"""`fgattn bench`: measures attention and mask making on this machine, and writes docs/benchmarks.md from the rows."""

import argparse
import shlex
import sys
from pathlib import Path

from fgattn_jax.cli import _bench_layer

_ROWS = _bench_layer.FOLDER / _bench_layer.OTHER_ROWS

_EPILOG = """\
Every program is compared with a float64 oracle before it is timed. Rows are appended to the file; those of the same
device and jax are replaced by a full run. Close other programs: a busy machine shows in the spread.

examples:
  fgattn bench                                    all cases of this device, then docs/benchmarks.md
  fgattn bench --list                             names of the cases
  fgattn bench --bench attention --case "4096 tokens, density 0.2" --rows rows.json --rows-only
  fgattn bench --render-only                      write the documents anew from the rows

"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the options of `fgattn bench`."""
    parser = subparsers.add_parser(
        "bench",
        description="Time attention under masks, its gradient and the making of masks against dense attention.",
        epilog=_EPILOG + _bench_layer.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--bench", action="append", metavar="NAME", help="attention, gradient or predictors; repeatable"
    )
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the cases of this device and stop")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help=f"data rows (default: {_ROWS}; with --layer: {_bench_layer.ROWS} in that folder). The report "
        "takes both files of the folder",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks.md"), metavar="FILE", help="report (default: %(default)s)"
    )
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE", help="gets the short table")
    parser.add_argument("--commit", metavar="NAME", help="commit to note in the rows, where git cannot be asked")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rows-only", action="store_true", help="measure, write no report")
    what.add_argument("--render-only", action="store_true", help="measure nothing, write the report")
    _bench_layer.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measures and renders; returns 0."""
    if args.rounds < 1:
        raise ValueError(f"expected `--rounds` of at least 1, got rounds={args.rounds}")
    if args.layer:
        return _bench_layer.run(args)
    _bench_layer.refuse_without_layer(args)

    from fgattn_jax.evaluation import benchmark_report, tables

    rows_file = args.rows or _ROWS
    rows = tables.read_rows(rows_file)
    if not args.render_only:
        from fgattn_jax.evaluation import benchmark

        cases = benchmark.default_cases()
        if args.list:
            print("\n".join(f"{case.name}: {case.why}" for case in cases))
            return 0
        known = {case.name: case for case in cases}
        for name in args.case or ():
            if name not in known:
                raise ValueError(f"expected `--case` to name one of {', '.join(map(repr, known))}; got {name!r}")
        chosen = [known[name] for name in args.case] if args.case else cases
        source = dict(tables.provenance(shlex.join(["fgattn", *sys.argv[1:]])))
        if args.commit:
            source["commit"] = args.commit
        rows = [row for row in rows if (row["device"], row["jax"]) != (source["device"], source["jax"])]
        for row in benchmark.run_benches(args.bench or benchmark.BENCHES, chosen, args.rounds):
            print(_line(row), file=sys.stderr, flush=True)
            rows.append({**row, "rounds": args.rounds, **source})
            tables.write_rows(rows_file, rows)
    if not args.rows_only:
        layers = tables.read_rows(rows_file.with_name(_bench_layer.ROWS))
        benchmark_report.render(rows, args.out, rows_name=rows_file.as_posix(), layer_rows=layers)
        benchmark_report.update_readme(rows, args.readme, layer_rows=layers)
        print(f"wrote {args.out} from {len(rows)} rows", file=sys.stderr)
    return 0


def _line(row: dict) -> str:
    rate = "" if row["tflops"] is None else f"  {1e3 * row['tflops']:8.1f} GFLOP/s"
    return f"{row['bench']:<10} {row['case']:<40} {row['implementation']:<24} {row['ms']:9.2f} ms{rate}"
