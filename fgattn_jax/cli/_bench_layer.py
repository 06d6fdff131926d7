"""`fgattn bench --layer`: options, and from options to a measurement, rows, a picture and the report."""

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fgattn_jax.evaluation.layer import LayerSetup, Rule
    from fgattn_jax.evaluation.model_shapes import ModelShape

FOLDER, ROWS, OTHER_ROWS = Path("benchmarks/results"), "layer.json", "attention.json"
"""Where rows lie: those of layers, and beside them those of all other benches."""

_CPU_TOKENS, _CPU_HEADS = 4096, 4
_CUSTOM = ("tokens", "heads", "head_dim", "layers")

# Of the group's options, with what they are where nothing is given: None means "not given", so that an option without
# `--layer` can be refused.
_DEFAULTS: dict[str, Any] = {"query_block": 128, "query_order": "cubes", "steps": 50, "refresh_every": 10}
_OPTIONS = (
    *("model", "grid", *_CUSTOM, "branches", "run_heads", "predictor", "threshold", "top_p", "top_k", *_DEFAULTS),
    *("density", "implementation", "dtype", "png"),
)

EPILOG = """\
one layer of a model, phase by phase (--layer):
  fgattn bench --layer                            the shipped DiT on a CPU (under a minute), Wan 2.1 1.3B 480p on a GPU
  fgattn bench --layer --list                     the models it knows
  fgattn bench --layer --model wan-14b-720p --run-heads 8 --density 0.2 0.4
  fgattn bench --layer --predictor mean-query --top-p 0.9 --refresh-every 1
  fgattn bench --layer --tokens 8192 --heads 8 --head-dim 64 --layers 12 --rows-only

Inputs are smooth random fields over the model's token grid, sharp enough that masks have the density asked for; the
mask is what the predictor makes of them. A step is the mean over --steps, with a new mask every --refresh-every steps:
exact predictors run dense attention with its log-sum-exp at those steps, which the figures count. On a CPU, models are
cut to 4096 tokens and 4 heads, and their titles say so; --grid and --run-heads choose otherwise.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--layer` and the options that go with it."""
    group = parser.add_argument_group("one layer of a model")
    group.add_argument(
        "--layer", action="store_true", help="time mask making, work order, sparse and dense attention of one layer"
    )
    group.add_argument("--model", metavar="NAME", help="a published shape; `--layer --list` prints them")
    group.add_argument(
        "--grid", type=int, nargs=3, metavar=("F", "Y", "X"), help="tokens per axis, instead of the model's"
    )
    group.add_argument("--tokens", type=int, metavar="T", help="a shape of your own, with the three that follow")
    group.add_argument("--heads", type=int, metavar="N", help="its heads")
    group.add_argument("--head-dim", type=int, metavar="H", help="its head width")
    group.add_argument("--layers", type=int, metavar="L", help="its layers")
    group.add_argument("--branches", type=int, metavar="C", help="its forwards per step: 2 with guidance (default: 1)")
    group.add_argument("--run-heads", type=int, metavar="N", help="run this many of the heads (default: all)")
    group.add_argument(
        "--predictor",
        action="append",
        metavar="NAME",
        help="exact (largest probability above a threshold), exact-mass (smallest set with a share of the mass) or "
        "mean-query; repeatable (default: all three)",
    )
    rule = group.add_mutually_exclusive_group()
    rule.add_argument("--threshold", type=float, metavar="C", help="keep scores above C / keys (exact 0.5, mean 0.1)")
    rule.add_argument("--top-p", type=float, metavar="P", help="keep this share of the scores (exact-mass: 0.95)")
    rule.add_argument("--top-k", type=int, metavar="K", help="keep this many keys per row; takes no --density")
    group.add_argument("--query-block", type=int, metavar="M", help="queries per slice (default: 128)")
    group.add_argument(
        "--query-order",
        metavar="NAME",
        help="raster, cubes, cubes_4x4x8 (any sides), hilbert or morton (default: cubes)",
    )
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: 50)")
    group.add_argument("--refresh-every", type=int, metavar="N", help="steps from mask to mask (default: 10)")
    group.add_argument("--density", type=float, nargs="+", metavar="D", help="densities of the masks (default: 0.3)")
    group.add_argument("--implementation", metavar="NAME", help="of sparse attention (default: the fastest)")
    group.add_argument("--dtype", metavar="NAME", help="of q, k, v (default: float32 on a CPU, else bfloat16)")
    group.add_argument("--png", type=Path, metavar="FILE", help="draw the rows of this run alone into a picture")


