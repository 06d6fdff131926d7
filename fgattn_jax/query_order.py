"""Orders of the queries of a token grid, so that the queries of one row are neighbours in space and time.

An order is `int32[T]`, `T = frames * height * width`: `order[p]` is the token that stands at position `p`, and tokens
are numbered in raster order, `(frame * height + y) * width + x`. Everything here runs on the host, in NumPy, once per
grid. Keys and values are never reordered: an order only decides which queries share a row (see `SliceMask`).

A compact row needs fewer keys: a row of 64 queries of a 21 x 45 x 80 grid extends over 25.6 tokens per axis (mean of
the three) in raster order, 4.2 in cubes of 4 x 4 x 4 or along a Hilbert curve; see `spread`.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

Grid = tuple[int, int, int]

_MOST_TOKENS = 2**31 - 1
_LONGEST_SIDE = 2**21
_CUBES_NAME = re.compile(r"cubes_(\d+)x(\d+)x(\d+)")


def raster(grid: Sequence[int]) -> Int32[np.ndarray, " T"]:
    """The natural order: frame by frame, line by line. As a mask's `query_order`, `None` says the same for free.

    Args:
        grid: Tokens per axis: (frames, height, width).

    Raises:
        ValueError: If `grid` is not three integers of at least 1.
    """
    return np.arange(np.prod(_checked(grid, "grid"), dtype=np.int64), dtype=np.int32)


def cubes(grid: Sequence[int], cube: Sequence[int] = (4, 4, 4)) -> Int32[np.ndarray, " T"]:
    """Cube after cube, each cube and the path over the cubes in serpentines, so that successors touch.

    Whole cubes come first, so that a row of as many queries as a cube has tokens is one cube. Where the grid is no
    multiple of the cube, the partial cubes of its borders follow at the end. Cubes of (4, 4, 4) fit rows of 64 queries,
    (4, 4, 8) or (2, 8, 8) rows of 128; a grid of one frame wants (1, 8, 8).

    Args:
        grid: Tokens per axis: (frames, height, width).
        cube: Tokens of a cube per axis; a side longer than the grid is cut to it.

    Raises:
        ValueError: If `grid` or `cube` is not three integers of at least 1.
    """
    sides = _checked(grid, "grid")
    cube_sides = tuple(min(c, g) for c, g in zip(_checked(cube, "cube"), sides, strict=True))
    places = _places(sides)
    which = np.stack([place // c for place, c in zip(places, cube_sides, strict=True)])
    inside = np.stack([place % c for place, c in zip(places, cube_sides, strict=True)])
    num_cubes = tuple(-(-g // c) for g, c in zip(sides, cube_sides, strict=True))
    ends = (which + 1) * np.array(cube_sides)[:, None]
    partial = (ends > np.array(sides)[:, None]).any(axis=0)
    keys = (_serpentine(inside, cube_sides), _serpentine(which, num_cubes), partial)  # the last one sorts first
    return np.lexsort(keys).astype(np.int32)


def hilbert(grid: Sequence[int]) -> Int32[np.ndarray, " T"]:
    """Along the Hilbert curve of the smallest enclosing cube with a power of two per side, missing tokens left out.

    On a cube with a power of two per side, successors are always neighbours. On other grids the curve leaves the grid
    at its borders and comes back elsewhere: rows stay compact except for the few that span such a jump.

    Args:
        grid: Tokens per axis: (frames, height, width).

    Raises:
        ValueError: If `grid` is not three integers of at least 1.

    References:
        J. Skilling, "Programming the Hilbert curve", AIP Conference Proceedings 707 (2004).
    """
    sides = _checked(grid, "grid")
    num_bits = _bits_per_axis(sides)
    axes = _places(sides)
    # From the coarsest level to the finest, undo the turn of the curve in the octant that a token lies in.
    for level in reversed(range(1, num_bits)):
        low = (1 << level) - 1
        for axis in axes:
            upper = (axis >> level) & 1 == 1
            swap = np.where(upper, 0, (axes[0] ^ axis) & low)
            axes[0] ^= np.where(upper, low, swap)
            axis ^= swap
    for before, axis in itertools.pairwise(axes):
        axis ^= before
    flips = np.zeros_like(axes[0])
    for level in range(1, num_bits):
        flips ^= np.where((axes[-1] >> level) & 1, (1 << level) - 1, 0)
    return np.argsort(_interleave(axes ^ flips, num_bits), kind="stable").astype(np.int32)


def morton(grid: Sequence[int]) -> Int32[np.ndarray, " T"]:
    """In the order of interleaved coordinate bits (Z-order): octants of octants, with jumps between them.

    Args:
        grid: Tokens per axis: (frames, height, width).

    Raises:
        ValueError: If `grid` is not three integers of at least 1.
    """
    sides = _checked(grid, "grid")
    return np.argsort(_interleave(_places(sides), _bits_per_axis(sides)), kind="stable").astype(np.int32)


def resolve(order: str | Any, grid: Sequence[int]) -> Int32[np.ndarray, " T"]:
    """The order of a name, or a given order checked against the grid.

    Args:
        order: "raster", "cubes" (4 x 4 x 4), "cubes_<frames>x<height>x<width>" such as "cubes_2x8x8", "hilbert",
            "morton", or integers of shape [T] that hold each token once.
        grid: Tokens per axis: (frames, height, width).

    Raises:
        ValueError: For an unknown name, a wrong grid, or an array that is no order of this grid.
    """
    sides = _checked(grid, "grid")
    if not isinstance(order, str):
        num_tokens = int(np.prod(sides, dtype=np.int64))
        values = _checked_order(order)
        if values.shape[0] != num_tokens:
            raise ValueError(
                f"expected `order` to hold the T={num_tokens} tokens of grid={sides}, got T={values.shape[0]}; "
                "append the numbers of tokens that are not on the grid (text) afterwards"
            )
        return values
    if order in _BUILDERS:
        return _BUILDERS[order](sides)
    match = _CUBES_NAME.fullmatch(order)
    if match:
        return cubes(sides, tuple(int(side) for side in match.groups()))
    names = ", ".join(f'"{name}"' for name in _BUILDERS)
    raise ValueError(
        f'expected `order` to be one of {names}, "cubes_2x8x8" (any sides) or an array, got order={order!r}'
    )


def inverse(order: Any) -> Int32[np.ndarray, " T"]:
    """The position of every token: `inverse(order)[order[p]] == p`.

    Args:
        order: Integers of shape [T] that hold each of 0..T-1 once.

    Raises:
        ValueError: If `order` is not a permutation.
    """
    values = _checked_order(order)
    positions = np.empty_like(values)
    positions[values] = np.arange(values.shape[0], dtype=np.int32)
    return positions


def spread(order: Any, grid: Sequence[int], query_block: int) -> float:
    """How far rows extend, in tokens: smaller is more compact, 4.0 for rows that are cubes of 4 x 4 x 4.

    The extent of a row is the mean side of its bounding box in the grid (largest minus smallest coordinate plus one,
    mean of the three axes); the result is its mean over rows. The last row may hold fewer queries.

    Args:
        order: A name or an order of the grid, as `resolve` takes it.
        grid: Tokens per axis: (frames, height, width).
        query_block: Queries per row (`M`), at least 1.

    Raises:
        ValueError: If `order` or `grid` is wrong (see `resolve`), or `query_block` is below 1.
    """
    if query_block < 1:
        raise ValueError(f"expected `query_block` to be at least 1, got query_block={query_block}")
    values = resolve(order, grid)
    places = _places(_checked(grid, "grid"))[:, values]
    starts = np.arange(0, values.shape[0], query_block)
    largest = np.maximum.reduceat(places, starts, axis=1)
    smallest = np.minimum.reduceat(places, starts, axis=1)
    return float((largest - smallest + 1).mean())


_BUILDERS = {"raster": raster, "cubes": cubes, "hilbert": hilbert, "morton": morton}


def _checked(sides: Sequence[int], name: str) -> Grid:
    values = tuple(sides) if isinstance(sides, Sequence | np.ndarray) and not isinstance(sides, str) else ()
    if len(values) != 3 or any(isinstance(v, bool) or not isinstance(v, int | np.integer) or v < 1 for v in values):
        raise ValueError(
            f"expected `{name}` to be three integers of at least 1 (frames, height, width), got {name}={sides!r}"
        )
    frames, height, width = (int(v) for v in values)
    # Numbers of tokens are int32, and curves interleave three coordinates in an int64.
    if frames * height * width > _MOST_TOKENS or max(frames, height, width) > _LONGEST_SIDE:
        raise ValueError(
            f"expected `{name}` of at most {_MOST_TOKENS} tokens and {_LONGEST_SIDE} per axis, got {name}={sides!r}"
        )
    return frames, height, width


def _checked_order(order: Any) -> Int32[np.ndarray, " T"]:
    values = np.asarray(order)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"expected `order` to be integers of shape [T], got shape={values.shape} and dtype={values.dtype}"
        )
    num_tokens = values.shape[0]
    outside = values[(values < 0) | (values >= num_tokens)]
    if outside.size:
        raise ValueError(f"expected `order` to hold each of 0..{num_tokens - 1} once, got token={outside[0]}")
    times = np.bincount(values, minlength=num_tokens)
    if (times > 1).any():
        token = np.flatnonzero(times > 1)[0]
        raise ValueError(
            f"expected `order` to hold each of 0..{num_tokens - 1} once, got token={token} count={times[token]}"
        )
    return values.astype(np.int32)


def _places(sides: Grid) -> np.ndarray:
    """Frame, line and column of every token in raster order, int64[3, T]."""
    return np.stack(np.unravel_index(np.arange(np.prod(sides, dtype=np.int64)), sides)).astype(np.int64)


def _serpentine(places: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    """Position along the path that turns at the end of every line and of every plane."""
    frame, line, column = places
    line = np.where(frame % 2, sides[1] - 1 - line, line)
    lines_before = frame * sides[1] + line
    column = np.where(lines_before % 2, sides[2] - 1 - column, column)
    return lines_before * sides[2] + column


def _bits_per_axis(sides: Grid) -> int:
    return max(1, (max(sides) - 1).bit_length())


def _interleave(axes: np.ndarray, num_bits: int) -> np.ndarray:
    """One number per token from the bits of its coordinates, coarsest bits and first axis first."""
    code = np.zeros(axes.shape[1], dtype=np.int64)
    for level in reversed(range(num_bits)):
        for axis in axes:
            code = (code << 1) | ((axis >> level) & 1)
    return code
