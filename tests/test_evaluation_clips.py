"""Clips in files and the quality of frames."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from fgattn_jax.evaluation import clips, frames, metrics

# Smooth, as H.264 likes it: a ramp that moves.
RAMP = np.linspace(0, 1, 48)[None, None, :, None] * np.linspace(0.3, 1, 5)[:, None, None, None]
CLIP = np.broadcast_to(RAMP, (5, 32, 48, 3)).astype(np.float32)


@pytest.mark.torch  # the lane that installs the extra `video`
def test_an_mp4_holds_the_frames(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="mp4 files need the extra `video`")
    clips.write_clip(tmp_path / "clip.mp4", CLIP, frames_per_second=12.5)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "clip.mp4"))
    facts = next(reader)
    read = np.stack([np.frombuffer(frame, np.uint8).reshape(32, 48, 3) for frame in reader])
    assert (facts["size"], facts["fps"], facts["codec"]) == ((48, 32), 12.5, "h264")
    assert read.shape == CLIP.shape
    assert np.abs(read / 255 - CLIP).max() < 0.05


@pytest.mark.torch
def test_an_mp4_of_odd_size_is_refused(tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="mp4 files need the extra `video`")
    with pytest.raises(ValueError, match="got 31x48"):
        clips.write_clip(tmp_path / "clip.mp4", CLIP[:, :31], frames_per_second=8)


def test_a_gif_holds_the_frames(tmp_path):
    clips.write_clip(tmp_path / "clip.gif", CLIP, frames_per_second=10)
    with Image.open(tmp_path / "clip.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (5, (48, 32), 100)
        image.seek(4)
        last = np.asarray(image.convert("RGB")) / 255
    assert np.abs(last - CLIP[4]).max() < 0.05


@pytest.mark.parametrize(
    ("name", "clip", "fps", "words"),
    [
        ("clip.webm", CLIP, 8, "end in .mp4 or .gif"),
        ("clip.gif", CLIP[0], 8, "expected frames"),
        ("clip.gif", CLIP[:0], 8, "expected frames"),
        ("clip.gif", CLIP, 0, "frames_per_second=0"),
        ("clip.gif", CLIP * np.nan, 8, "NaN"),
        ("folder.gif", CLIP, 8, "is a folder"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path, name, clip, fps, words):
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(ValueError, match=words):
        clips.write_clip(tmp_path / name, clip, frames_per_second=fps)


def test_an_mp4_without_ffmpeg_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr(clips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"fgattn-jax\[video\].*ends in \.gif"):
        clips.check_clip_path(tmp_path / "clip.mp4")


def test_quality_is_that_of_each_frame():
    noise = np.random.default_rng(0).normal(size=CLIP.shape).astype(np.float32)
    sizes = np.array([0.0, 0.01, 0.02, 0.05, 0.1], np.float32)
    other = CLIP + noise * sizes[:, None, None, None]
    quality = frames.frame_quality(other, CLIP)
    assert np.isinf(quality.psnr[0])
    np.testing.assert_allclose(quality.psnr[1:], -20 * np.log10(sizes[1:]), atol=0.3)
    assert quality.ssim[0] == pytest.approx(1)
    assert (np.diff(quality.ssim) < 0).all()
    whole = float(metrics.ssim(other[2][None], CLIP[2][None], data_range=1.0))
    assert quality.ssim[2] == pytest.approx(whole)
    with pytest.raises(ValueError, match="one shape"):
        frames.frame_quality(other[:4], CLIP)


def test_lpips_is_left_out_with_a_reason_and_never_downloads(monkeypatch, tmp_path):
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda name: None)
    assert frames.lpips_reason() == "needs lpips, torch, torchvision, not installed"
    with pytest.raises(ValueError, match="LPIPS cannot be computed: needs lpips"):
        frames.frame_lpips(CLIP, CLIP)
    hub = types.SimpleNamespace(get_dir=lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(hub=hub))
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda name: name)
    assert "backbone is not on this machine" in (frames.lpips_reason() or "")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    assert frames.lpips_reason() is None
