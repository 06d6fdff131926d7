"""Attention layers of published video models, as sizes: what `fgattn bench --layer` can be asked for by name."""

import dataclasses
import itertools
import math
from typing import Any

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of the self-attention of a video model.

    Attributes:
        name: As the command line takes it.
        title: As tables show it.
        grid: Tokens per axis: (frames, height, width).
        num_heads: `N`.
        head_dim: `H`, even and at least 8.
        num_layers: Layers with this attention.
        num_branches: Forwards per denoising step, each with masks of its own: 2 with classifier-free guidance.
        text_tokens: Tokens behind those of the grid that take part in the same attention.
        rope_dims: Channels of a head that turn with frame, row and column; None shares them out as Wan does.
        rope_theta: Base of the rotary frequencies.
    """

    name: str
    title: str
    grid: Grid
    num_heads: int
    head_dim: int
    num_layers: int
    num_branches: int = 1
    text_tokens: int = 0
    rope_dims: Grid | None = None
    rope_theta: float = 10000.0

    @property
    def num_tokens(self) -> int:
        """Queries and keys: tokens of the grid and of the text."""
        return math.prod(self.grid) + self.text_tokens

    def rotary_dims(self) -> Grid:
        """Channels of a head per axis; they sum to `head_dim`."""
        if self.rope_dims is not None:
            return self.rope_dims
        spatial = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * spatial, spatial, spatial


_480P, _720P = (21, 30, 52), (21, 45, 80)
_WAN_1B: dict[str, Any] = {"num_heads": 12, "head_dim": 128, "num_layers": 30, "num_branches": 2}
_WAN_14B: dict[str, Any] = {"num_heads": 40, "head_dim": 128, "num_layers": 40, "num_branches": 2}
# 20 layers of two streams and 40 of one attend alike. Guidance is an input of the model: one forward a step.
_HUNYUAN: dict[str, Any] = {"num_heads": 24, "head_dim": 128, "num_layers": 60, "text_tokens": 256}
_HUNYUAN |= {"rope_dims": (16, 56, 56), "rope_theta": 256.0}
_DIT: dict[str, Any] = {"num_heads": 4, "head_dim": 64, "num_layers": 8, "rope_theta": 100.0}

SHAPES: tuple[ModelShape, ...] = (
    ModelShape("wan-1.3b-480p", "Wan 2.1 1.3B, 480p, 81 frames", _480P, **_WAN_1B),
    ModelShape("wan-1.3b-720p", "Wan 2.1 1.3B, 720p, 81 frames", _720P, **_WAN_1B),
    ModelShape("wan-14b-480p", "Wan 2.1 14B, 480p, 81 frames", _480P, **_WAN_14B),
    ModelShape("wan-14b-720p", "Wan 2.1 14B, 720p, 81 frames", _720P, **_WAN_14B),
    ModelShape("hunyuan-544p", "HunyuanVideo, 544p, 129 frames", (33, 34, 60), **_HUNYUAN),
    ModelShape("hunyuan-720p", "HunyuanVideo, 720p, 129 frames", (33, 45, 80), **_HUNYUAN),
    ModelShape("dit", "shipped DiT, 16 frames", (16, 16, 16), **_DIT),
    ModelShape("dit-long", "shipped DiT, 32 frames", (32, 16, 16), **_DIT),
)
"""Published shapes; latent grids are those after the VAE and the patches, at the model's usual clip."""


def find(name: str) -> ModelShape:
    """The shape of a name.

    Raises:
        ValueError: There is no such shape.
    """
    for shape in SHAPES:
        if shape.name == name:
            return shape
    raise ValueError(f"expected `--model` to be one of {', '.join(shape.name for shape in SHAPES)}; got {name!r}")


def with_grid(shape: ModelShape, grid: Grid) -> ModelShape:
    """The same layer on another grid, which its title says."""
    if grid == shape.grid:
        return shape
    ours, own = ("x".join(map(str, sides)) for sides in (grid, shape.grid))
    return dataclasses.replace(shape, title=f"{shape.title}, grid {ours} instead of {own}", grid=grid)


def smaller_grid(grid: Grid, most_tokens: int) -> Grid:
    """The grid, all sides shrunk by one factor so that it holds at most `most_tokens`; unchanged if it does."""
    if math.prod(grid) <= most_tokens:
        return grid
    factor = (most_tokens / math.prod(grid)) ** (1 / 3)
    frames, height, width = (max(1, int(side * factor)) for side in grid)
    return frames, height, width


def grid_of(num_tokens: int) -> Grid:
    """Three sides whose product is `num_tokens`, as equal as they can be, the shortest first.

    Raises:
        ValueError: `num_tokens` is below 1.
    """
    if num_tokens < 1:
        raise ValueError(f"expected at least one token, got tokens={num_tokens}")
    divisors = [n for n in range(1, math.isqrt(num_tokens) + 1) if num_tokens % n == 0]
    pairs = itertools.combinations_with_replacement(divisors, 2)
    grids = [(a, b, num_tokens // (a * b)) for a, b in pairs if num_tokens % (a * b) == 0]
    frames, height, width = sorted(min(grids, key=sum))
    return frames, height, width
