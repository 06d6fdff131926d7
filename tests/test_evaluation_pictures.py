"""Pictures hold what they are given: read back pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from fgattn_jax.evaluation import pictures


def clip(frames=5, height=6, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_values_become_colours_and_are_clipped():
    np.testing.assert_array_equal(pictures.to_pixels(np.array([-2.0, -1.0, 0.0, 1.0, 3.0])), [0, 0, 128, 255, 255])
    with pytest.raises(ValueError, match="NaN"):
        pictures.to_pixels(np.array([0.0, np.nan]))


def test_gif_has_all_frames_and_loops(tmp_path):
    video = np.zeros((5, 6, 8, 3), np.uint8)
    video[np.arange(5), :, np.arange(5)] = 255  # a line that moves: no two frames are equal
    path = tmp_path / "clip.gif"
    pictures.save_gif(path, video, zoom=3, frames_per_second=8)
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (5, (24, 18), 0)
        assert image.info["duration"] == 120
        for number in range(5):
            image.seek(number)
            frame = np.asarray(image.convert("RGB"))[1::3, 1::3]
            np.testing.assert_array_equal(frame, video[number])


@pytest.mark.parametrize(
    ("video", "match"),
    [
        (np.zeros((5, 6, 8, 3), np.float32), "float32"),
        (np.zeros((6, 8, 3), np.uint8), r"\(6, 8, 3\)"),
        (np.zeros((0, 6, 8, 3), np.uint8), r"\(0, 6, 8, 3\)"),
    ],
)
def test_other_arrays_are_no_clip(tmp_path, video, match):
    with pytest.raises(ValueError, match=match):
        pictures.save_gif(tmp_path / "clip.gif", video)


def test_zoom_and_rate_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="zoom=0"):
        pictures.save_gif(tmp_path / "clip.gif", clip(), zoom=0)
    with pytest.raises(ValueError, match="frames_per_second=-1"):
        pictures.save_gif(tmp_path / "clip.gif", clip(), frames_per_second=-1)


def test_frame_grid_shows_first_and_last_frame():
    first, second = clip(seed=1), clip(seed=2)
    grid = np.asarray(pictures.frame_grid([("a", first), ("b", second)], num_frames=3, zoom=1))
    for video in (first, second):
        for frame in (0, 2, 4):
            assert _contains(grid, video[frame])
        assert not _contains(grid, video[1])


def test_frame_grid_wants_clips_of_one_shape():
    with pytest.raises(ValueError, match="'b'"):
        pictures.frame_grid([("a", clip()), ("b", clip(frames=4))])
    with pytest.raises(ValueError, match="none"):
        pictures.frame_grid([])


def test_difference_is_scaled_and_cut_off():
    a = np.full((1, 1, 1, 3), 10, np.uint8)
    b = np.array([[[[12, 10, 110]]]], np.uint8)
    np.testing.assert_array_equal(pictures.difference(a, b, 8)[0, 0, 0], [16, 0, 255])


def test_mask_map_is_white_where_kept():
    rows = np.random.default_rng(0).random((4, 8)) < 0.5
    drawn = np.asarray(pictures.mask_map(rows, width=16, height=8))
    np.testing.assert_array_equal(drawn[::2, ::2] == 255, rows)
    shrunk = np.asarray(pictures.mask_map(np.arange(64).reshape(1, 64) % 4 == 0, width=16, height=1))
    assert ((shrunk > 60) & (shrunk < 68)).all()  # a quarter is kept


def test_map_grid_needs_a_title_for_every_line_and_column():
    cell = pictures.mask_map(np.ones((2, 2), bool), width=8, height=8)
    grid = pictures.map_grid([[cell, cell]], line_titles=["head"], column_titles=["0", "1"], title="t")
    assert grid.size[0] > 16
    with pytest.raises(ValueError, match="1 and 1 titles"):
        pictures.map_grid([[cell, cell]], line_titles=["head"], column_titles=["0"], title="t")


def test_heat_colours_rise_and_mark_what_is_missing():
    colours = pictures.heat_colours(np.array([0.0, 0.5, 1.0, 2.0, np.nan])).astype(int)
    assert colours[0].sum() < colours[1].sum() < colours[2].sum()
    np.testing.assert_array_equal(colours[2], colours[3])
    np.testing.assert_array_equal(colours[4], [225, 225, 225])


def test_heat_map_draws_every_cell_in_its_colour():
    values = np.array([[0.0, 1.0, 0.25], [0.75, np.nan, 0.5]])
    for numbers in (True, False):
        drawn = pictures.heat_map(values, title="t", line_label="layer", column_label="step", numbers=numbers)
        image = np.asarray(drawn)
        width = 28 if numbers else 24
        for line in range(2):
            for column in range(3):
                corner = image[66 + line * 24 + 1, 64 + column * width + 1]
                np.testing.assert_array_equal(corner, pictures.heat_colours(values[line, column]))


def _contains(image, part):
    height, width = part.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(image, (height, width, 3)).squeeze(2)
    return bool((windows == part).all((-3, -2, -1)).any())
