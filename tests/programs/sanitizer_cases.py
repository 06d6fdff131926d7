"""Small calls of every form of a kernel, for compute-sanitizer: one line per call, fails on wrong results.

    compute-sanitizer --tool memcheck  python tests/programs/sanitizer_cases.py cuda
    compute-sanitizer --tool racecheck python tests/programs/sanitizer_cases.py cuda
    compute-sanitizer --tool initcheck python tests/programs/sanitizer_cases.py pallas
    compute-sanitizer --tool synccheck python tests/programs/sanitizer_cases.py pallas
    compute-sanitizer --tool memcheck  python tests/programs/sanitizer_cases.py masks

Set XLA_PYTHON_CLIENT_ALLOCATOR=platform, so that every array is an allocation of its own and memcheck sees its borders.
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from attention_bounds import CEILING
from cuda_cases import edge_counts, rows_with_counts
from mask_cases import Scored, make, mean_scores, unpack

from fgattn_jax.evaluation.cases import AttentionCase, make_inputs
from fgattn_jax.evaluation.oracle import attention_oracle
from fgattn_jax.masks import from_rows
from fgattn_jax.masks._bits import full_words
from fgattn_jax.pallas_kernels import attention as pallas_attention
from fgattn_jax.xla_ffi import attention as cuda_attention
from fgattn_jax.xla_ffi import masks, one_pass

KERNELS = {"cuda": cuda_attention.forward, "pallas": pallas_attention.forward}
KEYS = 333  # counts of none, one, all, around tiles; no multiple of 32


def check(case: AttentionCase, kernel: str, *, stray_bits: bool, with_work: bool) -> None:
    inputs = make_inputs(case)
    num_rows = -(-case.num_queries // case.query_block)
    rng = np.random.default_rng(0)
    counts = rng.choice(edge_counts(case.num_keys), num_rows * case.num_heads).tolist()
    rows = rows_with_counts(counts, case.num_keys, rng).reshape(1, case.num_heads, num_rows, case.num_keys)
    mask = from_rows(jnp.asarray(rows), query_block=case.query_block, num_queries=case.num_queries)
    bits = mask.bits | ~jnp.asarray(full_words(case.num_keys)) if stray_bits else mask.bits
    output, lse = KERNELS[kernel](
        inputs.query, inputs.key, inputs.value, bits, inputs.mask.query_order,
        mask.with_work_order().work_order if with_work else None, scale=case.scale, query_block=case.query_block,
    )  # fmt: skip
    expected, expected_lse = attention_oracle(
        inputs.query, inputs.key, inputs.value, rows, query_block=case.query_block, scale=case.scale,
        order=inputs.order,
    )  # fmt: skip
    error = np.abs(np.asarray(output, np.float64) - expected).max()
    finite = np.isfinite(expected_lse)
    lse_error = np.abs(np.asarray(lse)[finite] - expected_lse[finite]).max(initial=0)
    print(f"{case.name}: output error {error:.1e}, LSE error {lse_error:.1e}", flush=True)
    if error > CEILING[case.dtype] or lse_error > 1e-3 or not np.isneginf(np.asarray(lse)[~finite]).all():
        raise SystemExit(f"wrong results: {case}")


def check_masks(scored: Scored) -> None:
    """All kernels that make masks, against float64."""
    arrays = [jnp.asarray(x) for x in (scored.query, scored.key, scored.lse)]
    limits = jnp.full((scored.query.shape[2],), np.log(2.0 / KEYS), jnp.float32)
    order = None if scored.order is None else jnp.asarray(scored.order)
    how = {"scale": jnp.float32(scored.scale), "query_block": scored.query_block}
    peaks, masses = scored.of_rows(np.max), scored.of_rows(np.sum)
    mean, means = mean_scores(scored, 1), mean_scores(scored, 2)
    top_k = masks.SelectRule(top_k=40, head_floor=0.5)
    found = {
        "exact": (masks.exact_mask(*arrays, limits, order, keep_best=True, **how), peaks, None),
        "mass": (masks.exact_mass(*arrays, order, masks.SelectRule(top_k=40), **how), masses, 40),
        "mean": (masks.mean_mask(*arrays[:2], limits, order, keep_best=True, **how), mean, None),
        "means": (masks.mean_mask(*arrays[:2], limits, order, num_means=2, keep_best=True, **how), means, None),
        "ranked means": (masks.mean_mask(*arrays[:2], top_k, order, num_means=2, **how), means, 40),
        "one pass": (one_pass.attention_and_mask(
            arrays[0], arrays[1], arrays[1], arrays[2], limits, order, keep_best=True, **how,
        )[2:], peaks, None),
    }  # fmt: skip
    compare(scored, found)


def check_candidates(scored: Scored) -> None:
    """Enough keys for candidates; those of the last head are all equal, so that its rows go the other way."""
    key = scored.key.copy()
    key[:, :, -1] = 0
    scored = dataclasses.replace(scored, key=key)
    order = None if scored.order is None else jnp.asarray(scored.order)
    how = {"scale": jnp.float32(scored.scale), "query_block": scored.query_block}
    means = mean_scores(scored, 1)
    best = masks.mean_mask(jnp.asarray(scored.query), jnp.asarray(key), masks.SelectRule(top_k=1200), order, **how)
    share = masks.mean_mask(jnp.asarray(scored.query), jnp.asarray(key), masks.SelectRule(top_p=0.7), order, **how)
    fewest = (np.cumsum(-np.sort(-means, axis=-1), axis=-1) < 0.7).sum(-1) + 1
    compare(scored, {"best candidates": (best, means, 1200), "a share": (share, means, fewest)})


def compare(scored: Scored, found: dict[str, Any]) -> None:
    """What kernels kept beside the scores that they rank or compare, and how many they should keep."""
    for name, ((bits, counts), scores, count) in found.items():
        kept = unpack(np.asarray(bits), scored.key.shape[1])
        least, most = np.where(kept, scores, np.inf).min(-1), np.where(kept, -np.inf, scores).max(-1)
        wanted = (
            np.maximum((scores > 2.0 / KEYS).sum(-1), 1) if count is None else np.minimum(count, scored.key.shape[1])
        )
        off = int(np.abs(kept.sum(-1) - wanted).max())
        print(f"{name}, {scored.query.dtype}, {scored.query.shape}: counts off by {off}", flush=True)
        if (np.asarray(counts) != kept.sum(-1)).any() or off > 2 or (least < most * 0.99).any():
            raise SystemExit(f"wrong mask: {name}")


def main(kernel: str) -> None:
    if kernel == "masks":
        for dtype, head_dim, query_block in itertools.product(("bfloat16", "float16"), (64, 128), (64, 128)):
            sizes = {"head_dim": head_dim, "query_block": query_block, "dtype": dtype, "scale": head_dim**-0.5}
            check_masks(make(2 * query_block + 37, KEYS, heads=(4, 2), ordered=query_block == 64, **sizes))
        check_masks(make(1, 1, head_dim=128, scale=0.1))
        check_candidates(make(150, 4200, heads=(4, 2), head_dim=128, scale=0.1))
        check_candidates(
            make(150, 4200, heads=(4, 2), head_dim=64, query_block=64, dtype="float16", scale=0.1, ordered=True)
        )
        return
    forms = itertools.product(("bfloat16", "float16"), (64, 128), (64, 128), (False, True))
    for dtype, head_dim, query_block, ordered in forms:
        case = AttentionCase(
            f"{dtype}, H={head_dim}, M={query_block}, {'ordered' if ordered else 'raster'}", "", num_keys=KEYS,
            num_queries=2 * query_block + 37, num_heads=4, num_kv_heads=2, head_dim=head_dim, query_block=query_block,
            dtype=dtype, ordered=ordered,
        )  # fmt: skip
        check(case, kernel, stray_bits=ordered, with_work=ordered)
    for num_queries, num_keys in ((1, 1), (1, 129), (65, 31)):
        case = AttentionCase(
            f"T={num_queries}, S={num_keys}", "", num_queries=num_queries, num_keys=num_keys, head_dim=128,
            query_block=128, dtype="bfloat16",
        )  # fmt: skip
        check(case, kernel, stray_bits=True, with_work=False)


main(sys.argv[1])
