"""Sections of the study: each yields data rows, the most wanted ones first, so that a short run has them too."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgattn_jax.evaluation import shares
from fgattn_jax.evaluation.study import attention, runs
from fgattn_jax.evaluation.study.context import Context
from fgattn_jax.evaluation.tables import Row
from fgattn_jax.masks import _bits

HALF_RUN = "half"
"""A refresh period of half the steps (15 of 30): the setting that sections share unless they vary it."""


def negligible(context: Context) -> Iterator[Row]:
    """Negligible share of slices and blocks by shape, order, layer and time (the paper's table 2)."""
    labels = jnp.arange(len(context.model.labels), dtype=jnp.int32)
    noise = context.noise(context.frames)[: len(labels)]
    for order in ("raster", "cubes"):
        if known := context.known(section="negligible", order=order, steps=context.steps, clips=len(labels)):
            yield from known
            continue
        indices = jnp.asarray(context.order(order, context.frames))
        _, seen = runs.run_dense(
            context.model.params,
            noise,
            labels,
            indices,
            apply=context.apply(64),
            num_steps=context.steps,
            probe=_probe_shares,
        )
        for shape, measured in zip(("slice", "block"), seen, strict=True):
            measured = np.asarray(measured).mean((2, 3))  # [steps, L, sizes]
            for number, size in enumerate(shares.BLOCKS):
                values = measured[..., number]
                thirds = [part.mean() for part in np.array_split(values, 3)]
                row = {
                    "section": "negligible",
                    "order": order,
                    "shape": f"{size}x{1 if shape == 'slice' else size}",
                    "tokens": len(indices),
                    "steps": context.steps,
                    "clips": len(labels),
                    "share": round(float(values.mean()), 4),
                    **{f"share_third_{n + 1}": round(float(part), 4) for n, part in enumerate(thirds)},
                    **{f"share_layer_{n}": round(float(part), 4) for n, part in enumerate(values.mean(0))},
                }
                yield row
        context.report(f"negligible: {order} done")


def mask_agreement(context: Context) -> Iterator[Row]:
    """How masks of one step agree with those of later steps, and what probability mass they still hold."""
    labels = jnp.arange(len(context.model.labels), dtype=jnp.int32)[: 1 if context.quick else None]
    noise = context.noise(context.frames)
    references = (0, 2) if context.quick else (0, 1, 2, 5, 10, 15, 20)
    indices = context.order("cubes", context.frames)
    num_keys = len(indices)
    # Clip by clip: the masses of all steps and layers of one clip are half a gigabyte.
    for label in labels:
        name = context.model.labels[int(label)]
        if known := context.known(section="agreement", label=name, steps=context.steps):
            yield from known
            continue
        _, seen = runs.run_dense(
            context.model.params,
            noise[label][None],
            label[None],
            runs.make_settings(indices, num_steps=context.steps, top_p=0.95),
            apply=context.apply(64),
            num_steps=context.steps,
            probe=_probe_masks,
        )
        for statistic, rule in (("peak", "threshold 0.5/S"), ("mass", "top_p 0.95")):
            bits = seen[statistic]
            for reference in references:
                measured = jax.device_get(_compare(bits, seen["masses"], reference, num_keys))
                for step in range(reference, context.steps):
                    cells = {key: round(float(value[step]), 4) for key, value in measured.items()}
                    yield {
                        "section": "agreement",
                        "label": name,
                        "statistic": statistic,
                        "rule": rule,
                        "order": "cubes",
                        "query_block": 64,
                        "tokens": num_keys,
                        "steps": context.steps,
                        "reference_step": reference,
                        "step": step,
                        **cells,
                    }
        context.report(f"agreement: {name} done")


def thresholds(context: Context) -> Iterator[Row]:
    """Quality and density over the share of the mass and over the threshold on the peak; cached masks."""
    from_start = {**context.usual, "dense_first": 0}
    for when in (context.usual, from_start):
        for theta in (0.95, 0.9) if context.quick else (0.95, 0.97, 0.98, 0.99, 0.995, 0.925, 0.9, 0.85, 0.8):
            yield context.point("thresholds", statistic="mass", rule="top_p", value=theta, **when)
    for when in (context.usual,) if context.quick else (context.usual, from_start):
        for c in (0.5,) if context.quick else (0.5, 0.1, 0.2, 0.3, 0.4, 0.7, 1.0, 2.0, 4.0, 8.0):
            yield context.point("thresholds", statistic="peak", rule="threshold", value=c, **when)


def orders(context: Context) -> Iterator[Row]:
    """Raster, cube and Hilbert query orders over shares of the mass, to be compared at equal density."""
    values = (0.95,) if context.quick else (0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)
    cases = {64: ("raster", "hilbert", "cubes", "cubes_2x8x4"), 128: ("raster", "hilbert", "cubes", "cubes_2x8x8")}
    for block in (64,) if context.quick else (64, 128):
        for order in cases[block]:
            for theta in values:
                yield context.point("orders", order=order, query_block=block, value=theta, **context.usual)


def refresh(context: Context) -> Iterator[Row]:
    """How long masks may be kept, and how much it matters when the first ones are made."""
    periods = (2, 3) if context.quick else (15, 1, 2, 3, 5, 8, 10, None)
    first = context.usual["dense_first"]
    for dense_first in (first,) if context.quick else (first, 0):
        for every in periods:
            yield context.point("refresh", value=0.95, refresh_every=every, dense_first=dense_first)
    if context.quick:
        return
    for every in periods:
        yield context.point(
            "refresh", statistic="peak", rule="threshold", value=0.5, refresh_every=every, dense_first=first
        )
    # Noise decides where a clip goes: what are masks worth that are not used, or not made, at the first steps?
    for dense_first in (0, 1, 2, 3, 5, 8):
        for theta in (0.9, 0.95, 0.97, 0.99, 0.995):
            yield context.point("first masks", value=theta, refresh_every=15, dense_first=dense_first)


def mean_query(context: Context) -> Iterator[Row]:
    """Masks from the mean query: made at every step and used at once, or cached as exact ones are."""
    shares_kept = (0.95,) if context.quick else (0.8, 0.9, 0.95, 0.97, 0.99, 0.995)
    values = (0.1,) if context.quick else (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    points = [("top_p", value) for value in shares_kept] + [("threshold", value) for value in values]
    for every, dense in ((1, False), (context.usual["refresh_every"], True)):
        for rule, value in points:
            yield context.point(
                "mean query",
                statistic="mean",
                rule=rule,
                value=value,
                refresh_every=every,
                dense_first=context.usual["dense_first"],
                dense_at_refresh=dense,
            )


def sampling_steps(context: Context) -> Iterator[Row]:
    """Does caching survive few steps? Runs of 50, 20, 8 and 4 steps, refreshed in the middle, once, or never cached."""
    for steps in (4,) if context.quick else (50, 30, 20, 8, 4):
        for theta in (0.95,) if context.quick else (0.9, 0.95, 0.99):
            for every, what in ((steps // 2, HALF_RUN), (None, "once")):
                yield context.point("sampling steps", num_steps=steps, value=theta, refresh_every=every, schedule=what)
            if not context.quick:
                yield context.point(
                    "sampling steps",
                    num_steps=steps,
                    value=theta,
                    refresh_every=None,
                    dense_first=1,
                    schedule="once, after one dense step",
                )
                yield context.point(
                    "sampling steps",
                    num_steps=steps,
                    value=theta,
                    refresh_every=1,
                    dense_at_refresh=False,
                    schedule="every step, used at once",
                )


def block_sizes(context: Context) -> Iterator[Row]:
    """Queries per slice from 16 to 128 over shares of the mass."""
    for block in (32,) if context.quick else (16, 32, 64, 128):
        for theta in (0.95,) if context.quick else (0.9, 0.925, 0.95, 0.97, 0.99):
            yield context.point("block sizes", query_block=block, value=theta, **context.usual)


def long_clips(context: Context) -> Iterator[Row]:
    """Clips of twice the length: 8192 tokens instead of 4096."""
    if context.quick:
        return
    frames = 2 * context.frames
    for theta in (0.95, 0.9, 0.97, 0.99, 0.995):
        yield context.point("long clips", frames=frames, value=theta, **context.usual)
    for c in (0.5, 0.2):
        yield context.point("long clips", frames=frames, statistic="peak", rule="threshold", value=c, **context.usual)


def spread(context: Context) -> Iterator[Row]:
    """How unevenly rows are filled: spread of kept counts within and between heads, by layer."""
    num_steps, frames = context.steps, context.frames
    cases = [("mass", "top_p", 0.95), ("mass", "top_p", 0.9), ("peak", "threshold", 0.5), ("mean", "top_p", 0.95)]
    for order in ("cubes", "raster"):
        for statistic, rule, value in cases[:1] if context.quick else cases:
            which = {"section": "spread", "order": order, "statistic": statistic, "rule": rule, "value": value}
            if known := context.known(**which, steps=num_steps):
                yield from known
                continue
            indices = context.order(order, frames)
            settings = runs.make_settings(
                indices,
                num_steps=num_steps,
                statistic=statistic,
                threshold=value / len(indices) if rule == "threshold" else None,
                top_p=value if rule == "top_p" else None,
                **context.usual,
            )
            counts = np.asarray(context.run(settings, query_block=64, frames=frames).counts)  # [L, B, N, R]
            for layer, measured in [("all", counts), *enumerate(counts)]:
                cells = shares.count_spread(measured)._asdict()
                yield {
                    **which,
                    "steps": num_steps,
                    "query_block": 64,
                    "tokens": len(indices),
                    "layer": layer,
                    "density": round(float(measured.mean()) / len(indices), 4),
                    **{key: round(cell, 4) for key, cell in cells.items()},
                }
            context.report(f"spread: {order} {statistic} done")


SECTIONS: dict[str, Callable[[Context], Iterator[Row]]] = {
    "negligible": negligible,
    "thresholds": thresholds,
    "agreement": mask_agreement,
    "refresh": refresh,
    "orders": orders,
    "mean query": mean_query,
    "sampling steps": sampling_steps,
    "block sizes": block_sizes,
    "long clips": long_clips,
    "spread": spread,
}
"""Sections in the order they run: those that others lean on first."""
PARTS: dict[str, tuple[str, ...]] = {"refresh": ("first masks",)}
"""Rows of a section that the report shows under another name."""


def _probe_shares(query_order: jax.Array, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negligible shares of every head, slices and blocks: `[B, N, sizes]` each."""

    def one(entry: tuple[jax.Array, jax.Array]) -> shares.NegligibleShares:
        scores = attention.scaled_scores(entry[0][query_order][:, None], entry[1][query_order])  # [N, T, 1, S]
        probabilities = jax.nn.softmax(scores[:, :, 0], axis=-1)
        return shares.negligible_shares(probabilities, 0.5 / key.shape[1])

    return tuple(jax.lax.map(one, (query, key)))


def _probe_masks(settings: attention.Settings, query: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    """Masks of both rules as bits `[B, N, R, W]`, and the masses `[B, N, R, S]` in float16, of 64 queries per slice."""
    _, num_tokens, num_heads, width = query.shape

    def one(entry: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        rows = entry[0][settings.query_order].reshape(-1, 64, num_heads, width)
        probabilities = jax.nn.softmax(attention.scaled_scores(rows, entry[1]), axis=-1)  # [N, R, M, S]
        peak, mass = probabilities.max(2), probabilities.sum(2)
        flat = mass.reshape(-1, mass.shape[-1])
        kept = attention.select_traced(flat, settings.threshold, settings.top_p).reshape(mass.shape)
        return {
            "peak": _bits.pack_rows(peak > 0.5 / num_tokens),
            "mass": _bits.pack_rows(kept),
            "masses": mass.astype(jnp.float16),
        }

    return jax.lax.map(one, (query, key))


@jax.jit
def _compare(bits: jax.Array, masses: jax.Array, reference: Any, num_keys: int) -> dict[str, jax.Array]:
    """The masks of step `reference` against those of every step; bits `[steps, L, B, N, R, W]`."""
    old = bits[reference]
    old_counts = _bits.count_bits(old)
    old_rows = _bits.unpack_words(old, masses.shape[-1])

    def one(entry: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        new, mass = entry
        both = jnp.sum(_bits.count_bits(old & new).astype(jnp.float32))
        counts = _bits.count_bits(new)
        wanted, kept = (jnp.sum(part.astype(jnp.float32)) for part in (counts, old_counts))
        weight = mass.astype(jnp.float32)
        return {
            "iou": both / (wanted + kept - both),
            "recall": both / wanted,
            "iou_random": shares.random_iou(old_counts, counts, num_keys),
            "mass_recall": jnp.sum(jnp.where(old_rows, weight, 0)) / jnp.sum(weight),
            "density": kept / old_counts.size / num_keys,
        }

    return jax.lax.map(one, (bits, masses))
