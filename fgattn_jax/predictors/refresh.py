"""When masks are made anew: a policy over denoising steps, without state of its own."""

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

NEVER = -1
"""Age of a mask that was never made."""

StepKind = Literal["dense", "refresh", "cached"]


@dataclasses.dataclass(frozen=True)
class RefreshPolicy:
    """At which denoising steps masks are made, and where attention stays dense.

    Steps count from 0. A step is one of

    - *dense* (`step < dense_first`): attention is dense, no mask is used and none is made;
    - *refresh*: masks are made (exact predictors need dense attention for it, so this step usually runs dense);
    - *cached*: the masks of the last refresh are used.

    A step that is not dense is a refresh if any of these holds; the first one always is:

    - no mask was made yet (`age < 0`);
    - `every` is given and `step - dense_first` is a multiple of it;
    - `step` is in `steps`;
    - `max_age` is given and `age > max_age`.

    The default refreshes once, at the first step that is not dense, and keeps those masks to the end.

    Attributes:
        every: Refresh every this many steps, counted from `dense_first`. None: not periodically.
        steps: Steps to refresh at, as numbers of denoising steps (not of forwards). Those below `dense_first` would
            never refresh and are refused. Any iterable of integers; stored as a sorted tuple.
        dense_first: Number of dense steps at the start.
        dense_layers: Layers whose attention is always dense; negative ones count from the last layer. Any iterable
            of integers; stored as a sorted tuple.
        max_age: Greatest age, in steps, at which a mask is still used. A mask has age 0 at the step that made it.
        one_pass: Refreshes but the first of a run measure probabilities by the LSE of the last step, so that dense
            attention and the mask take one pass over the keys (`one_pass_refresh` says with which predictors, and
            what it saves where). For the layers of `fgattn_jax.nn`, which keep that LSE: `B * N * T` numbers each.

    Raises:
        ValueError: A value is out of range or not an integer known before tracing.

    Example:
        >>> policy = RefreshPolicy(every=15, dense_first=2, dense_layers=(0,))
        >>> policy.schedule(5)
        ('dense', 'dense', 'refresh', 'cached', 'cached')

    References:
        FG-Attn (arXiv 2509.16518) refreshes at given forwards; LoSA (arXiv 2608.12032) once, after dense steps.
    """

    every: int | None = None
    steps: Iterable[int] = ()
    dense_first: int = 0
    dense_layers: Iterable[int] = ()
    max_age: int | None = None
    one_pass: bool = False

    def __post_init__(self):
        set_field = object.__setattr__
        if self.every is not None:
            set_field(self, "every", _integer("every", self.every, least=1, unit="steps between refreshes"))
        set_field(self, "dense_first", _integer("dense_first", self.dense_first, least=0, unit="steps"))
        if self.max_age is not None:
            set_field(self, "max_age", _integer("max_age", self.max_age, least=0, unit="steps"))
        if not isinstance(self.one_pass, bool):
            raise ValueError(f"expected True or False for `one_pass`, got one_pass={self.one_pass!r}")
        set_field(self, "steps", _integers("steps", self.steps))
        set_field(self, "dense_layers", _integers("dense_layers", self.dense_layers))
        for step in self.steps:
            if step < self.dense_first:
                raise ValueError(
                    f"expected `steps` >= dense_first={self.dense_first}, got step={step}: "
                    "a dense step makes no mask; drop it or lower `dense_first`"
                )

    def is_dense_step(self, step: Int[Array, "..."] | int) -> Bool[Array, "..."]:
        """True where attention is dense and no mask is made.

        Args:
            step: Denoising step, an integer or a traced integer array.
        """
        return jnp.asarray(step) < self.dense_first

    def should_refresh(self, step: Int[Array, "..."] | int, age: Int[Array, "..."] | int) -> Bool[Array, "..."]:
        """True where masks are to be made at this step; usable as the predicate of `lax.cond` inside `lax.scan`.

        Args:
            step: Denoising step, an integer or a traced integer array.
            age: Steps since the cached mask was made, negative if it never was (`MaskCache.age`). Broadcasts
                against `step`: ages of several branches give one answer each.
        """
        step, age = jnp.asarray(step), jnp.asarray(age)
        due = age < 0
        if self.every is not None:
            due = due | ((step - self.dense_first) % self.every == 0)
        if self.steps:
            due = due | jnp.any(step[..., None] == jnp.asarray(self.steps), axis=-1)
        if self.max_age is not None:
            due = due | (age > self.max_age)
        return due & ~self.is_dense_step(step)

    def dense_layer_flags(self, num_layers: int) -> Bool[np.ndarray, " L"]:
        """True at the layers that are always dense, as a NumPy array (scan over it, or read it while tracing).

        Raises:
            ValueError: `num_layers` is below 1, or `dense_layers` names a layer that does not exist.
        """
        num_layers = _integer("num_layers", num_layers, least=1, unit="layers")
        flags = np.zeros(num_layers, bool)
        for layer in self.dense_layers:
            if not -num_layers <= layer < num_layers:
                raise ValueError(
                    f"expected `dense_layers` in -{num_layers} .. {num_layers - 1}, got layer={layer} for "
                    f"num_layers={num_layers}: drop it"
                )
            flags[layer] = True
        return flags

    def schedule(self, num_steps: int) -> tuple[StepKind, ...]:
        """What every step of a run of `num_steps` is, on the host: `"dense"`, `"refresh"` or `"cached"`.

        Raises:
            ValueError: `num_steps` is below 1.
        """
        num_steps = _integer("num_steps", num_steps, least=1, unit="steps")
        kinds: list[StepKind] = []
        age = NEVER
        for step in range(num_steps):
            if step < self.dense_first:
                kinds.append("dense")
            elif self._is_due(step, age):
                kinds.append("refresh")
                age = 0
            else:
                kinds.append("cached")
            age += age != NEVER
        return tuple(kinds)

    def _is_due(self, step: int, age: int) -> bool:
        periodic = self.every is not None and (step - self.dense_first) % self.every == 0
        too_old = self.max_age is not None and age > self.max_age
        return age < 0 or periodic or too_old or step in tuple(self.steps)

    def describe(self) -> str:
        """The policy in one sentence, for logs and tables."""
        parts = []
        if self.every is not None:
            parts.append(f"every {self.every} steps from step {self.dense_first}")
        if self.steps:
            parts.append("at steps " + ", ".join(map(str, self.steps)))
        if self.max_age is not None:
            parts.append(f"when older than {self.max_age} steps")
        if self.every is None:
            parts.insert(0, f"at step {self.dense_first}")
            if len(parts) == 1:
                parts[0] = f"once, at step {self.dense_first}"
        text = "refresh " + " and ".join(parts)
        if self.dense_first:
            text += f"; first {self.dense_first} steps dense"
        if self.dense_layers:
            text += "; dense layers " + ", ".join(map(str, self.dense_layers))
        if self.one_pass:
            text += "; in one pass after the first"
        return text


def _integer(name: str, value: Any, *, least: int, unit: str) -> int:
    """`value` as a Python int of at least `least`, or a ValueError that names it."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"expected an integer for `{name}`, got {name}={value!r}: give a number of {unit}") from error
    if number < least:
        raise ValueError(f"expected `{name}` >= {least}, got {name}={number}: it is a number of {unit}")
    return number


def _integers(name: str, values: Any) -> tuple[int, ...]:
    """`values` as a sorted tuple of Python ints without repeats, or a ValueError that names it."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"expected integers for `{name}`, got {name}={values!r}: give a tuple, for instance (0, 1)")
    numbers = set()
    for value in values:
        try:
            if isinstance(value, bool | np.bool_):
                raise TypeError
            numbers.add(operator.index(value))
        except TypeError as error:
            raise ValueError(f"expected integers for `{name}`, got {value!r}: give a tuple of integers") from error
    return tuple(sorted(numbers))
