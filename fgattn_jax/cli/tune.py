"""`fgattn tune`: times configs of the Pallas kernel on this GPU, and keeps the best as data rows."""

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fgattn_jax.evaluation.tuning import Trial
    from fgattn_jax.pallas_kernels.config import KernelConfig

_DTYPES = ("bfloat16", "float16")

_EPILOG = """\
A config says how many tiles of keys and values stand in shared memory at once (stages) and how the registers are
shared out between threads that multiply and threads that copy. It changes the time of a call, and its result by no more
than rounding. Every config must give the right result before it is timed; one that does not compile is named and passed
over.

The fastest becomes a row with device, versions, date and command, in the place of the older row of the same device,
head width and slice height; the heuristic's does, unless nine in ten rounds of the fastest took less time than nine in
ten of its own. Calls on such a device take it from pallas_kernels/tuned.json; where there is no row, the heuristic
chooses. Run it in the checkout, on a Hopper GPU that nothing else uses.

examples:
  fgattn tune --list                                     the configs that would be timed; needs no GPU
  fgattn tune                                            H = 128, M = 128 at the size of a 480p clip
  fgattn tune --head-dim 64 128 --query-block 64 128     one row for each of the four pairs
  fgattn tune --tokens 8192 --density 0.1 --rows rows.json
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the options of `fgattn tune`."""
    parser = subparsers.add_parser(
        "tune",
        description="Time the configs of the Pallas kernel on this GPU and keep the fastest for later calls.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--head-dim", type=int, nargs="+", default=[128], metavar="H", help="head widths, 64 or 128 (default: 128)"
    )
    parser.add_argument(
        "--query-block",
        type=int,
        nargs="+",
        default=[128],
        metavar="M",
        help="queries per slice, 64 or 128 (default: 128)",
    )
    parser.add_argument("--tokens", type=int, default=32760, metavar="T", help="queries and keys (default: 32760)")
    parser.add_argument("--heads", type=int, default=12, metavar="N", help="heads (default: %(default)s)")
    parser.add_argument(
        "--density", type=float, default=0.3, metavar="D", help="share of kept slices (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="dtype of q, k, v (default: bfloat16)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--rows",
        type=Path,
        default=Path("pallas_kernels/tuned.json"),
        metavar="FILE",
        help="data rows (default: %(default)s)",
    )
    parser.add_argument("--commit", metavar="NAME", help="commit to note in the rows, where git cannot be asked")
    parser.add_argument(
        "--allow-unreleased", action="store_true", help="let the kernel run before its GPU tests are recorded"
    )
    parser.add_argument("--list", action="store_true", help="print the configs and stop")


def run(args: argparse.Namespace) -> int:
    """Times the configs and writes the rows; returns 0."""
    _check(args)
    pairs = list(dict.fromkeys(itertools.product(args.head_dim, args.query_block)))
    if args.list:
        for head_dim, query_block in pairs:
            _print_candidates(head_dim, query_block)
        return 0
    if not args.rows.parent.is_dir():
        raise ValueError(
            f"expected `--rows` in a folder that exists, got {args.rows.as_posix()!r}; run this in the checkout, "
            "or name a file"
        )

    from fgattn_jax.errors import UnsupportedError
    from fgattn_jax.evaluation import tables, tuning
    from fgattn_jax.pallas_kernels import support

    if args.allow_unreleased:
        support.RELEASED = True
    sizes = {"tokens": args.tokens, "heads": args.heads, "density": args.density, "dtype": args.dtype}
    cases = [tuning.make_case(head_dim=h, query_block=m, **sizes) for h, m in pairs]
    reasons = dict.fromkeys(reason for case in cases for reason in tuning.unsupported_reasons(case))
    if reasons:
        raise UnsupportedError(
            f"the Pallas kernel cannot be timed here: {'; '.join(reasons)}. "
            "`fgattn tune --list` prints the configs on any machine"
        )
    rows = tuning.read_tuned(args.rows)
    source = dict(tables.provenance(_command(args)))
    if args.commit:
        source["commit"] = args.commit
    for case in cases:
        print(f"{case.name}, {args.tokens} tokens, {args.rounds} rounds", file=sys.stderr, flush=True)
        trials = []
        for trial in tuning.time_candidates(case, args.rounds):
            print(_line(trial), file=sys.stderr, flush=True)
            trials.append(trial)
        rows = tuning.replace_row(rows, tuning.best_row(case, trials, args.rounds, source))
        tuning.write_tuned(args.rows, rows)
    print(f"wrote {len(cases)} of {len(rows)} rows into {args.rows.as_posix()}", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    from fgattn_jax.pallas_kernels import support

    for option, values, allowed in (
        ("--head-dim", args.head_dim, support.HEAD_DIMS),
        ("--query-block", args.query_block, support.QUERY_BLOCKS),
    ):
        for value in values:
            if value not in allowed:
                raise ValueError(f"expected `{option}` of {' or '.join(map(str, allowed))}, got {value}")
    for option, value in (("--tokens", args.tokens), ("--heads", args.heads), ("--rounds", args.rounds)):
        if value < 1:
            raise ValueError(f"expected `{option}` of at least 1, got {value}")
    if not 0.0 < args.density <= 1.0:
        raise ValueError(f"expected `--density` above 0 and at most 1, got {args.density}")


def _print_candidates(head_dim: int, query_block: int) -> None:
    from fgattn_jax.pallas_kernels import config as configs

    print(f"head_dim={head_dim}, query_block={query_block}")
    chosen = configs.heuristic(head_dim=head_dim, query_block=query_block)
    for config in configs.candidates(head_dim=head_dim, query_block=query_block):
        size = config.shared_bytes(head_dim=head_dim, query_block=query_block)
        print(f"  {_words(config)}  {size:7,} bytes" + ("  (the heuristic's)" if config == chosen else ""))


def _words(config: "KernelConfig") -> str:
    return (
        f"tile_keys={config.tile_keys:<3} stages={config.stages} compute_registers={config.compute_registers} "
        f"copy_registers={config.copy_registers}"
    )


def _line(trial: "Trial") -> str:
    if trial.timing is None:
        return f"  {_words(trial.config)}  left out: {trial.reason}"
    timing = trial.timing
    return (
        f"  {_words(trial.config)}  {timing.ms:9.4f} ms ({timing.ms_p10:.4f}-{timing.ms_p90:.4f})"
        f"  {trial.tflops:7.1f} TFLOP/s"
    )


def _command(args: argparse.Namespace) -> str:
    # Defaults may change and paths are a machine's own: all sizes, no file.
    head_dims, query_blocks = (" ".join(map(str, values)) for values in (args.head_dim, args.query_block))
    return (
        f"fgattn tune --head-dim {head_dims} --query-block {query_blocks} --tokens {args.tokens} --heads {args.heads} "
        f"--density {args.density} --dtype {args.dtype} --rounds {args.rounds}"
    )
