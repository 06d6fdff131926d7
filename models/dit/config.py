"""Sizes of the video DiT, checked when they are made."""

import dataclasses
import json

CHANNELS = 3
"""Colour channels of a clip; values lie in [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of a video diffusion transformer; wrong ones raise when the config is made.

    The default is the shipped model: a clip of 16 frames of 64x64 pixels becomes 16x16x16 = 4096 tokens. Positions
    enter only through rotary angles, so the same weights also take longer clips (32 frames: 8192 tokens).

    Attributes:
        width: channels of the residual stream.
        num_layers: transformer blocks, scanned.
        num_heads: attention heads.
        head_dim: channels of a head; at least 8 and even. Rotary splits it into time, height and width parts.
        mlp_ratio: hidden width of the feed-forward part over `width`.
        patch: frames, rows and columns of one token.
        num_frames: frames of the clips the model is meant for (a default for sampling, not a limit).
        height: rows of a clip in pixels, likewise.
        width_pixels: columns of a clip in pixels, likewise.
        num_classes: classes a clip can be conditioned on, without the null class.
        rope_theta: base of the rotary frequencies; small because grids are small.
        time_features: sinusoidal features of the diffusion time; even.

    Raises:
        ValueError: a size is out of range or sizes do not fit each other.
    """

    width: int = 256
    num_layers: int = 8
    num_heads: int = 4
    head_dim: int = 64
    mlp_ratio: int = 4
    patch: tuple[int, int, int] = (1, 4, 4)
    num_frames: int = 16
    height: int = 64
    width_pixels: int = 64
    num_classes: int = 4
    rope_theta: float = 100.0
    time_features: int = 256

    def __post_init__(self):
        for name in ("width", "num_layers", "num_heads", "mlp_ratio", "num_frames", "height", "width_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {name}={getattr(self, name)}.")
        if self.num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, got num_classes={self.num_classes}.")
        if self.head_dim < 8 or self.head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even and at least 8 (three rotary axes), got head_dim={self.head_dim}."
            )
        if self.time_features < 2 or self.time_features % 2:
            raise ValueError(f"`time_features` must be even and positive, got time_features={self.time_features}.")
        if self.rope_theta <= 1:
            raise ValueError(f"`rope_theta` must be above 1, got rope_theta={self.rope_theta}.")
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise ValueError(f"`patch` must be three positive sizes (frames, rows, columns), got patch={self.patch}.")
        self.grid(self.num_frames, self.height, self.width_pixels)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Token grid (frames, rows, columns) of a clip.

        Args:
            frames: frames of the clip.
            height: pixel rows.
            width: pixel columns.

        Raises:
            ValueError: the clip is not a whole number of patches.
        """
        for name, size, patch in zip(("frames", "height", "width"), (frames, height, width), self.patch, strict=True):
            if size < 1 or size % patch:
                raise ValueError(
                    f"A clip must hold whole patches: {name}={size} is not a multiple of {patch} (patch={self.patch})."
                )
        return frames // self.patch[0], height // self.patch[1], width // self.patch[2]

    @property
    def default_grid(self) -> tuple[int, int, int]:
        """Token grid of the clips the model is meant for."""
        return self.grid(self.num_frames, self.height, self.width_pixels)

    @property
    def patch_dim(self) -> int:
        """Values of one patch."""
        return self.patch[0] * self.patch[1] * self.patch[2] * CHANNELS

    @property
    def null_label(self) -> int:
        """The label that stands for "no class", used for classifier-free guidance."""
        return self.num_classes

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Channels of a head that turn with frame, row and column; they sum to `head_dim`."""
        spatial = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * spatial, spatial, spatial

    def to_json(self) -> str:
        """The config as JSON, for the header of a weights file."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "DiTConfig":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no JSON object with exactly the known fields.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The config is not JSON: {error}.") from error
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != known:
            came = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"The config must have the fields {sorted(known)}, got {came}.")
        return cls(**{**fields, "patch": tuple(fields["patch"])})
