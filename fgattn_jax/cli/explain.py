"""`fgattn explain`: which implementation would run a call of these shapes, and why."""

import argparse
import json
import math

_DTYPES = ("float32", "bfloat16", "float16")

_EPILOG = """\
Nothing is computed and nothing large is allocated: the call is described by shapes alone.

examples:
  fgattn explain                                         a small call on this machine
  fgattn explain --queries 32760 --heads 12 --head-dim 128 --dtype bfloat16 --density 0.2
  fgattn explain --dense                                 the same call without a mask
  fgattn explain --implementation cuda                   why that one does not run here
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the options of `fgattn explain`."""
    parser = subparsers.add_parser(
        "explain",
        description="Which implementation would run a call, why the others would not, and what the mask saves.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="batch size (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=4096, metavar="T", help="queries (default: %(default)s)")
    parser.add_argument("--keys", type=int, metavar="S", help="keys (default: as many as queries)")
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, metavar="K", help="key and value heads (default: as query heads)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="H", help="head width (default: %(default)s)")
    parser.add_argument("--query-block", type=int, default=64, metavar="M", help="queries per slice (default: 64)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="dtype of q, k, v (default: float32)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--density", type=float, default=0.2, metavar="D", help="share of kept slices (default: 0.2)")
    what.add_argument("--dense", action="store_true", help="no mask at all")
    parser.add_argument("--implementation", metavar="NAME", help="ask for this one: reference, xla, pallas or cuda")
    parser.add_argument("--json", action="store_true", help="write JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the explanation; returns 0 if the call would run, 1 if nothing runs it."""
    keys = args.queries if args.keys is None else args.keys
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    sizes = {
        "--batch": args.batch,
        "--queries": args.queries,
        "--keys": keys,
        "--heads": args.heads,
        "--kv-heads": kv_heads,
        "--head-dim": args.head_dim,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected `{name}` of at least 1, got {size}")
    if not 0.0 <= args.density <= 1.0:
        raise ValueError(f"expected `--density` between 0 and 1, got {args.density}")

    import jax
    import jax.numpy as jnp

    import fgattn_jax

    dtype = jnp.dtype(args.dtype)
    query = jax.ShapeDtypeStruct((args.batch, args.queries, args.heads, args.head_dim), dtype)
    key = jax.ShapeDtypeStruct((args.batch, keys, kv_heads, args.head_dim), dtype)
    mask = None
    if not args.dense:
        mask = jax.eval_shape(
            lambda: fgattn_jax.masks.full(
                batch=args.batch,
                num_heads=args.heads,
                num_queries=args.queries,
                num_keys=keys,
                query_block=args.query_block,
            )
        )
    explanation = fgattn_jax.explain(query, key, key, mask, implementation=args.implementation)

    density = 1.0 if args.dense else args.density
    rows = math.ceil(args.queries / args.query_block)
    # Two products of 2*H operations for every query and kept key.
    dense_gflop = 4e-9 * args.batch * args.heads * args.queries * keys * args.head_dim
    facts = {
        "platform": jax.default_backend(),
        "query": [*query.shape],
        "key": [*key.shape],
        "dtype": args.dtype,
        "query_block": None if args.dense else args.query_block,
        "density": density,
        "kept_slices": None if args.dense else round(density * args.batch * args.heads * rows * keys),
        "mask_bytes": 0 if mask is None else mask.nbytes,
        "gflop": round(density * dense_gflop, 6),
        "gflop_dense": round(dense_gflop, 6),
    }
    if args.json:
        answer = {"implementation": explanation.implementation, "reasons": explanation.reasons, **facts}
        print(json.dumps(answer, indent=2))
    else:
        print(f"query [B, T, N, H] = {facts['query']}, key and value [B, S, K, H] = {facts['key']}, {args.dtype}")
        if args.dense:
            print(f"no mask: {dense_gflop:.3g} GFLOP")
        else:
            print(
                f"mask: {args.query_block} queries per slice, density {density:.3g}, "
                f"{facts['kept_slices']:,} slices kept, {facts['mask_bytes'] / 1e6:.3g} MB of bits, "
                f"{facts['gflop']:.3g} GFLOP instead of {dense_gflop:.3g}"
            )
        print(f"platform: {facts['platform']}\n")
        print(explanation)
    return 0 if explanation.implementation is not None else 1
