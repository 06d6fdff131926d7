"""`fgattn study`: measures on the shipped model what can be skipped, and writes docs/study.md from the rows."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fgattn_jax.evaluation.study.context import Context, StudyModel
    from fgattn_jax.evaluation.tables import Row

_SECTIONS = (
    "negligible, thresholds, agreement, refresh, orders, mean query, sampling steps, block sizes, long clips, "
    "spread, check"
)
_SAVE_SECONDS = 5.0

_EPILOG = f"""\
Sections, in this order: {_SECTIONS}.
Rows are written as they come; a run that is stopped keeps what it has, and `--resume` measures only what is missing.
The whole study takes about ten minutes on an H100. On a CPU take `--quick`, or a few sections.

examples:
  fgattn study                                      measure everything, write docs/study.md and its plots
  fgattn study --resume --minutes 8                 go on from the rows there are, for at most 8 minutes
  fgattn study --only negligible --only spread      these sections; rows of others are kept
  fgattn study --render-only                        write the report anew from the rows
  fgattn study --quick --rows quick.json --out quick/study.md
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the options of `fgattn study`."""
    parser = subparsers.add_parser(
        "study",
        description="What can be skipped on the shipped video DiT, when, and what it costs: data rows, tables, plots.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/study.md"), metavar="FILE", help="report (default: %(default)s)"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        default=Path("benchmarks/results/study.json"),
        metavar="FILE",
        help="data rows (default: %(default)s)",
    )
    parser.add_argument("--only", action="append", metavar="SECTION", help="run this section only; may be repeated")
    parser.add_argument("--minutes", type=float, metavar="N", help="stop measuring after so many minutes")
    parser.add_argument("--resume", action="store_true", help="keep the rows there are, measure what is missing")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="noises per class (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few points, 6 steps, one noise per class")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="other weights than the shipped ones")
    parser.add_argument("--commit", metavar="NAME", help="commit to note in the rows, where git cannot be asked")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rows-only", action="store_true", help="measure, write no report")
    what.add_argument("--render-only", action="store_true", help="measure nothing, write the report")


def run(args: argparse.Namespace) -> int:
    """Measures and renders; returns 0."""
    known = [name.strip() for name in _SECTIONS.split(",")]
    wanted = args.only or known
    for name in wanted:
        if name not in known:
            raise ValueError(f"expected `--only` to name a section, one of {_SECTIONS}; got {name!r}")
    if args.seeds < 1:
        raise ValueError(f"expected `--seeds` of at least 1, got seeds={args.seeds}")
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"expected `--minutes` above 0, got minutes={args.minutes}")

    from fgattn_jax.evaluation import tables

    rows = tables.read_rows(args.rows)
    if not args.render_only:
        rows = _measure(args, wanted, rows)
    if not args.rows_only:
        from fgattn_jax.evaluation.study import report

        report.render(rows, args.out, rows_name=args.rows.as_posix(), images=args.out.parent / "images")
        print(f"wrote {args.out} from {len(rows)} rows", file=sys.stderr)
    return 0


def _measure(args: argparse.Namespace, wanted: list[str], old: "list[Row]") -> "list[Row]":
    from fgattn_jax.evaluation import tables
    from fgattn_jax.evaluation.study.context import Context
    from fgattn_jax.evaluation.study.sections import PARTS, SECTIONS

    model, check = load_model(args.weights)
    context = Context(
        model,
        seeds=range(1 if args.quick else args.seeds),
        deadline=None if args.minutes is None else time.monotonic() + 60 * args.minutes,
        quick=args.quick,
        known=old if args.resume else (),
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    source = dict(tables.provenance(_command(args)))
    if args.commit:
        source["commit"] = args.commit
    sections = {**SECTIONS, "check": check}
    replaced = {part for name in wanted for part in (name, *PARTS.get(name, ()))}
    finished = [] if args.resume else [row for row in old if row.get("section") not in replaced]
    stale = old if args.resume else []
    measured: list[Row] = []

    def save() -> None:
        # What was not measured again stays, so that a run that stops early loses nothing.
        sections_done = {_identity(row) for row in measured}
        kept = [row for row in stale if _identity(row) not in sections_done]
        tables.write_rows(args.rows, [*finished, *kept, *measured])

    saved = time.monotonic()
    try:
        for name in sections:
            if name not in wanted:
                continue
            if context.out_of_time():
                print(f"out of time before section {name!r}; go on with --resume", file=sys.stderr)
                break
            for row in sections[name](context):
                measured.append(row if "device" in row else {**row, **source})
                if time.monotonic() - saved > _SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
                if context.out_of_time():
                    print(f"out of time in section {name!r}; go on with --resume", file=sys.stderr)
                    break
    finally:
        save()
    return tables.read_rows(args.rows)


def _identity(row: "Row") -> tuple:
    """What a row measured: its cells that are settings."""
    settings = (
        "section statistic rule value order shape query_block tokens steps refresh_every dense_first dense_at_refresh "
        "schedule label layer reference_step step what clips"
    )
    return tuple(row.get(name) for name in settings.split())


def _command(args: argparse.Namespace) -> str:
    words = ["fgattn", "study"]
    for name in args.only or ():
        words += ["--only", f"'{name}'" if " " in name else name]
    if args.quick:
        words.append("--quick")
    elif args.seeds != 2:
        words += ["--seeds", str(args.seeds)]
    return " ".join(words)


def load_model(weights: Path | None) -> "tuple[StudyModel, Any]":
    """The model of the study, and its section `check`, which compares with the shipped sampler.

    Args:
        weights: File to load instead of the shipped weights.

    Raises:
        ValueError: The weights are missing or corrupt.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from fgattn_jax.cli import _study_check
    from fgattn_jax.evaluation.study.context import StudyModel
    from fgattn_jax.models.dit import data
    from fgattn_jax.models.dit.weights import load_pretrained, load_weights

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def load(**more: Any) -> Any:
        if weights is None:
            return load_pretrained(dtype=dtype, **more)
        return load_weights(weights, dtype=dtype, **more)[0]

    def make_apply(attention: Any) -> Any:
        graph, _ = nnx.split(load(attention=attention))

        def apply(state: Any, *arguments: Any, **keywords: Any) -> Any:
            return nnx.merge(graph, state)(*arguments, **keywords)

        return apply

    shipped = load()
    config = shipped.config
    model = StudyModel(
        params=nnx.split(shipped)[1],
        make_apply=make_apply,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        patch=config.patch,
        clip=(config.num_frames, config.height, config.width_pixels),
        labels=tuple(data.CLASS_NAMES[: config.num_classes]),
    )

    def check(context: "Context") -> Any:
        return _study_check.check(context, shipped)

    return model, check
