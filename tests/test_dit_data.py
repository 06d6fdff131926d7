import importlib.metadata

import chex
import dit_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.models.dit import data, scenes

SIZE = 12


@pytest.fixture(scope="module")
def clips():
    return data.ClipSet.from_clips(dit_cases.coded_clips())


def codes(batch):
    """Frame, row and column of every pixel of a batch of coded clips."""
    values = np.round((np.asarray(batch.video) + 1) * 127.5).astype(int)
    return values[..., 0], values[..., 1], values[..., 2]


@pytest.mark.parametrize(("split", "num_frames"), [("train", 8), ("train", 16), ("validation", 8)])
def test_crops_are_whole_windows_of_one_clip_in_the_right_part(clips, split, num_frames):
    batch = data.real_batch(jax.random.key(3), clips, batch=64, num_frames=num_frames, size=SIZE, split=split)
    assert batch.video.shape == (64, num_frames, SIZE, SIZE, 3)
    frame, row, column = codes(batch)
    lengths, widths = np.asarray(clips.num_frames)[batch.label], np.asarray(clips.widths)[batch.label]

    assert (frame == frame[:, :, :1, :1]).all()
    strides = np.diff(frame[:, :, 0, 0], axis=1)
    assert (strides == strides[:, :1]).all()
    assert set(strides[:, 0]) == {1, 2}
    held_out = 20  # a tenth of every clip here is less than that
    if split == "train":
        assert (frame.max((1, 2, 3)) < lengths - held_out).all()
    else:
        assert (frame.min((1, 2, 3)) >= lengths - held_out).all()
        assert (frame.max((1, 2, 3)) < lengths).all()
    assert (np.diff(row, axis=2) == 1).all()
    steps = np.diff(column, axis=3)
    assert (steps == steps[:, :1, :1, :1]).all()
    assert set(steps[:, 0, 0, 0]) == {-1, 1}  # some are mirrored
    assert (column.max((1, 2, 3)) < widths).all()
    assert set(np.asarray(batch.label)) == {0, 1, 2}


def test_stride_shrinks_where_a_clip_is_short(clips):
    # 28 frames remain of the shortest clip: 16 frames at stride 2 would need 31.
    batch = data.real_batch(jax.random.key(0), clips, batch=64, num_frames=16, size=SIZE)
    strides = np.diff(codes(batch)[0][:, :, 0, 0], axis=1)[:, 0]
    assert set(strides[np.asarray(batch.label) == 1]) == {1}


def test_same_key_same_batch(clips):
    @jax.jit
    def draw(seed):
        key = jax.random.key(seed)
        return data.training_batch(key, clips, batch=6, num_frames=4, size=SIZE, num_scenes=2)

    chex.assert_trees_all_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0).video, draw(1).video)
    assert list(draw(0).label[4:]) == [data.SCENE_LABEL] * 2
    assert (np.asarray(draw(0).label[:4]) < data.SCENE_LABEL).all()


def test_colours_survive_both_ways():
    colours = jnp.arange(256, dtype=jnp.uint8)
    chex.assert_trees_all_equal(data.to_uint8(data.to_float(colours)), colours)
    chex.assert_trees_all_equal(data.to_uint8(jnp.array([-3.0, 3.0])), jnp.array([0, 255], jnp.uint8))


def test_clips_file_is_read_as_written(tmp_path, clips):
    chex.assert_trees_all_equal(data.load_clips(dit_cases.write_clips(tmp_path / "clips.npz")), clips)


@pytest.mark.parametrize(("split", "size", "message"), [("test", 8, "split='test'"), ("train", 21, "size=21")])
def test_wrong_draws_are_named(clips, split, size, message):
    with pytest.raises(ValueError, match=message):
        data.real_batch(jax.random.key(0), clips, batch=2, num_frames=4, size=size, split=split)


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [np.zeros((4, 8, 8), np.uint8)],
        [np.zeros((4, 8, 8, 3), np.float32)],
        [np.zeros((4, 8, 8, 3), np.uint8), np.zeros((4, 9, 8, 3), np.uint8)],
    ],
    ids=["no clip", "no colours", "float", "other height"],
)
def test_wrong_clips_are_refused(wrong):
    with pytest.raises(ValueError, match=r"Clip number|at least one clip"):
        data.ClipSet.from_clips(wrong)


