"""Section `check` of the study: its runs against the shipped sampler, predictor and attention."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from fgattn_jax.evaluation import metrics
from fgattn_jax.evaluation.study import runs
from fgattn_jax.evaluation.study.context import Context
from fgattn_jax.predictors import Budget, ExactPredictor, RefreshPolicy

if TYPE_CHECKING:
    from fgattn_jax.evaluation.tables import Row

_SHARE = 0.95
_BLOCK = 64


def check(context: Context, model: Any) -> "Iterator[Row]":
    """Dense and sparse clips of one setting, by the study and by `fgattn_jax.models.dit.sampling.sample`.

    Args:
        context: The study.
        model: The shipped `DiT`, with its own attention.
    """
    if known := context.known(section="check", steps=context.steps):
        yield from known
        return

    from fgattn_jax.models.dit.sampling import sample

    frames, steps, every = context.frames, context.steps, max(1, context.steps // 2)
    order = context.order("cubes", frames)
    noise, labels = context.noise(frames), jnp.asarray(context.labels)
    settings = runs.make_settings(order, num_steps=steps, statistic="mass", top_p=_SHARE, refresh_every=every)
    here_sparse = context.run(settings, query_block=_BLOCK, frames=frames)
    here_dense = context.dense_video(num_steps=steps, frames=frames, query_block=_BLOCK)
    masked = ~np.asarray(settings.dense)[:steps]
    density = np.asarray(here_sparse.density)[:steps][masked].mean()

    predictor = ExactPredictor(_BLOCK, order, statistic="mass", budget=Budget(top_p=_SHARE))
    there_dense = sample(model, noise, labels, steps=steps)
    there_sparse = sample(model, noise, labels, steps=steps, predictor=predictor, refresh=RefreshPolicy(every=every))
    density_shipped = np.asarray(there_sparse.density)[masked].mean()

    clips = {
        "dense: here, shipped": (here_dense, there_dense.video),
        "sparse: here, shipped": (here_sparse.video, there_sparse.video),
        "shipped: sparse, dense": (there_sparse.video, there_dense.video),
        "here: sparse, dense": (here_sparse.video, here_dense),
    }
    for what, pair in clips.items():
        psnr = np.minimum(np.asarray(metrics.psnr(*(jnp.clip(jnp.asarray(clip), -1, 1) for clip in pair))), 120.0)
        row = {
            "section": "check",
            "what": what,
            "statistic": "mass",
            "rule": "top_p",
            "value": _SHARE,
            "order": "cubes",
            "query_block": _BLOCK,
            "tokens": len(order),
            "steps": steps,
            "refresh_every": every,
            "clips": len(psnr),
            "density": round(float(density), 4),
            "density_shipped": round(float(density_shipped), 4),
            "psnr": round(float(psnr.mean()), 2),
            "psnr_least": round(float(psnr.min()), 2),
        }
        context.report(f"check: {what}: {row['psnr']} dB (least {row['psnr_least']})")
        yield row
