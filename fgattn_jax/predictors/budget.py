"""The budget: how many keys a row keeps, whatever score ranks them."""

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any, Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many keys a row keeps: one rule for the scores of every predictor.

    Keys are ranked by score, the lower key index first where scores are equal. A row keeps its best

        `min(max(rule, min_keys, floor of its head), max_keys)`

    keys, and the keys named in `keep` on top. `rule` is one of `threshold`, `top_p` and `top_k`; a budget that gives
    none of them takes the default of the predictor it is handed to.

    With `min_keys >= 1` (the default) no row is ever empty: a row whose scores are all below the threshold keeps its
    best key. The number of keys is exact: ties never add a key, and the set that `top_p` takes is the smallest one
    (up to float32 rounding of the sum). A score that is NaN is kept before all others, so that a broken input shows
    in the output as it would in dense attention.

    The object is immutable and hashable: hand it to `jax.jit` as a static argument or close over it.

    Attributes:
        threshold: Keep keys whose score is greater than this. Scores are probabilities (`"peak"`, mean query) or
            sums of up to `M` of them (`"mass"`). The paper writes it as `c / S`. One number, or one per query head:
            `N` numbers, any sequence or array known before tracing, stored as a tuple. A budget with one per head
            that ranks keys as well (`min_keys` above 1, `max_keys`, `head_floor`) or selects by mass has no kernel
            of its own: such masks are made in XLA operations on every device.
        top_p: Keep the smallest set of keys that holds this share of the row's score, `0 < top_p <= 1`.
        top_k: Keep this many keys.
        min_keys: At least this many keys per row. 0 allows empty rows.
        max_keys: At most this many keys per row, `keep` not counted. None: no cap.
        head_floor: Per-head floor, `0 <= head_floor <= 1`: every row of a head keeps at least
            `floor(head_floor * mean)` keys, where `mean` is the mean of `max(rule, min_keys)` over the queries of that
            head (a row counts once per query it holds, so a ragged last row counts less). 1.0 is the floor of SCOPE.
            A floor scores every row twice.
        keep: Keys that every row keeps (text, sinks), as indices; negative ones count from the end, so
            `keep=range(-256, 0)` are the last 256 keys. Kept in addition to the best keys, which are ranked among
            all keys. Any iterable of integers; stored as a sorted tuple.

    Raises:
        ValueError: A value is out of its range, or more than one of `threshold`, `top_p`, `top_k` is given.

    References:
        FG-Attn (arXiv 2509.16518), threshold `c / S`; SpargeAttention2 (arXiv 2602.13515), union of top-k and top-p;
        SCOPE (arXiv 2608.12780), per-head floor.
    """

    threshold: float | Iterable[float] | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_keys: int = 1
    max_keys: int | None = None
    head_floor: float = 0.0
    keep: Iterable[int] | None = None

    def __post_init__(self):
        given = [name for name in ("threshold", "top_p", "top_k") if getattr(self, name) is not None]
        if len(given) > 1:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in given)
            raise ValueError(f"expected at most one of `threshold`, `top_p`, `top_k`, got {values}: drop all but one")
        if self.threshold is not None:
            threshold = _thresholds(self.threshold)
            if not all(0.0 <= each < math.inf for each in np.atleast_1d(threshold)):
                raise ValueError(
                    f"expected a finite `threshold` >= 0, got threshold={threshold}: scores are probabilities, "
                    "give for instance 0.5 / num_keys"
                )
            object.__setattr__(self, "threshold", threshold)
        if self.top_p is not None:
            top_p = _real("top_p", self.top_p)
            if not 0.0 < top_p <= 1.0:
                raise ValueError(f"expected 0 < `top_p` <= 1, got top_p={top_p}: give the share of the score to hold")
            object.__setattr__(self, "top_p", top_p)
        if self.top_k is not None:
            object.__setattr__(self, "top_k", _count("top_k", self.top_k, least=1))
        object.__setattr__(self, "min_keys", _count("min_keys", self.min_keys, least=0))
        if self.max_keys is not None:
            max_keys = _count("max_keys", self.max_keys, least=1)
            if self.min_keys > max_keys:
                raise ValueError(
                    f"expected `min_keys` <= `max_keys`, got min_keys={self.min_keys} and max_keys={max_keys}: "
                    "lower `min_keys` or raise `max_keys`"
                )
            if self.top_k is not None and self.top_k > max_keys:
                raise ValueError(
                    f"expected `top_k` <= `max_keys`, got top_k={self.top_k} and max_keys={max_keys}: give one of them"
                )
            object.__setattr__(self, "max_keys", max_keys)
        head_floor = _real("head_floor", self.head_floor)
        if not 0.0 <= head_floor <= 1.0:
            raise ValueError(
                f"expected 0 <= `head_floor` <= 1, got head_floor={head_floor}: it is a share of the head's mean count"
            )
        object.__setattr__(self, "head_floor", head_floor)
        if self.keep is not None:
            object.__setattr__(self, "keep", _indices(self.keep))

    @property
    def has_rule(self) -> bool:
        """Whether `threshold`, `top_p` or `top_k` is given."""
        return not (self.threshold is None and self.top_p is None and self.top_k is None)

    def with_default(self, *, threshold: float | None = None, top_p: float | None = None) -> Self:
        """This budget, with the given rule where it has none of its own."""
        return self if self.has_rule else dataclasses.replace(self, threshold=threshold, top_p=top_p)

    def kept_keys(self, num_keys: int) -> tuple[int, ...]:
        """The keys of `keep` as sorted indices in `0 .. num_keys-1`.

        Raises:
            ValueError: An index is outside `-num_keys .. num_keys-1`.
        """
        keep = tuple(self.keep or ())
        for index in keep:
            if not -num_keys <= index < num_keys:
                raise ValueError(
                    f"expected the indices in `keep` to lie in -{num_keys} .. {num_keys - 1}, got {index} for "
                    f"num_keys={num_keys}: drop it or check the number of keys"
                )
        return tuple(sorted({index % num_keys for index in keep}))

    def thresholds(self, num_heads: int) -> np.ndarray | None:
        """The threshold of every head, float64 `[N]`; None if the rule is another one.

        Raises:
            ValueError: There is one threshold per head, and not for `num_heads` of them.
        """
        if self.threshold is None:
            return None
        given = np.asarray(self.threshold, np.float64)
        if given.ndim and given.size != num_heads:
            raise ValueError(
                f"expected one `threshold` or num_heads={num_heads} of them, got {given.size}: give one per query head"
            )
        return np.broadcast_to(given, (num_heads,))

    def check_fits(self, num_keys: int, num_heads: int) -> None:
        """Refuse a budget that asks for more keys than there are, or has thresholds for other heads.

        Raises:
            ValueError: `min_keys` or `top_k` is greater than `num_keys`, or `keep` names a key that does not exist.
        """
        for name in ("min_keys", "top_k"):
            value = getattr(self, name)
            if value is not None and value > num_keys:
                raise ValueError(f"expected `{name}` <= num_keys={num_keys}, got {name}={value}: lower `{name}`")
        self.kept_keys(num_keys)
        self.thresholds(num_heads)


def _thresholds(given: Any) -> float | tuple[float, ...]:
    """One number, or a tuple of them, as Python floats."""
    if np.ndim(given) == 0:
        return _real("threshold", given)
    if np.ndim(given) != 1 or not len(given):
        raise ValueError(
            f"expected one number or one per head for `threshold`, got shape={np.shape(given)}: give `N` numbers"
        )
    return tuple(_real("threshold", each) for each in given)


def _real(name: str, value: float) -> float:
    """`value` as a Python float, or a ValueError that names it."""
    if isinstance(value, bool | np.bool_ | str):
        raise ValueError(f"expected a number for `{name}`, got {name}={value!r}: give a Python float")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected a number known before tracing for `{name}`, got {type(value).__name__}: give a Python float"
        ) from error
    if math.isnan(number):
        raise ValueError(f"expected a number for `{name}`, got {name}=nan: a NaN compares with nothing")
    return number


def _count(name: str, value: int, *, least: int) -> int:
    """`value` as a Python int of at least `least`, or a ValueError that names it."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"expected an integer for `{name}`, got {name}={value!r}: give a Python int") from error
    if number < least:
        raise ValueError(f"expected `{name}` >= {least}, got {name}={number}: it is a number of keys per row")
    return number


def _indices(keep: Iterable[int]) -> tuple[int, ...]:
    """`keep` as a sorted tuple of Python ints without repeats."""
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise ValueError(f"expected key indices for `keep`, got keep={keep!r}: give for instance range(-256, 0)")
    indices = []
    for index in keep:
        if isinstance(index, bool | np.bool_):
            raise ValueError(
                "expected key indices for `keep`, got booleans: give the indices (np.flatnonzero of the booleans)"
            )
        try:
            indices.append(operator.index(index))
        except TypeError as error:
            raise ValueError(
                f"expected key indices for `keep`, got {index!r}: give integers, for instance range(-256, 0)"
            ) from error
    return tuple(sorted(set(indices)))
