"""The mask options of `fgattn generate`: what they mean, which go together, and the predictor and policy they make."""

import argparse
import dataclasses
import math
from typing import Any, Literal

Predictor = Literal["exact", "exact-mass", "mean-query"]
Rule = Literal["tau", "mass", "top_k", "density"]

RULES: tuple[Rule, ...] = ("tau", "mass", "top_k", "density")
MASK_OPTIONS: tuple[str, ...] = (
    "dense_steps",
    "dense_layers",
    "refresh_every",
    "predictor",
    *RULES,
    "query_block",
    "query_order",
    "shared_masks",
    "masks_on_host",
    "compare_dense",
)
"""Options that dense attention has no use for."""

_TAU: dict[Predictor, float] = {"exact": 0.5, "mean-query": 0.1}
_MASS = 0.95
_REFRESH_EVERY = 15
_QUERY_BLOCK = 128
_QUERY_ORDER = "cubes"


@dataclasses.dataclass(frozen=True)
class MaskOptions:
    """How masks are made and kept.

    Attributes:
        method: "cached" or "mean-query", as `--attention` says.
        predictor: Who makes them.
        rule: What is kept, by name.
        amount: Threshold in units of 1 / keys, share of the mass, keys, or share of the keys.
        query_block: Queries per slice.
        query_order: Name of the order.
        refresh_every: Steps between refreshes.
        dense_steps: Dense steps at the start.
        dense_layers: Layers that are always dense.
        shared: One set of masks for both branches.
        on_host: Masks in host memory.
        num_tokens: Queries and keys that masks are about.
    """

    method: Literal["cached", "mean-query"]
    predictor: Predictor
    rule: Rule
    amount: float
    query_block: int
    query_order: str
    refresh_every: int
    dense_steps: int
    dense_layers: tuple[int, ...]
    shared: bool
    on_host: bool
    num_tokens: int

    @property
    def keeps_masks(self) -> bool:
        """Whether a step uses masks of an earlier one."""
        return self.refresh_every > 1

    def describe(self) -> str:
        """One line on what is kept and when masks are made."""
        rule = {
            "tau": f"probabilities above {self.amount:g} / keys",
            "mass": f"{self.amount:g} of the mass",
            "top_k": f"{self.amount:g} keys of every row",
            "density": f"{self.amount:g} of the keys of every row",
        }[self.rule]
        parts = [
            f"{self.predictor}, {rule}, {self.query_block} queries per slice in the order {self.query_order}",
            f"made every {self.refresh_every} steps" if self.keeps_masks else "made at every step",
        ]
        if self.dense_steps:
            parts.append(f"the first {self.dense_steps} steps dense")
        if self.dense_layers:
            parts.append(f"layers {', '.join(map(str, self.dense_layers))} dense")
        if self.shared:
            parts.append("shared by both branches")
        if self.on_host:
            parts.append("kept in host memory")
        return "; ".join(parts)

    def order_of(self, grid: tuple[int, int, int]) -> Any:
        """The query order on a token grid; None is raster.

        Raises:
            ValueError: There is no order of that name.
        """
        from fgattn_jax import query_order

        return None if self.query_order == "raster" else query_order.resolve(self.query_order, grid)

    def predictor_for(self, grid: tuple[int, int, int]) -> Any:
        """The predictor for a token grid."""
        from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor

        if self.rule == "tau":
            budget = Budget(threshold=self.amount / self.num_tokens)
        elif self.rule == "mass":
            budget = Budget(top_p=self.amount)
        else:
            budget = Budget(top_k=self._num_keys())
        order = self.order_of(grid)
        if self.predictor == "mean-query":
            return MeanQueryPredictor(self.query_block, order, budget=budget)
        statistic = "mass" if self.predictor == "exact-mass" else "peak"
        return ExactPredictor(self.query_block, order, statistic=statistic, budget=budget)

    def policy(self) -> Any:
        """The refresh policy."""
        from fgattn_jax.predictors import RefreshPolicy

        return RefreshPolicy(every=self.refresh_every, dense_first=self.dense_steps, dense_layers=self.dense_layers)

    def _num_keys(self) -> int:
        share = self.amount * self.num_tokens if self.rule == "density" else self.amount
        return max(1, round(share))


