"""One attention layer over denoising steps: what is asked, which masks answer it, and the arithmetic of the phases.

What a step takes on average follows from the times of the phases and the refresh policy:

- *exact* masks start from the LSE of dense attention. A refresh step runs `attention_with_lse`, whose output is the
  layer's, then makes the mask; every other step runs sparse attention.
- *mean-query* masks need no dense attention: every step runs sparse attention, a refresh step makes the mask before.
- The order of work is made for every sparse attention anew: cached masks carry bits alone.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fgattn_jax import query_order as orders
from fgattn_jax.evaluation.model_shapes import ModelShape
from fgattn_jax.evaluation.tables import Row
from fgattn_jax.predictors import AbstractPredictor, Budget, ExactPredictor, MeanQueryPredictor
from fgattn_jax.predictors.exact import MASS_SHARE, PEAK_THRESHOLD
from fgattn_jax.predictors.mean_query import MEAN_THRESHOLD
from fgattn_jax.predictors.refresh import StepKind
from fgattn_jax.types import Implementation

PREDICTORS = ("exact", "exact-mass", "mean-query")
"""Names of predictors: largest probability above a threshold, smallest set with a share of the mass, mean query."""

KEY = (
    *("device", "model", "grid", "text_tokens", "heads", "heads_measured", "head_dim", "layers", "branches", "dtype"),
    *("query_block", "query_order", "predictor", "rule", "target_density", "implementation", "steps", "refresh_every"),
)
"""Cells that say what was measured: a new row takes the place of an older one that agrees in all of them."""

_WIDEST_GAIN = 16.0
_SEARCH_STEPS = 10
_CLOSE_ENOUGH, _TOO_FAR = 0.005, 0.05


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which keys a row keeps, for every predictor alike: one of a budget's rules.

    Attributes:
        kind: "threshold" (in units of 1 / keys), "top_p" or "top_k".
        value: Its value.
    """

    kind: str
    value: float

    def __str__(self) -> str:
        words = {"threshold": "above {:g} / keys", "top_p": "share {:g}", "top_k": "best {:.0f} keys"}
        return words[self.kind].format(self.value)

    def budget(self, num_keys: int, keep: Iterable[int] | None) -> Budget:
        """The budget over `num_keys` keys; those of `keep` are kept by every row."""
        values: dict[str, float] = {
            "threshold": self.value / num_keys,
            "top_p": self.value,
            "top_k": int(self.value),
        }
        return Budget(**{self.kind: values[self.kind]}, keep=keep)  # type: ignore[arg-type]


_DEFAULT_RULES = {
    "exact": Rule("threshold", PEAK_THRESHOLD),
    "exact-mass": Rule("top_p", MASS_SHARE),
    "mean-query": Rule("threshold", MEAN_THRESHOLD),
}


@dataclasses.dataclass(frozen=True)
class LayerSetup:
    """What to measure.

    Attributes:
        shape: Sizes of the model.
        heads: Heads that run; those of the model, or fewer.
        dtype: Of query, key and value.
        query_block: `M`.
        query_order: Name of the order of the queries (`query_order.resolve`); "raster" is none.
        predictors: Among `PREDICTORS`.
        rule: Of all predictors; None is each one's own default.
        densities: Densities that the inputs are made for; empty takes the inputs as they come.
        steps: Denoising steps.
        refresh_every: Steps from one mask to the next.
        implementation: Of sparse attention; None is the fastest.
        rounds: Timed rounds.
    """

    shape: ModelShape
    heads: int
    dtype: str
    query_block: int = 128
    query_order: str = "cubes"
    predictors: tuple[str, ...] = PREDICTORS
    rule: Rule | None = None
    densities: tuple[float, ...] = (0.3,)
    steps: int = 50
    refresh_every: int = 10
    implementation: Implementation | None = None
    rounds: int = 7