def test_missing_or_foreign_clips_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no clips file"):
        data.load_clips(tmp_path / "nothing.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="is no clips file"):
        data.load_clips(tmp_path / "other.npz")


def test_missing_wheel_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ValueError, match=r"pip install 'fgattn-jax\[train\]'"):
        data.decode_clips()


@pytest.fixture(scope="module")
def many_scenes():
    make = jax.jit(jax.vmap(lambda key: scenes.make_scene(key, num_frames=12, size=32)))
    return make(jax.random.split(jax.random.key(0), 24))


def test_scenes_follow_from_their_key(many_scenes):
    make = jax.jit(lambda key: scenes.make_scene(key, num_frames=12, size=32))
    again = make(jax.random.split(jax.random.key(0), 24)[3])
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[3], many_scenes), again, atol=1e-4)
    assert not np.allclose(many_scenes.video[0], many_scenes.video[1], atol=0.1)
    assert float(jnp.abs(many_scenes.video).max()) <= 1.0


def test_objects_are_where_the_scene_says(many_scenes):
    """The centre of the visible pixels of the front object is its stated place, in every frame."""
    along = (np.arange(32) + 0.5) / 32
    checked = 0
    for number in range(24):
        scene = jax.tree.map(lambda leaf, n=number: np.asarray(leaf[n]), many_scenes)
        front = int(scene.present.sum()) - 1
        if scene.shapes[front] == 2:
            continue  # a triangle's centre of mass is not the centre of its box
        for frame in range(12):
            y, x = np.nonzero(scene.visible[frame] == front)
            assert len(y) > 20
            found = np.array([along[y].mean(), along[x].mean()])
            np.testing.assert_allclose(found, scene.centers[frame, front], atol=0.02)
            checked += 1
    assert checked > 60


def test_objects_move_straight_between_bounces_and_stay_inside(many_scenes):
    centers, radii = np.asarray(many_scenes.centers), np.asarray(many_scenes.radii)
    low, high = radii[:, None, :, None] - 1e-5, 1 + 1e-5 - radii[:, None, :, None]
    assert ((centers >= low) & (centers <= high)).all()
    steps = np.abs(np.diff(centers, axis=1))
    # Speed along an axis is constant except in the frame of a bounce, where it seems lower.
    fastest = steps.max(1, keepdims=True)
    assert (np.isclose(steps, fastest, atol=1e-5).mean(1) >= 0.7).all()
    assert (np.hypot(*np.moveaxis(fastest, -1, 0)) < 0.0401).all()


def test_background_pans_as_stated(many_scenes):
    """A background pixel shows later what the first frame shows further along the pan."""
    for number in range(4):
        scene = jax.tree.map(lambda leaf, n=number: np.asarray(leaf[n]), many_scenes)
        shift = 11 * scene.pan * 32  # pixels
        y, x = np.meshgrid(np.arange(4, 28), np.arange(4, 28), indexing="ij")
        place = jnp.stack([y + shift[0], x + shift[1]])
        both = (scene.visible[11][y, x] < 0) & np.asarray(
            jax.scipy.ndimage.map_coordinates(jnp.asarray(scene.visible[0] < 0, jnp.float32), list(place), order=1) == 1
        )
        first = jax.scipy.ndimage.map_coordinates(jnp.asarray(scene.video[0, ..., 0]), list(place), order=1)
        error = np.abs(np.asarray(first) - scene.video[11, ..., 0][y, x])[both]
        still = np.abs(scene.video[0, ..., 0] - scene.video[11, ..., 0])[4:28, 4:28][both]
        # The rim of an object is soft over one pixel, hence the median.
        assert np.median(error) < 0.01
        assert np.median(error) < 0.3 * np.median(still)


@pytest.mark.parametrize(("start", "end"), [(0.2, 0.2), (0.9, 0.7), (1.2, 0.4), (-0.1, 0.3), (-0.7, 0.7)])
def test_bounce_folds_into_the_range(start, end):
    np.testing.assert_allclose(scenes.bounce(jnp.float32(start), 0.1, 0.8), end, atol=1e-6)


@pytest.mark.parametrize(("frames", "size"), [(0, 8), (4, 0)])
def test_scene_refuses_empty_sizes(frames, size):
    with pytest.raises(ValueError, match=f"num_frames={frames}, size={size}"):
        scenes.make_scene(jax.random.key(0), num_frames=frames, size=size)
