"""Pictures of `fgattn demo`."""

from pathlib import Path

import jax
import numpy as np
from PIL import Image

from fgattn_jax.cli._demo_run import DemoRun
from fgattn_jax.evaluation import pictures
from fgattn_jax.masks import SliceMask

DIFFERENCE_FACTOR = 8.0
"""Differences between clips are shown this much brighter."""
_MAP_SIZE = 128


def write_pictures(folder: Path, dense: DemoRun, sparse: DemoRun) -> list[str]:
    """Write all pictures; returns the names of the files, the most telling first.

    Args:
        folder: Where to; it exists.
        dense: The dense run.
        sparse: The run with masks.
    """
    clips = {name: pictures.to_pixels(run.video) for name, run in (("dense", dense), ("sparse", sparse))}
    for name, clip in clips.items():
        pictures.save_gif(folder / f"{name}.gif", clip)
    distance = pictures.difference(clips["sparse"], clips["dense"], DIFFERENCE_FACTOR)
    rows = [
        ("dense", clips["dense"]),
        ("sparse", clips["sparse"]),
        (f"|difference| x {DIFFERENCE_FACTOR:g}", distance),
    ]
    pictures.frame_grid(rows).save(folder / "side_by_side.png")

    # The density that masks have at each step: that of refreshed masks too, although a refresh step runs dense.
    under_masks = [_layer_density(sparse.mask_of_step(step), sparse.density[step]) for step in range(len(sparse.kinds))]
    pictures.heat_map(
        np.stack(under_masks, axis=1),
        title="density of the masks, by layer and step",
        line_label="layer",
        column_label="step (" + _kinds_text(sparse) + ")",
    ).save(folder / "density.png")
    names = ["side_by_side.png", "dense.gif", "sparse.gif", "density.png"]
    for step, mask in sparse.masks.items():
        rows_of = np.asarray(mask.to_rows())[:, 0]  # [L, N, R, S]
        maps, counts = f"masks_step_{step:02d}.png", f"kept_step_{step:02d}.png"
        _mask_maps(
            rows_of,
            f"masks made at step {step}: lines are rows of {mask.query_block} queries, columns are keys, white is kept",
        ).save(folder / maps)
        share = rows_of.mean(-1).reshape(-1, rows_of.shape[2])  # [L * N, R]
        pictures.heat_map(
            share,
            title=f"share of the keys that every row keeps, masks made at step {step}",
            line_label="layer.head",
            line_names=[f"{layer}.{head}" for layer in range(rows_of.shape[0]) for head in range(rows_of.shape[1])],
            column_label="row of queries",
            cell=max(3, min(12, 1536 // rows_of.shape[2])),
            numbers=False,
        ).save(folder / counts)
        names += [maps, counts]
    return names


def _layer_density(mask: SliceMask | None, computed: np.ndarray) -> np.ndarray:
    if mask is None:
        return computed
    return np.asarray(jax.device_get(mask.row_density())).mean((1, 2, 3))


def _kinds_text(run: DemoRun) -> str:
    made = ", ".join(str(step) for step in run.masks)
    dense = run.kinds.count("dense")
    return f"masks made at {made}" + (f"; first {dense} dense" if dense else "")


def _mask_maps(rows: np.ndarray, title: str) -> Image.Image:
    layers, heads = rows.shape[:2]
    cells = [
        [pictures.mask_map(rows[layer, head], width=_MAP_SIZE, height=_MAP_SIZE) for layer in range(layers)]
        for head in range(heads)
    ]
    return pictures.map_grid(
        cells,
        line_titles=[f"head {head}" for head in range(heads)],
        column_titles=[f"layer {layer}: {rows[layer].mean():.2f}" for layer in range(layers)],
        title=title,
    )