def check_masks(
    args: argparse.Namespace,
    *,
    num_tokens: int,
    num_layers: int,
    steps: int,
    num_branches: int,
    default_density: float | None,
) -> MaskOptions | None:
    """The mask options, checked; None with dense attention.

    Args:
        args: Options of the command.
        num_tokens: Video tokens.
        num_layers: Attentions of one forward.
        steps: Denoising steps.
        num_branches: Branches of guidance.
        default_density: Share of the keys to keep where no rule is given; None takes the predictor's rule.

    Raises:
        ValueError: An option is out of range, conflicts with another one, or has no effect.
    """
    method = args.attention or "cached"
    if method == "dense":
        for name in MASK_OPTIONS:
            if getattr(args, name) not in (None, False):
                raise ValueError(f"`{_flag(name)}` has no effect with `--attention dense`: drop one of them")
        return None
    predictor, rule, amount = _rule(args, method, num_tokens, default_density)
    if method == "mean-query" and args.refresh_every not in (None, 1):
        raise ValueError(
            f"expected no `--refresh-every` with `--attention mean-query`, which makes masks at every step; got "
            f"refresh_every={args.refresh_every}: use `--attention cached --predictor mean-query`"
        )
    every = 1 if method == "mean-query" else args.refresh_every
    every = _REFRESH_EVERY if every is None else every
    if every < 1:
        raise ValueError(f"expected `--refresh-every` of at least 1, got refresh_every={every}")
    dense_steps = 0 if args.dense_steps is None else args.dense_steps
    if not 0 <= dense_steps < steps:
        raise ValueError(
            f"expected `--dense-steps` in 0 .. steps-1={steps - 1}, got dense_steps={dense_steps}: all steps dense is "
            "`--attention dense`"
        )
    if args.shared_masks and num_branches == 1:
        raise ValueError("`--shared-masks` has no effect without classifier-free guidance, one branch a step: drop it")
    if args.masks_on_host and every == 1:
        raise ValueError("`--masks-on-host` has no effect where masks are made at every step and none is kept: drop it")
    return MaskOptions(
        method=method,
        predictor=predictor,
        rule=rule,
        amount=amount,
        query_block=args.query_block or _QUERY_BLOCK,
        query_order=args.query_order or _QUERY_ORDER,
        refresh_every=every,
        dense_steps=dense_steps,
        dense_layers=_layers(args.dense_layers, num_layers),
        shared=args.shared_masks,
        on_host=args.masks_on_host,
        num_tokens=num_tokens,
    )


def _rule(
    args: argparse.Namespace, method: str, num_tokens: int, default_density: float | None
) -> tuple[Predictor, Rule, float]:
    given: list[Rule] = [rule for rule in RULES if getattr(args, rule) is not None]
    if len(given) > 1:
        names = ", ".join(f"`{_flag(rule)}`" for rule in given)
        raise ValueError(f"expected at most one of `--tau`, `--mass`, `--top-k` and `--density`, got {names}: drop one")
    rule: Rule | None = given[0] if given else None
    predictor: Predictor | None = args.predictor
    if method == "mean-query":
        if predictor not in (None, "mean-query"):
            raise ValueError(
                f"expected no `--predictor` with `--attention mean-query`, got predictor={predictor}: use "
                "`--attention cached`"
            )
        predictor = "mean-query"
    if rule is None and default_density is not None:
        rule, amount = "density", default_density
    elif rule is None:
        # Each predictor has a rule that it was made for; ranking masses is quicker than ranking peaks.
        rule = "mass" if predictor == "exact-mass" else "tau"
        amount = _MASS if rule == "mass" else _TAU[predictor or "exact"]
    else:
        amount = getattr(args, rule)
    if predictor is None:
        predictor = "exact" if rule == "tau" else "exact-mass"
    if rule == "tau" and predictor == "exact-mass":
        raise ValueError("`--tau` is for `--predictor exact` or `mean-query`; `exact-mass` takes `--mass`")
    if rule == "mass" and predictor == "exact":
        raise ValueError("`--mass` is for `--predictor exact-mass` or `mean-query`; `exact` takes `--tau`")
    if rule == "tau" and not 0 <= amount < math.inf:
        raise ValueError(f"expected a finite `--tau` >= 0, got tau={amount}")
    if rule in ("mass", "density") and not 0 < amount <= 1:
        raise ValueError(f"expected 0 < `{_flag(rule)}` <= 1, got {rule}={amount}")
    if rule == "top_k" and not 1 <= amount <= num_tokens:
        raise ValueError(f"expected `--top-k` in 1 .. {num_tokens} (keys of this clip), got top_k={amount}")
    return predictor, rule, amount


def _layers(text: str | None, num_layers: int) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"expected `--dense-layers` as numbers with commas, for instance 0,1; got {text!r}") from error
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"expected `--dense-layers` in -{num_layers} .. {num_layers - 1} for this model, got layer={layer}"
            )
    return layers


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
