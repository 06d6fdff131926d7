"""Query orders: permutations of a token grid, their compactness, and what is said about wrong ones."""

import itertools

import numpy as np
import pytest

from fgattn_jax import query_order

NAMES = ("raster", "cubes", "hilbert", "morton", "cubes_2x8x8", "cubes_1x3x5")

GRIDS = {
    "one token": (1, 1, 1),
    "one line": (1, 1, 37),
    "one frame": (1, 9, 14),
    "whole cubes": (8, 8, 12),
    "ragged on every axis": (5, 7, 9),
    "longer than high": (21, 3, 2),
    "side one above a power of two": (2, 17, 5),
}


def coordinates(token, grid):
    """Frame, line, column of a token, from its number alone."""
    frame, rest = divmod(int(token), grid[1] * grid[2])
    return (frame, *divmod(rest, grid[2]))


def steps(order, grid):
    """City-block distance between successors."""
    points = np.array([coordinates(token, grid) for token in order])
    return np.abs(np.diff(points, axis=0)).sum(axis=1)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_every_order_holds_each_token_once(name, grid):
    order = query_order.resolve(name, grid)
    assert order.dtype == np.int32
    assert order.shape == (np.prod(grid),)
    assert sorted(order.tolist()) == list(range(int(np.prod(grid))))


def test_raster_is_the_natural_order():
    np.testing.assert_array_equal(query_order.raster((2, 3, 4)), np.arange(24))


def test_rows_of_cubes_are_the_cubes_of_a_grid_of_whole_cubes():
    grid, cube = (4, 6, 8), (2, 3, 4)
    order = query_order.cubes(grid, cube)
    rows = {frozenset(order[start : start + 24].tolist()) for start in range(0, order.size, 24)}
    tokens = np.arange(np.prod(grid)).reshape(grid)
    expected = {
        frozenset(tokens[f : f + 2, y : y + 3, x : x + 4].ravel().tolist())
        for f, y, x in itertools.product(range(0, 4, 2), range(0, 6, 3), range(0, 8, 4))
    }
    assert rows == expected


def test_cubes_of_a_ragged_grid_come_whole_first():
    grid = (5, 9, 10)
    order = query_order.cubes(grid, (4, 4, 4))
    whole = order[: 1 * 2 * 2 * 64].reshape(4, 64)
    for row in whole:
        points = np.array([coordinates(token, grid) for token in row])
        np.testing.assert_array_equal(np.ptp(points, axis=0), [3, 3, 3])
        np.testing.assert_array_equal(points.min(axis=0) % 4, [0, 0, 0])


def test_successive_cubes_touch_in_a_grid_of_whole_cubes():
    assert steps(query_order.cubes((8, 8, 8), (2, 2, 2))[::8], (8, 8, 8)).max() <= 4


def test_a_cube_longer_than_the_grid_is_cut_to_it():
    np.testing.assert_array_equal(query_order.cubes((1, 8, 8), (4, 4, 4)), query_order.cubes((1, 8, 8), (1, 4, 4)))


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_hilbert_successors_are_neighbours_in_a_power_of_two_cube(side):
    assert set(steps(query_order.hilbert((side,) * 3), (side,) * 3).tolist()) <= {1}


def test_hilbert_visits_octants_one_after_the_other():
    order = query_order.hilbert((8, 8, 8))
    for size in (8, 64):
        for row in order.reshape(-1, size):
            points = np.array([coordinates(token, (8, 8, 8)) for token in row])
            assert (np.ptp(points, axis=0) == round(size ** (1 / 3)) - 1).all()


def test_hilbert_of_a_ragged_grid_is_the_enclosing_curve_without_the_missing_tokens():
    grid = (3, 7, 5)
    enclosing = [coordinates(token, (8, 8, 8)) for token in query_order.hilbert((8, 8, 8))]
    kept = [point for point in enclosing if all(c < side for c, side in zip(point, grid, strict=True))]
    assert [coordinates(token, grid) for token in query_order.hilbert(grid)] == kept


def test_morton_sorts_by_interleaved_bits():
    grid = (3, 5, 6)

    def code(token):
        digits = [f"{c:03b}" for c in coordinates(token, grid)]
        return int("".join(f + y + x for f, y, x in zip(*digits, strict=True)), 2)

    assert query_order.morton(grid).tolist() == sorted(range(90), key=code)


