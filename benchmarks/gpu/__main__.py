"""`python -m benchmarks.gpu`: measures this project's kernels and their peers on one GPU, in turns."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import contest, run, summary
from benchmarks.gpu.cases import OURS, PARTS, GpuCase, cases_of
from benchmarks.gpu.mask_rows import MASK_BENCH
from fgattn_jax.evaluation import tables

_ROWS = Path(__file__).resolve().parent.parent / "results" / "gpu_attention.json"

_EPILOG = """\
A peer that is not installed gets rows that say so. Peers' packages lie in folders of their own below --peers; make them
with `python -m benchmarks.peers.bundle`. See benchmarks/README.md.

examples:
  python -m benchmarks.gpu --peers ~/peers                      every case, about five minutes
  python -m benchmarks.gpu --peers ~/peers --part masks         what making masks takes beside dense attention
  python -m benchmarks.gpu --peers ~/peers --quick              four densities against FA3 and FlashInfer, one minute
  python -m benchmarks.gpu --case "480p, full" --only cuda --only cudnn --no-rows
  python -m benchmarks.gpu --summary                            the table of the last run again
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Time attention under slice masks on one GPU against its peers; all take turns in every round.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder with a folder of packages per peer")
    parser.add_argument("--quick", action="store_true", help="the main cases against FA3 and FlashInfer alone")
    parser.add_argument(
        "--part", choices=tuple(PARTS), default="all", help="only the cases of attention, or those of making masks"
    )
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help="only this case; repeatable")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this contestant; repeatable")
    parser.add_argument("--list", action="store_true", help="print cases and contestants, and stop")
    parser.add_argument("--summary", action="store_true", help="print the tables of the last run in the rows, and stop")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of everybody (default: %(default)s)")
    parser.add_argument(
        "--batch-ms", type=float, default=40.0, metavar="MS", help="work per turn (default: %(default)s)"
    )
    parser.add_argument(
        "--warm-ms",
        type=float,
        default=300.0,
        metavar="MS",
        help="where masks are made: dense attention before every turn, so that all find the GPU in the same state "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--budget-s", type=float, metavar="S", help="no case starts later (default: 300; 60 with --quick)"
    )
    parser.add_argument("--dit-masks", type=Path, metavar="FILE", help="from `python -m benchmarks.gpu.dit_masks`")
    parser.add_argument(
        "--allow-unreleased", action="store_true", help="let our kernels run before their GPU tests are recorded"
    )
    parser.add_argument(
        "--rows", type=Path, default=_ROWS, metavar="FILE", help="rows are added here (default: %(default)s)"
    )
    parser.add_argument("--no-rows", action="store_true", help="only print")
    parser.add_argument("--commit", metavar="ID", help="of the sources; asked of git by default")
    parser.add_argument("--log", type=Path, metavar="FILE", help="what workers print")
    return parser


def _print_list() -> None:
    def bar(case: GpuCase, name: str) -> str:
        return case.bars[name].must.text if name in case.bars else "reported"

    lines = [[case.name, *(bar(case, name) for name in OURS), " ".join(case.contestants)] for case in PARTS["all"]]
    print(tables.format_text(("case", *(f"{name} must" for name in OURS), "contestants"), lines))


def _last_run(rows: Sequence[tables.Row]) -> list[tables.Row]:
    """Those of the last run about attention and of the last one about masks, which may be the same."""
    found = []
    for about_masks in (False, True):
        some = [row for row in rows if summary.is_of_masks(row) == about_masks]
        newest = max((row["date"] for row in some), default=None)
        found += [row for row in some if row["date"] == newest]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write rows, print the summary.

    Returns:
        0 if one of ours was timed in some case (or nothing was to be measured), else 1; 2 for bad input.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(words)
    if args.list:
        _print_list()
        return 0
    try:
        known = tables.read_rows(args.rows)
        if args.summary:
            rows = _last_run(known)
            shown = [case for case in PARTS["all"] if any(row["case"] == case.name for row in rows)]
            print(summary.summarise(rows, shown))
            return 0
        return _measure(args, known, words)
    except ValueError as error:
        print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
        return 2


def _measure(args: argparse.Namespace, known: list[tables.Row], words: Sequence[str]) -> int:
    cases = cases_of(quick=args.quick, names=tuple(args.case), part=args.part)
    contestants = tuple(args.only) if args.only else None
    everybody = {name for names in run.PEERS.values() for name in names}
    for name in contestants or ():
        if name not in everybody:
            raise ValueError(f"expected a contestant among {', '.join(sorted(everybody))}; got {name!r}")
    if args.rounds < 1 or args.batch_ms <= 0 or not args.warm_ms >= 0:
        raise ValueError(
            f"expected positive numbers, got rounds={args.rounds} batch_ms={args.batch_ms} warm_ms={args.warm_ms}"
        )
    if args.quick and contestants is None:
        contestants = ("cuda", "pallas", "fa3", "flashinfer_fused", "flashinfer_launches")
    plan = run.Plan(
        cases,
        contest.Settings(rounds=args.rounds, batch_ms=args.batch_ms, warm_ms=args.warm_ms),
        budget_s=args.budget_s or (60.0 if args.quick else 300.0),
        mask_file=args.dit_masks,
        contestants=contestants,
        source={
            "commit": args.commit or tables.commit(),
            "command": "python -m benchmarks.gpu " + shlex.join(words),
        },
    )
    workers = run.make_workers(args.peers, options={"allow_unreleased": args.allow_unreleased}, log=args.log)
    rows: list[tables.Row] = []
    for some in run.run(plan, workers, lambda text: print(text, flush=True)):
        rows += some
        if not args.no_rows:  # after every case: a run that is cut off keeps what it has
            tables.write_rows(args.rows, [*known, *rows])
    print()
    print(summary.summarise(rows, cases))
    made = any(row["bench"] == MASK_BENCH and row["ms"] is not None for row in rows)
    return 0 if made or summary.ours_of(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