@dataclasses.dataclass(frozen=True)
class PhaseTimes:
    """Milliseconds of the phases of one layer.

    Attributes:
        dense: Attention without a mask, the fastest there is.
        lse: Dense attention with its LSE, which exact predictors start from; None for predictors that need none.
        mask: The predictor.
        order: Order of work, where it is a call of its own; else 0.
        sparse: Attention under the mask, without what `order` counts.
    """

    dense: float
    lse: float | None
    mask: float
    order: float
    sparse: float

    @property
    def making(self) -> float:
        """What a refresh adds: the mask, and what the LSE costs over dense attention without it."""
        return self.mask + (0.0 if self.lse is None else self.lse - self.dense)


class StepParts(NamedTuple):
    """Milliseconds of one layer per denoising step, mean over all steps.

    Args:
        dense: Refresh steps of exact predictors: dense attention with LSE, which gives the layer's output as well.
        mask: Mask making.
        order: Order of work.
        sparse: Sparse attention.
    """

    dense: float
    mask: float
    order: float
    sparse: float


def step_parts(times: PhaseTimes, kinds: Sequence[StepKind]) -> StepParts:
    """Mean over the steps of a run; `kinds` as `RefreshPolicy.schedule` gives them."""
    refreshes, dense_steps = kinds.count("refresh"), kinds.count("dense")
    dense, sparse_steps = dense_steps * times.dense, len(kinds) - dense_steps
    if times.lse is not None:
        dense += refreshes * times.lse
        sparse_steps -= refreshes
    total = (dense, refreshes * times.mask, sparse_steps * times.order, sparse_steps * times.sparse)
    return StepParts(*(milliseconds / len(kinds) for milliseconds in total))


def break_even_uses(times: PhaseTimes) -> float | None:
    """Uses of a mask after which making it has paid; None where sparse attention is not faster than dense."""
    saved = times.dense - times.order - times.sparse
    return times.making / saved if saved > 0 else None


def find_gain(density_of: Callable[[float], float], target: float) -> tuple[float, float]:
    """Factor of the scores at which masks have a density, and the density that it gives.

    Larger factors make probabilities more uneven, so that fewer keys matter.

    Raises:
        ValueError: No factor comes near the density.
    """
    low, high = -math.log(_WIDEST_GAIN), math.log(_WIDEST_GAIN)
    tried: list[tuple[float, float]] = []
    for _ in range(_SEARCH_STEPS):
        gain = math.exp((low + high) / 2)
        tried.append((gain, density_of(gain)))
        if abs(tried[-1][1] - target) < _CLOSE_ENOUGH:
            break
        if tried[-1][1] > target:
            low = math.log(gain)
        else:
            high = math.log(gain)
    gain, density = min(tried, key=lambda each: abs(each[1] - target))
    if abs(density - target) > _TOO_FAR:
        raise ValueError(
            f"expected a `--density` that the predictor can have on these inputs, got density={target:g} where the "
            f"nearest found is {density:.3f}; choose another density or rule"
        )
    return gain, density


def make_predictor(name: str, setup: LayerSetup) -> tuple[AbstractPredictor, Rule]:
    """The predictor of a name for the setup's layer, and its rule. Text keys are kept by every row."""
    shape = setup.shape
    rule = setup.rule or _DEFAULT_RULES[name]
    keep = range(-shape.text_tokens, 0) if shape.text_tokens else None
    budget = rule.budget(shape.num_tokens, keep)
    budget.check_fits(shape.num_tokens, shape.num_heads)
    order = resolve_order(setup)
    if name == "mean-query":
        return MeanQueryPredictor(setup.query_block, order, budget=budget), rule
    statistic = "mass" if name == "exact-mass" else "peak"
    return ExactPredictor(setup.query_block, order, statistic=statistic, budget=budget), rule


def resolve_order(setup: LayerSetup) -> np.ndarray | None:
    """The order of the setup's queries, text tokens behind those of the grid; None is raster."""
    if setup.query_order == "raster":
        return None
    order = orders.resolve(setup.query_order, setup.shape.grid)
    return np.concatenate([order, np.arange(len(order), setup.shape.num_tokens, dtype=np.int32)])


def replace_rows(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The rows with new ones at the end, less those that answer the same question; other devices' stay."""
    asked = {tuple(row.get(cell) for cell in KEY) for row in new}
    return [*(row for row in rows if tuple(row.get(cell) for cell in KEY) not in asked), *new]
