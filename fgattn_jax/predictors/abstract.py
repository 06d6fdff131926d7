"""What every predictor is: a frozen, hashable description that makes a mask from queries and keys."""

import abc
import dataclasses

import numpy as np
from jaxtyping import Array, Float, Float32

from fgattn_jax.masks import SliceMask


class AbstractPredictor(abc.ABC):
    """A mask predictor: `predictor(query, key, lse) -> SliceMask`.

    Predictors are immutable and hashable by value: close over one inside `jit`, `lax.scan` or `lax.cond`, hand it to
    `jit` as a static argument, or keep it as a static attribute of a Flax module.
    """

    @property
    @abc.abstractmethod
    def needs_lse(self) -> bool:
        """Whether the LSE of dense attention spares this predictor work (without it the call works all the same)."""

    @abc.abstractmethod
    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        lse: Float32[Array, "B N T"] | None = None,
        *,
        scale: float | None = None,
    ) -> SliceMask:
        """Make the mask of these queries and keys."""

    def _identity(self):
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        return type(self), tuple(
            (value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value for value in values
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AbstractPredictor) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())
