"""PSNR and SSIM against definitions written out in float64."""

import jax
import numpy as np
import pytest

from fgattn_jax.evaluation.metrics import psnr, ssim


def clips(shape=(2, 3, 20, 17, 3), noise=0.2, seed=0):
    rng = np.random.default_rng(seed)
    reference = rng.uniform(-1, 1, shape)
    return (reference + noise * rng.standard_normal(shape)).astype(np.float32), reference.astype(np.float32)


def naive_ssim(x, y, data_range):
    """Window by window, pixel by pixel, in float64; [F, Y, X, C]."""
    offsets = np.arange(-5, 6)
    window = np.exp(-0.5 * (offsets[:, None] ** 2 + offsets[None] ** 2) / 1.5**2)
    window /= window.sum()
    x, y = x.astype(np.float64), y.astype(np.float64)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for frame in range(x.shape[0]):
        for channel in range(x.shape[3]):
            for top in range(x.shape[1] - 10):
                for left in range(x.shape[2] - 10):
                    a = x[frame, top : top + 11, left : left + 11, channel]
                    b = y[frame, top : top + 11, left : left + 11, channel]
                    mean_a, mean_b = (window * a).sum(), (window * b).sum()
                    var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                    both = (window * (a - mean_a) * (b - mean_b)).sum()
                    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
                    values.append(luminance * (2 * both + c2) / (var_a + var_b + c2))
    return np.mean(values)


def test_psnr_is_the_definition():
    video, reference = clips()
    error = ((video.astype(np.float64) - reference) ** 2).mean((1, 2, 3, 4))
    np.testing.assert_allclose(psnr(video, reference), 10 * np.log10(4 / error), rtol=1e-5)
    np.testing.assert_allclose(psnr(video, reference, data_range=1.0), 10 * np.log10(1 / error), rtol=1e-5)


def test_a_known_offset_has_a_known_psnr():
    reference = np.zeros((1, 2, 12, 12, 3), np.float32)
    np.testing.assert_allclose(psnr(reference + 0.02, reference), [40.0], rtol=1e-5)


def test_equal_clips_are_infinite_decibels_and_similarity_one():
    video, _ = clips()
    assert np.isinf(psnr(video, video)).all()
    np.testing.assert_allclose(ssim(video, video), 1.0, atol=1e-6)


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_is_the_definition(data_range):
    video, reference = clips(shape=(2, 2, 14, 13, 3))
    wanted = [naive_ssim(a, b, data_range) for a, b in zip(video, reference, strict=True)]
    np.testing.assert_allclose(ssim(video, reference, data_range=data_range), wanted, rtol=2e-5)
    assert 0.05 < wanted[0] < 0.99


def test_ssim_of_smooth_bright_clips_keeps_its_digits():
    """Variances far below the squared mean: float32 sums of squares would lose them."""
    line = np.linspace(0, 0.01, 16)
    reference = np.broadcast_to(0.9 + line[:, None, None] + line[None, :, None] ** 2, (1, 16, 16, 3)).astype(np.float32)
    video = reference + np.float32(0.002) * np.sin(np.arange(16, dtype=np.float32))[None, :, None, None]
    np.testing.assert_allclose(ssim(video, reference), naive_ssim(video, reference, 2.0), atol=1e-5)


def test_metrics_work_under_jit_and_on_single_clips():
    video, reference = clips()
    together = jax.jit(lambda a, b: (psnr(a, b), ssim(a, b)))(video, reference)
    for value, function in zip(together, (psnr, ssim), strict=True):
        assert value.shape == (2,)
        np.testing.assert_allclose(value[1], function(video[1], reference[1]), rtol=1e-5)


@pytest.mark.parametrize("function", [psnr, ssim])
def test_wrong_input_says_what_came(function):
    video, reference = clips()
    with pytest.raises(ValueError, match=r"\(2, 3, 20, 17, 3\).*\(1, 3, 20, 17, 3\)"):
        function(video, reference[:1])
    with pytest.raises(ValueError, match=r"\(20, 17, 3\)"):
        function(video[0, 0], reference[0, 0])
    with pytest.raises(ValueError, match="data_range=0"):
        function(video, reference, data_range=0)


def test_ssim_needs_a_frame_as_large_as_its_window():
    small = np.zeros((1, 2, 10, 20, 3), np.float32)
    with pytest.raises(ValueError, match=r"11x11.*10, 20"):
        ssim(small, small)
