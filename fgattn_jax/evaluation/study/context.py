"""What all sections of the study share: the model, its clips, dense baselines, and how a point becomes a row."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgattn_jax import query_order
from fgattn_jax.evaluation import metrics
from fgattn_jax.evaluation.study import attention, runs
from fgattn_jax.evaluation.tables import Row


@dataclasses.dataclass(frozen=True)
class StudyModel:
    """A model for the study, without its module.

    Attributes:
        params: Parameters, a pytree.
        make_apply: `make_apply(attention)` gives the function of `runs.Apply` with that attention seam.
        num_layers: Layers.
        num_heads: Heads.
        patch: Frames, rows and columns of a token.
        clip: Frames, rows and columns of a clip in pixels.
        labels: Name of every class.
    """

    params: Any
    make_apply: Callable[[Any], runs.Apply]
    num_layers: int
    num_heads: int
    patch: tuple[int, int, int]
    clip: tuple[int, int, int]
    labels: tuple[str, ...]

    def grid(self, frames: int) -> tuple[int, int, int]:
        """Token grid of a clip of so many frames."""
        sizes = (frames, *self.clip[1:])
        return tuple(size // patch for size, patch in zip(sizes, self.patch, strict=True))  # type: ignore[return-value]


_ABSENT = object()


class Context:
    """One study: compiled programs and dense baselines are kept, so that sections share them.

    Args:
        model: What to study.
        seeds: Seeds of the noise; every label runs with every seed.
        deadline: Value of `time.monotonic()` after which sections stop; None never.
        quick: Fewer points and steps.
        known: Rows measured before, which are not measured again.
        report: Called with a line per measured point.
    """

    def __init__(
        self,
        model: StudyModel,
        *,
        seeds: Sequence[int] = (0, 1),
        deadline: float | None = None,
        quick: bool = False,
        known: Sequence[Row] = (),
        report: Callable[[str], None] = print,
    ):
        self.model, self.seeds, self.deadline, self.quick, self.report = model, tuple(seeds), deadline, quick, report
        self._known = list(known)
        self._applies: dict[int, runs.Apply] = {}
        self._dense: dict[tuple[int, int, int], np.ndarray] = {}

    @property
    def frames(self) -> int:
        """Frames of the clips, unless a section asks for others."""
        return self.model.clip[0]

    @property
    def steps(self) -> int:
        """Euler steps, unless a section asks for others."""
        return 6 if self.quick else 30

    @property
    def usual(self) -> dict[str, Any]:
        """When sections make masks unless they vary it: after a few dense steps, and again half a run later."""
        return {"dense_first": 1 if self.quick else 2, "refresh_every": self.steps // 2}

    @property
    def labels(self) -> np.ndarray:
        """Label of every clip of a run."""
        return np.tile(np.arange(len(self.model.labels), dtype=np.int32), len(self.seeds))

    def out_of_time(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def known(self, **cells: Any) -> list[Row]:
        """Rows measured before that have these cells."""
        return [row for row in self._known if all(row.get(name, _ABSENT) == cell for name, cell in cells.items())]

    def apply(self, query_block: int) -> runs.Apply:
        """The model with a study attention of this block; one object per block, so that programs are reused."""
        if query_block not in self._applies:
            self._applies[query_block] = self.model.make_apply(attention.StudyAttention(query_block))
        return self._applies[query_block]

    def noise(self, frames: int) -> jax.Array:
        """Start of a run: seed by seed, label by label. A label and a seed always give the same noise."""
        shape = (len(self.model.labels), frames, *self.model.clip[1:], 3)
        return jnp.concatenate([jax.random.normal(jax.random.key(seed), shape) for seed in self.seeds])

    def order(self, name: str, frames: int) -> np.ndarray:
        """A query order of the token grid by name."""
        return query_order.resolve(name, self.model.grid(frames))

    def run(self, settings: attention.Settings, *, query_block: int, frames: int) -> runs.RunOutput:
        """One denoising run of all labels and seeds."""
        return runs.run_sparse(
            self.model.params,
            self.noise(frames),
            jnp.asarray(self.labels),
            settings,
            apply=self.apply(query_block),
            num_layers=self.model.num_layers,
            num_heads=self.model.num_heads,
            query_block=query_block,
        )

    def dense_video(self, *, num_steps: int, frames: int, query_block: int) -> np.ndarray:
        """Clips of the dense run, by the program of the sparse runs, so that nothing but masks differs; kept."""
        which = (num_steps, frames, query_block)
        if which not in self._dense:
            settings = runs.make_settings(self.order("raster", frames), num_steps=num_steps, top_p=1.0, refresh_every=1)
            settings = settings._replace(
                refresh=jnp.zeros(attention.MAX_STEPS, bool), dense=jnp.ones(attention.MAX_STEPS, bool)
            )
            video = self.run(settings, query_block=query_block, frames=frames).video
            self._dense[which] = np.clip(np.asarray(video), -1, 1)
        return self._dense[which]

    def point(
        self,
        section: str,
        *,
        order: str = "cubes",
        query_block: int = 64,
        frames: int | None = None,
        num_steps: int | None = None,
        statistic: str = "mass",
        rule: str = "top_p",
        value: float = 0.95,
        refresh_every: int | None = None,
        dense_first: int = 0,
        dense_at_refresh: bool = True,
        **more: Any,
    ) -> Row:
        """Measure one setting against dense, paired by label and seed.

        Args:
            section: Name of the section the row belongs to.
            order: Name of the query order.
            query_block: Queries per slice.
            frames: Frames of the clips; None is the model's own.
            num_steps: Euler steps; None is the study's.
            statistic: Score, one of `attention.STATISTICS`.
            rule: "top_p" or "threshold" (then `value` counts in `1 / S`).
            value: Of the rule.
            refresh_every: Steps between refreshes; None refreshes once.
            dense_first: Dense steps at the start.
            dense_at_refresh: Whether refresh steps run dense.
            more: Further cells of the row.

        Returns:
            A row. `density` is the mean over steps under masks, `work` the mean over all steps (dense ones count 1).
        """
        frames = self.frames if frames is None else frames
        num_steps = self.steps if num_steps is None else num_steps
        indices = self.order(order, frames)
        cells = {
            "section": section,
            "statistic": statistic,
            "rule": rule,
            "value": value,
            "order": order,
            "query_block": query_block,
            "tokens": len(indices),
            "steps": num_steps,
            "refresh_every": refresh_every,
            "dense_first": dense_first,
            "dense_at_refresh": dense_at_refresh,
            **more,
        }
        measured = self.known(**cells, clips=len(self.labels))
        if measured:
            return measured[0]
        settings = runs.make_settings(
            indices,
            num_steps=num_steps,
            statistic=statistic,
            threshold=value / len(indices) if rule == "threshold" else None,
            top_p=value if rule == "top_p" else None,
            refresh_every=refresh_every,
            dense_first=dense_first,
            dense_at_refresh=dense_at_refresh,
        )
        start = time.monotonic()
        output = self.run(settings, query_block=query_block, frames=frames)
        video = np.clip(np.asarray(output.video), -1, 1)
        seconds = time.monotonic() - start
        dense = self.dense_video(num_steps=num_steps, frames=frames, query_block=query_block)
        row = {
            **cells,
            **density_cells(np.asarray(output.density), np.asarray(settings.dense), num_steps),
            **self.quality_cells(video, dense),
            "seconds": round(seconds, 2),
        }
        self.report(
            f"{section}: {statistic} {rule} {value:g} {order} M={query_block} T={len(indices)} {num_steps} steps, "
            f"refresh {refresh_every}: density {row['density']}, {row['psnr']} dB (least {row['psnr_least']})"
        )
        return row

    def quality_cells(self, video: np.ndarray, reference: np.ndarray) -> Row:
        """PSNR and SSIM over clips: mean, least, and mean PSNR per label. Equal clips count as 120 dB."""
        psnr, ssim = (np.asarray(part) for part in _quality(jnp.asarray(video), jnp.asarray(reference)))
        psnr = np.minimum(psnr, 120.0)  # JSON has no infinity
        cells = {
            "clips": len(psnr),
            "psnr": round(float(psnr.mean()), 2),
            "psnr_least": round(float(psnr.min()), 2),
            "ssim": round(float(ssim.mean()), 5),
            "ssim_least": round(float(ssim.min()), 5),
        }
        for number, name in enumerate(self.model.labels):
            cells[f"psnr_{name}"] = round(float(psnr[self.labels == number].mean()), 2)
        return cells


def density_cells(density: np.ndarray, dense: np.ndarray, num_steps: int) -> Mapping[str, float | None]:
    """`density` over steps under masks (None if there is none) and `work` over all steps.

    Args:
        density: `[steps, L, B]`, 1 at dense steps.
        dense: bool `[steps]`.
        num_steps: Steps that ran.
    """
    density, masked = density[:num_steps], ~dense[:num_steps]
    under_masks = round(float(density[masked].mean()), 4) if masked.any() else None
    return {"density": under_masks, "work": round(float(density.mean()), 4)}


@jax.jit
def _quality(video: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    return metrics.psnr(video, reference), metrics.ssim(video, reference)