@pytest.mark.parametrize("query_block", [64, 128])
@pytest.mark.parametrize("grid", [(21, 30, 52), (13, 15, 17)], ids=["Wan 480p", "odd sides"])
def test_curves_and_cubes_are_more_compact_than_raster(grid, query_block):
    raster = query_order.spread("raster", grid, query_block)
    for name in ("cubes", "hilbert", "morton"):
        assert query_order.spread(name, grid, query_block) < 0.75 * raster


def test_cubes_of_a_video_grid_are_nearly_as_compact_as_cubes_can_be():
    assert query_order.spread("cubes", (21, 45, 80), 64) < 4.3
    assert query_order.spread("raster", (21, 45, 80), 64) > 25


def test_spread_is_the_mean_side_of_the_bounding_boxes():
    # Rows of 4 in a 1 x 2 x 3 grid: tokens 0 1 2 3 span 1 x 2 x 3, tokens 4 5 span 1 x 1 x 2.
    assert query_order.spread("raster", (1, 2, 3), 4) == pytest.approx(((1 + 2 + 3) / 3 + (1 + 1 + 2) / 3) / 2)
    assert query_order.spread("cubes_2x2x2", (4, 4, 4), 8) == 2.0


def test_inverse_undoes_an_order():
    order = query_order.cubes((5, 6, 7))
    positions = query_order.inverse(order)
    assert positions.dtype == np.int32
    for position, token in enumerate(order):
        assert positions[token] == position


def test_resolve_takes_an_order_of_any_integer_dtype():
    order = query_order.resolve(np.array([2, 0, 1, 3], dtype=np.int64), (1, 2, 2))
    assert order.dtype == np.int32
    np.testing.assert_array_equal(order, [2, 0, 1, 3])


@pytest.mark.parametrize("name", ["raster", "cubes", "hilbert", "morton"])
@pytest.mark.parametrize("grid", [(4, 4), (4, 0, 4), (4, 4, -1), (4, 4, 2.0), (4, True, 4), "444", 64])
def test_a_wrong_grid_is_named(name, grid):
    with pytest.raises(ValueError, match="expected `grid` to be three integers of at least 1"):
        getattr(query_order, name)(grid)


def test_a_grid_too_large_for_int32_is_refused():
    with pytest.raises(ValueError, match=r"expected `grid` of at most 2147483647 tokens.*\(65536, 65536, 1\)"):
        query_order.raster((65536, 65536, 1))


def test_a_wrong_cube_is_named():
    with pytest.raises(ValueError, match=r"expected `cube` to be three integers.*cube=\(4, 0, 4\)"):
        query_order.cubes((8, 8, 8), (4, 0, 4))


@pytest.mark.parametrize("name", ["spiral", "cubes_4x4", "Hilbert"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=f'"raster", "cubes", "hilbert", "morton".*order={name!r}'):
        query_order.resolve(name, (2, 2, 2))


def test_an_order_of_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"T=8 tokens of grid=\(2, 2, 2\), got T=9"):
        query_order.resolve(np.arange(9), (2, 2, 2))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (np.array([0, 1, 1, 3]), r"each of 0\.\.3 once, got token=1 count=2"),
        (np.array([0, 1, 2, 4]), r"each of 0\.\.3 once, got token=4"),
        (np.array([-1, 1, 2, 3]), r"each of 0\.\.3 once, got token=-1"),
        (np.arange(4.0), "dtype=float64"),
        (np.zeros((2, 2), np.int32), r"shape=\(2, 2\)"),
    ],
    ids=["twice", "past the end", "negative", "float", "rank 2"],
)
def test_what_is_no_permutation_is_refused(order, message):
    with pytest.raises(ValueError, match=message):
        query_order.inverse(order)
    with pytest.raises(ValueError, match=message):
        query_order.resolve(order, (1, 2, 2))


def test_spread_refuses_a_query_block_below_one():
    with pytest.raises(ValueError, match="`query_block` to be at least 1, got query_block=0"):
        query_order.spread("raster", (2, 2, 2), 0)
