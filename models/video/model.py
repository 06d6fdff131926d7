"""What the sampler, sharding and timing know of a video model: sizes, one call, and what it gives."""

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float

from fgattn_jax.models.video.attention import VideoAttention
from fgattn_jax.models.video.layers import Grid


class VideoOutput(NamedTuple):
    """What one call of a video model gives.

    Attributes:
        velocity: `[B, C, F, Y, X]` in the dtype of the model; its estimate of `noise - clip`.
        state: the state of the attention after the last layer.
    """

    velocity: Float[Array, "B C F Y X"]
    state: Any


class VideoConfig(Protocol):
    """Sizes that every config of a video model has."""

    @property
    def num_attentions(self) -> int:
        """Attentions over the video per forward; the `layer` of `VideoAttention` counts them."""
        ...

    @property
    def num_heads(self) -> int:
        """`N`."""
        ...

    @property
    def head_dim(self) -> int:
        """`H`."""
        ...

    @property
    def in_channels(self) -> int:
        """Channels of the latents."""
        ...

    def grid(self, frames: int, rows: int, columns: int) -> Grid:
        """Tokens per axis for latents of these sizes.

        Raises:
            ValueError: The latents are not whole patches.
        """
        ...


class VideoModel(Protocol):
    """A video model: an `nnx.Module` with a config, and one call."""

    config: Any
    dtype: Any
    parallel: Any
    """A `VideoSharding` that the caller sets, or None."""

    def __call__(
        self,
        latents: Float[Array, "B C F Y X"],
        timestep: Float[Array, " B"],
        condition: Any,
        *,
        attention: VideoAttention,
        state: Any = None,
    ) -> VideoOutput:
        """Estimate the velocity at `latents`.

        Args:
            latents: noisy latents in the layout of diffusers.
            timestep: from 0 (clip) to 1000 (noise).
            condition: a named tuple of the model's own: one branch of guidance.
            attention: called in every layer.
            state: handed to the first call of `attention`.
        """
        ...