def refuse_without_layer(args: argparse.Namespace) -> None:
    """Raise `ValueError` for an option that only `--layer` takes."""
    for name in _OPTIONS:
        if getattr(args, name) is not None:
            raise ValueError(f"`--{name.replace('_', '-')}` goes with `--layer`: add that or drop it")


def run(args: argparse.Namespace) -> int:
    """Measures one layer, prints the table, writes rows, picture and report; returns 0."""
    _check(args)

    from fgattn_jax.evaluation import benchmark_report, layer, layer_report, layer_timing, model_shapes, tables

    if args.list:
        lines = [
            (s.name, s.title, "x".join(map(str, s.grid)), s.num_tokens, s.num_heads, s.head_dim, s.num_layers,
             s.num_branches)
            for s in model_shapes.SHAPES
        ]  # fmt: skip
        header = ("model", "what it is", "grid", "tokens", "heads", "head width", "layers", "forwards per step")
        print(tables.format_text(header, lines))
        return 0

    rows_file = args.rows or FOLDER / ROWS
    rows = tables.read_rows(rows_file)
    if not args.render_only:
        setup = make_setup(args)
        layer_timing.check(setup)
        if args.png is not None or not args.rows_only:
            layer_report.require_matplotlib()
        source = dict(tables.provenance(_command(args, setup)))
        if args.commit:
            source["commit"] = args.commit
        measured = layer_timing.measure(setup, lambda line: print(line, file=sys.stderr, flush=True))
        new = [{**row, "rounds": args.rounds, **source} for row in measured]
        rows = layer.replace_rows(rows, new)
        tables.write_rows(rows_file, rows)
        print(layer_report.text_table(new))
        if args.png is not None:
            layer_report.draw(new, args.png)
    if not args.rows_only:
        others_file = rows_file.with_name(OTHER_ROWS)
        others = tables.read_rows(others_file)
        benchmark_report.render(others, args.out, rows_name=others_file.as_posix(), layer_rows=rows)
        benchmark_report.update_readme(others, args.readme, layer_rows=rows)
        print(f"wrote {args.out} from {len(rows)} rows of layers", file=sys.stderr)
    return 0


def make_setup(args: argparse.Namespace) -> "LayerSetup":
    """What the options ask for on this machine.

    Raises:
        ValueError: A name or a size is wrong.
    """
    import jax

    from fgattn_jax.evaluation.layer import PREDICTORS, LayerSetup

    on_cpu = jax.default_backend() == "cpu"
    shape = _shape(args, on_cpu)
    heads = args.run_heads
    if heads is None:
        heads = min(shape.num_heads, _CPU_HEADS) if on_cpu and args.tokens is None else shape.num_heads
    if heads > shape.num_heads:
        raise ValueError(f"expected `--run-heads` of at most the layer's heads={shape.num_heads}, got {heads}")
    chosen = {name: getattr(args, name) for name in _DEFAULTS}
    chosen = {name: _DEFAULTS[name] if value is None else value for name, value in chosen.items()}
    return LayerSetup(
        shape,
        heads,
        args.dtype or ("float32" if on_cpu else "bfloat16"),
        predictors=tuple(dict.fromkeys(args.predictor or PREDICTORS)),
        rule=_rule(args),
        densities=tuple(dict.fromkeys(args.density or (0.3,))),
        implementation=args.implementation,
        rounds=args.rounds,
        **chosen,
    )


def _shape(args: argparse.Namespace, on_cpu: bool) -> "ModelShape":
    from fgattn_jax.evaluation import model_shapes

    if args.tokens is not None:
        grid = model_shapes.grid_of(args.tokens) if args.grid is None else tuple(args.grid)
        sides = "x".join(map(str, grid))
        return model_shapes.ModelShape(
            "own",
            f"own layer, grid {sides}, {args.heads} heads of width {args.head_dim}",
            grid,
            args.heads,
            args.head_dim,
            args.layers,
            args.branches or 1,
        )
    shape = model_shapes.find(args.model or ("dit" if on_cpu else "wan-1.3b-480p"))
    if args.grid is not None:
        return model_shapes.with_grid(shape, tuple(args.grid))
    return model_shapes.with_grid(shape, model_shapes.smaller_grid(shape.grid, _CPU_TOKENS)) if on_cpu else shape


def _rule(args: argparse.Namespace) -> "Rule | None":
    from fgattn_jax.evaluation.layer import Rule

    for kind in ("threshold", "top_p", "top_k"):
        if getattr(args, kind) is not None:
            return Rule(kind, getattr(args, kind))
    return None


