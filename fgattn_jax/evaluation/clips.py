"""Clips in files: mp4 through imageio-ffmpeg (extra `video`), GIF through Pillow."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fgattn_jax.evaluation import pictures

SUFFIXES: tuple[str, ...] = (".mp4", ".gif")
"""How names of clips may end."""


def check_clip_path(path: Path) -> None:
    """Refuse a name for a clip that could not be written, before there is a clip.

    Raises:
        ValueError: The name ends in neither .mp4 nor .gif, or is that of a folder, or .mp4 is asked for and
            imageio-ffmpeg is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"expected the name of a clip to end in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"expected a file name for the clip, {str(path)!r} is a folder")
    if suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(
            f"writing {str(path)!r} needs imageio-ffmpeg, which is not installed: pip install 'fgattn-jax[video]', or "
            "choose a name that ends in .gif"
        )


def write_clip(path: Path, frames: Float[np.ndarray, "F Y X 3"], *, frames_per_second: float) -> None:
    """Write a clip in its own size.

    Args:
        path: File to write; its suffix decides, .mp4 (H.264) or .gif (256 colours a frame, endless).
        frames: Values in [0, 1]; those outside are clipped. For mp4 with even numbers of rows and columns.
        frames_per_second: A GIF rounds it to hundredths of a second per frame.

    Raises:
        ValueError: The name or the shape does not fit, a value is NaN or infinite, or ffmpeg is missing.
        OSError: ffmpeg failed.
    """
    check_clip_path(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"expected frames [F, Y, X, 3], got shape={frames.shape}")
    if not frames_per_second > 0:
        raise ValueError(f"expected `frames_per_second` > 0, got frames_per_second={frames_per_second}")
    pixels = pictures.to_pixels(np.asarray(frames, np.float32) * 2.0 - 1.0)
    if path.suffix.lower() == ".gif":
        pictures.save_gif(path, pixels, zoom=1, frames_per_second=frames_per_second)
        return
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(
            f"expected even numbers of rows and columns for an mp4, got {height}x{width}: crop, or write a .gif"
        )
    # The child process is ffmpeg itself at once: what Python says of forks beside JAX's threads does not apply.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"os\.fork", category=RuntimeWarning)
        _write_mp4(path, pixels, frames_per_second)


def _write_mp4(path: Path, pixels: np.ndarray, frames_per_second: float) -> None:
    import imageio_ffmpeg

    height, width = pixels.shape[1:3]
    rate: Any = frames_per_second  # annotated as an integer there; ffmpeg takes any rate
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=rate, codec="libx264", quality=7, macro_block_size=1
    )
    writer.send(None)  # starts ffmpeg
    try:
        for frame in pixels:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()
