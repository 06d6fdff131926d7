"""`fgattn demo`: the shipped video DiT denoises a clip twice, dense and with cached slice masks."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

_PREDICTORS = ("exact-mass", "exact", "mean-query")
_LABELS = ("bunny", "bikes", "carphone", "scene")
_FRAMES = (16, 32)
_STEPS_CPU, _STEPS_DEVICE, _STEPS_QUICK = 12, 30, 4
_THETA = 0.97
_TAU = {"exact": 0.5, "mean-query": 0.1}

_EPILOG = """\
Both runs start from the same noise, so that the sparse clip can be compared with the dense one pixel by pixel.
Masks are made at refresh steps, which run dense, and reused by the steps after them.

examples:
  fgattn demo                                      about two minutes on two CPU cores; a GPU is used where there is one
  fgattn demo --quick                              4 steps, to see that everything works
  fgattn demo --label bunny --theta 0.9            keep 90 % of the probability mass of every row
  fgattn demo --predictor mean-query --tau 0.2     score keys against mean queries, keep what exceeds 0.2 / keys
  fgattn demo --query-order raster                 what compact rows are worth: compare the densities
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the options of `fgattn demo`."""
    parser = subparsers.add_parser(
        "demo",
        description="Denoise a clip twice with the shipped video DiT, dense and with cached slice masks, from the same "
        "noise; write pictures, GIFs and figures.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="folder of the results (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"Euler steps (default: {_STEPS_CPU} on a CPU, {_STEPS_DEVICE} elsewhere)",
    )
    parser.add_argument("--label", choices=_LABELS, default="carphone", help="class of the clip (default: %(default)s)")
    parser.add_argument("--frames", type=int, choices=_FRAMES, default=16, help="16: 4096 tokens; 32: 8192")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="W",
        help="classifier-free guidance; 1 is none, else twice the work",
    )
    parser.add_argument(
        "--predictor",
        choices=_PREDICTORS,
        default="exact-mass",
        help="how masks are made: smallest set of keys with a share of the mass; largest probability above a "
        "threshold; key against the mean query (default: %(default)s)",
    )
    parser.add_argument(
        "--theta", type=float, metavar="P", help=f"share of the mass for exact-mass or mean-query (default: {_THETA})"
    )
    parser.add_argument(
        "--tau", type=float, metavar="C", help="threshold C / keys for exact or mean-query (default: 0.5 and 0.1)"
    )
    parser.add_argument(
        "--query-block",
        type=int,
        choices=(16, 32, 64, 128),
        default=64,
        help="queries per slice (default: %(default)s)",
    )
    parser.add_argument(
        "--query-order",
        default="cubes",
        metavar="NAME",
        help="raster, cubes, cubes_2x8x8 (any sides), hilbert or morton (default: %(default)s)",
    )
    parser.add_argument(
        "--refresh-every", type=int, metavar="N", help="steps between refreshes (default: half of the steps)"
    )
    parser.add_argument(
        "--dense-first", type=int, metavar="N", help="dense steps before the first masks (default: a tenth, at least 1)"
    )
    parser.add_argument("--quick", action="store_true", help=f"{_STEPS_QUICK} steps")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="other weights than the shipped ones")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; returns 0."""
    _check(args)

    import jax
    import jax.numpy as jnp

    from fgattn_jax.cli import _demo_pictures, _demo_results, _demo_run
    from fgattn_jax.evaluation import metrics, tables
    from fgattn_jax.models.dit.weights import load_pretrained, load_weights

    platform = jax.default_backend()
    dtype = jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    default_steps = _STEPS_CPU if platform == "cpu" else _STEPS_DEVICE
    steps = args.steps or (_STEPS_QUICK if args.quick else default_steps)
    if args.dense_first is not None and args.dense_first >= steps:
        raise ValueError(f"expected `--dense-first` below the steps={steps}, got dense_first={args.dense_first}")
    model = load_pretrained(dtype=dtype) if args.weights is None else load_weights(args.weights, dtype=dtype)[0]
    config = model.config
    label = _LABELS.index(args.label)
    if label >= config.num_classes:
        raise ValueError(f"expected a class of these weights (num_classes={config.num_classes}), got {args.label!r}")
    frames = args.frames * config.num_frames // _FRAMES[0]
    grid = config.grid(frames, config.height, config.width_pixels)
    predictor = make_predictor(args, grid)
    policy = make_policy(args, steps)
    # Before minutes of work, not after them.
    args.out.mkdir(parents=True, exist_ok=True)

    source = dict(tables.provenance("fgattn demo"))
    runs_as = _explain(math.prod(grid), config, args, dtype)
    tokens = math.prod(grid)
    print(f"{args.label}, {frames} frames, {tokens} tokens, {steps} Euler steps; {source['device']}, {dtype.name}")
    print(f"masks: {args.predictor}, {_rule_text(args)}, {args.query_block} queries per slice, {args.query_order}")
    print(f"{policy.describe()}\n")

    noise = jax.random.normal(jax.random.key(args.seed), (1, frames, config.height, config.width_pixels, 3))
    denoiser = _demo_run.Denoiser(model, predictor, label=label, guidance=args.guidance)
    dense = denoiser.run(noise, None, num_steps=steps, title="dense")
    sparse = denoiser.run(noise, policy, num_steps=steps, title="sparse")
    clips = [jnp.clip(jnp.asarray(each.video), -1, 1) for each in (sparse, dense)]
    psnr, ssim = float(metrics.psnr(*clips)), float(metrics.ssim(*clips))
    times = _demo_run.time_attention(sparse, predictor, config=config, dtype=dtype)
    names = _demo_pictures.write_pictures(args.out, dense, sparse)

    results = _demo_results.results(args, source, dense, sparse, times)
    results |= {"psnr": None if math.isinf(psnr) else psnr, "ssim": ssim, "tokens": math.prod(grid), "steps": steps}
    results["implementation"] = runs_as
    (args.out / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
    _demo_results.print_tables(results)
    print(f"\nin {args.out}: {', '.join([*names, 'metrics.json'])}")
    return 0


def make_predictor(args: argparse.Namespace, grid: tuple[int, int, int]) -> Any:
    """The predictor of the options, for a token grid.

    Raises:
        ValueError: The order does not exist or a share or threshold is out of range.
    """
    from fgattn_jax import query_order
    from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor

    order = None if args.query_order == "raster" else query_order.resolve(args.query_order, grid)
    if args.tau is None and args.predictor != "exact":
        budget = Budget(top_p=_THETA if args.theta is None else args.theta)
    else:
        tau = _TAU[args.predictor] if args.tau is None else args.tau
        budget = Budget(threshold=tau / math.prod(grid))
    if args.predictor == "mean-query":
        return MeanQueryPredictor(args.query_block, order, budget=budget)
    statistic = "mass" if args.predictor == "exact-mass" else "peak"
    return ExactPredictor(args.query_block, order, statistic=statistic, budget=budget)


def make_policy(args: argparse.Namespace, steps: int) -> Any:
    """The refresh policy of the options."""
    from fgattn_jax.predictors import RefreshPolicy

    every = max(1, (steps + 1) // 2) if args.refresh_every is None else args.refresh_every
    # Noise decides where a clip goes: masks of the first step cost more quality than they save (docs/study.md).
    dense_first = min(max(1, steps // 10), steps - 1) if args.dense_first is None else args.dense_first
    return RefreshPolicy(every=every, dense_first=dense_first)


def _check(args: argparse.Namespace) -> None:
    least = {"--steps": args.steps, "--refresh-every": args.refresh_every}
    for name, value in least.items():
        if value is not None and value < 1:
            raise ValueError(f"expected `{name}` of at least 1, got {value}")
    if args.dense_first is not None and args.dense_first < 0:
        raise ValueError(f"expected `--dense-first` of at least 0, got dense_first={args.dense_first}")
    if not math.isfinite(args.guidance):
        raise ValueError(f"expected a finite `--guidance`, got guidance={args.guidance}")
    if args.tau is not None and args.theta is not None:
        raise ValueError("expected one of `--theta` and `--tau`, got both: drop one")
    if args.tau is not None and args.predictor == "exact-mass":
        raise ValueError("`--tau` is for `--predictor exact` or `mean-query`; `exact-mass` takes `--theta`")
    if args.theta is not None and args.predictor == "exact":
        raise ValueError("`--theta` is for `--predictor exact-mass` or `mean-query`; `exact` takes `--tau`")
    if args.theta is not None and not 0 < args.theta <= 1:
        raise ValueError(f"expected 0 < `--theta` <= 1, got theta={args.theta}")
    if args.tau is not None and not 0 <= args.tau < math.inf:
        raise ValueError(f"expected a finite `--tau` >= 0, got tau={args.tau}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"expected `--out` to be a folder, {str(args.out)!r} is a file")


def _rule_text(args: argparse.Namespace) -> str:
    if args.tau is None and args.predictor != "exact":
        return f"share {_THETA if args.theta is None else args.theta:g}"
    return f"threshold {_TAU[args.predictor] if args.tau is None else args.tau:g} / keys"


def _explain(tokens: int, config: Any, args: argparse.Namespace, dtype: Any) -> dict[str, str]:
    """What implementation runs under masks and without, in words."""
    import jax

    import fgattn_jax

    batch = 1 if args.guidance == 1 else 2
    query = jax.ShapeDtypeStruct((batch, tokens, config.num_heads, config.head_dim), dtype)
    mask = jax.eval_shape(
        lambda: fgattn_jax.masks.full(
            batch=batch,
            num_heads=config.num_heads,
            num_queries=tokens,
            num_keys=tokens,
            query_block=args.query_block,
        )
    )
    answers = {
        "dense": fgattn_jax.explain(query, query, query),
        "sparse": fgattn_jax.explain(query, query, query, mask),
    }
    return {name: f"{answer.implementation} ({answer.kernel})" for name, answer in answers.items()}