def _check(args: argparse.Namespace) -> None:
    from fgattn_jax.types import QUERY_BLOCKS

    for name in ("bench", "case"):
        if getattr(args, name) is not None:
            raise ValueError(f"`--{name}` does not go with `--layer`: drop one of them")
    if args.list or args.render_only:
        for name in _OPTIONS:
            if getattr(args, name) is not None:
                what = "list" if args.list else "render-only"
                raise ValueError(f"`--{name.replace('_', '-')}` does not go with `--{what}`, which measures nothing")
    sizes = (*_CUSTOM, "branches", "run_heads", "top_k", "steps", "refresh_every", "rounds")
    for name in sizes:
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"expected `--{name.replace('_', '-')}` of at least 1, got {value}")
    if args.grid is not None and min(args.grid) < 1:
        raise ValueError(f"expected three sides of at least 1 for `--grid`, got {' '.join(map(str, args.grid))}")
    given = [name for name in _CUSTOM if getattr(args, name) is not None]
    words = ", ".join(f"`--{name.replace('_', '-')}`" for name in _CUSTOM)
    if args.model is not None and (given or args.branches is not None):
        raise ValueError(f"expected `--model` or {words}, got both: a model has sizes of its own")
    if given and len(given) < len(_CUSTOM):
        missing = ", ".join(f"`--{name.replace('_', '-')}`" for name in _CUSTOM if name not in given)
        raise ValueError(f"expected all of {words} for a shape of your own; {missing} missing")
    if args.branches is not None and not given:
        raise ValueError(f"`--branches` goes with {words}: a model has its own")
    if args.tokens is not None and args.grid is not None and math.prod(args.grid) != args.tokens:
        raise ValueError(f"expected a `--grid` of tokens={args.tokens}, got {math.prod(args.grid)}")
    if args.head_dim is not None and (args.head_dim % 2 or args.head_dim < 16):
        raise ValueError(f"expected an even `--head-dim` of at least 16, got {args.head_dim}")
    if args.query_block is not None and args.query_block not in QUERY_BLOCKS:
        raise ValueError(f"expected `--query-block` of {', '.join(map(str, QUERY_BLOCKS))}; got {args.query_block}")
    if args.dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"expected `--dtype` of float32, bfloat16 or float16, got {args.dtype!r}")
    _check_masks(args)


def _check_masks(args: argparse.Namespace) -> None:
    from fgattn_jax.evaluation.layer import PREDICTORS
    from fgattn_jax.types import IMPLEMENTATIONS

    for name in args.predictor or ():
        if name not in PREDICTORS:
            raise ValueError(f"expected `--predictor` of {', '.join(PREDICTORS)}; got {name!r}")
    if args.implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"expected `--implementation` of {', '.join(IMPLEMENTATIONS)}; got {args.implementation!r}")
    if args.top_k is not None and args.density is not None:
        raise ValueError("`--top-k` says the density itself: drop `--density`, or give `--top-p` or `--threshold`")
    for density in args.density or ():
        if not 0.01 <= density <= 0.95:
            raise ValueError(f"expected `--density` from 0.01 to 0.95, got {density:g}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"expected `--top-p` above 0 and at most 1, got {args.top_p:g}")
    if args.threshold is not None and not 0 <= args.threshold < math.inf:
        raise ValueError(f"expected a finite `--threshold` of at least 0, got {args.threshold:g}")


def _command(args: argparse.Namespace, setup: "LayerSetup") -> str:
    """The call with what this machine chose, without files: paths are a machine's own."""
    from fgattn_jax.evaluation import model_shapes

    shape = setup.shape
    words: list[Any] = ["fgattn", "bench", "--layer"]
    if args.tokens is None:
        words += ["--model", shape.name]
        words += ["--grid", *shape.grid] if shape.grid != model_shapes.find(shape.name).grid else []
    else:
        words += ["--tokens", shape.num_tokens, "--grid", *shape.grid, "--heads", shape.num_heads]
        words += ["--head-dim", shape.head_dim, "--layers", shape.num_layers, "--branches", shape.num_branches]
    if setup.heads != shape.num_heads:
        words += ["--run-heads", setup.heads]
    for name in args.predictor or ():
        words += ["--predictor", name]
    if setup.rule is not None:
        words += [f"--{setup.rule.kind.replace('_', '-')}", f"{setup.rule.value:g}"]
    for name in ("query_block", "query_order", "steps", "refresh_every", "implementation", "dtype"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", getattr(args, name)]
    if args.density is not None:
        words += ["--density", *(f"{density:g}" for density in setup.densities)]
    return shlex.join(map(str, [*words, "--rounds", setup.rounds]))
