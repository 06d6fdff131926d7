"""How far the frames of a clip are from those of another: PSNR, SSIM and, where it can be had offline, LPIPS."""
# LPIPS needs torch, checking types does not.
# pyright: reportMissingImports=false

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fgattn_jax.evaluation import metrics

Frames = Float[np.ndarray, "F Y X 3"]

_LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"


class FrameQuality(NamedTuple):
    """Per frame, `[F]` each.

    Attributes:
        psnr: Decibels; infinite for equal frames.
        ssim: 1 for equal frames.
    """

    psnr: Float[np.ndarray, " F"]
    ssim: Float[np.ndarray, " F"]


def frame_quality(clip: Frames, reference: Frames) -> FrameQuality:
    """PSNR and SSIM of every frame, for values in [0, 1].

    Raises:
        ValueError: The shapes differ, or frames are smaller than 11 x 11 pixels.
    """
    if clip.shape != reference.shape:
        raise ValueError(f"expected two clips of one shape, got shape={clip.shape} and shape={reference.shape}")
    # Frame by frame: windows of a whole 720p clip would take gigabytes.
    pairs = list(zip(clip, reference, strict=True))
    psnr = [float(metrics.psnr(a[None], b[None], data_range=1.0)) for a, b in pairs]
    ssim = [float(metrics.ssim(a[None], b[None], data_range=1.0)) for a, b in pairs]
    return FrameQuality(np.array(psnr), np.array(ssim))


def lpips_reason() -> str | None:
    """Why LPIPS cannot be computed here, in words; None if it can.

    Its backbone is a download of its own, which is not made here.
    """
    missing = [name for name in ("lpips", "torch", "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}, not installed"
    import torch

    if not (Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_BACKBONE).is_file():
        return "its backbone is not on this machine: python -c \"import lpips; lpips.LPIPS(net='alex')\" downloads it"
    return None


def frame_lpips(clip: Frames, reference: Frames) -> Float[np.ndarray, " F"]:
    """LPIPS (AlexNet) of every frame, 0 for equal frames; for values in [0, 1].

    Raises:
        ValueError: It cannot be computed here; see `lpips_reason`.
    """
    reason = lpips_reason()
    if reason is not None:
        raise ValueError(f"LPIPS cannot be computed: {reason}")
    import lpips
    import torch

    model = lpips.LPIPS(net="alex", verbose=False)

    def prepare(frame: np.ndarray) -> "torch.Tensor":
        return torch.from_numpy(np.array(frame, np.float32)).permute(2, 0, 1)[None] * 2 - 1

    with torch.no_grad():
        return np.array([float(model(prepare(a), prepare(b))) for a, b in zip(clip, reference, strict=True)])
