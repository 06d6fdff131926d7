"""`fgattn demo` on a tiny random model: what it writes, what it prints, what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from study_model import CONFIG, save_tiny_weights

from fgattn_jax import query_order
from fgattn_jax.cli import _demo_run
from fgattn_jax.cli.main import main
from fgattn_jax.models.dit.sampling import sample
from fgattn_jax.models.dit.weights import load_weights
from fgattn_jax.predictors import Budget, ExactPredictor, RefreshPolicy

NOISE = jax.random.normal(jax.random.key(3), (1, 4, 32, 32, 3))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def results(weights, tmp_path_factory):
    """One run of the command; the folder and its metrics."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    argv = ["demo", "--weights", str(weights), "--out", str(folder), "--steps", "6", "--theta", "0.7", "--seed", "3"]
    assert main([*argv, "--refresh-every", "3", "--dense-first", "1", "--query-block", "32"]) == 0
    return folder, json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def guided(weights):
    """A model, and dense and sparse runs of it with guidance."""
    model = load_weights(weights)[0]
    predictor = ExactPredictor(32, query_order.cubes(CONFIG.default_grid), statistic="mass", budget=Budget(top_p=0.7))
    denoiser = _demo_run.Denoiser(model, predictor, label=1, guidance=3.0)
    policy = RefreshPolicy(every=2)
    dense = denoiser.run(NOISE, None, num_steps=4, title="dense")
    return model, predictor, policy, dense, denoiser.run(NOISE, policy, num_steps=4, title="sparse")


def test_all_files_are_there_and_can_be_read(results):
    folder, _ = results
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "dense.gif",
        "sparse.gif",
        "side_by_side.png",
        "density.png",
        "masks_step_01.png",
        "kept_step_01.png",
        "masks_step_04.png",
        "kept_step_04.png",
        "metrics.json",
    }
    for name in names - {"metrics.json"}:
        with Image.open(folder / name) as image:
            image.load()
            assert image.n_frames == 4 if name.endswith(".gif") else image.size[0] > 100


def test_figures_hold_together(results):
    _, metrics = results
    kinds = [entry["kind"] for entry in metrics["steps_run"]]
    assert kinds == ["dense", "refresh", "cached", "cached", "refresh", "cached"]
    density = np.array(metrics["density_by_step_and_layer"])
    assert density.shape == (6, CONFIG.num_layers)
    np.testing.assert_array_equal(density[[0, 1, 4]], 1)
    assert (density[[2, 3, 5]] < 0.8).all()
    assert metrics["density"] == pytest.approx(density[[2, 3, 5]].mean())
    assert metrics["work"] == pytest.approx(density.mean())
    np.testing.assert_allclose([row["density"] for row in metrics["layers"]], density[[2, 3, 5]].mean(0))
    # A mask of step 1 was used at steps 2 and 3.
    np.testing.assert_allclose([row["masks_of_step_1"] for row in metrics["layers"]], density[2], rtol=1e-5)
    assert 15 < metrics["psnr"] < 80
    assert 0.3 < metrics["ssim"] < 1
    for run in ("dense", "sparse"):
        seconds = metrics["seconds"][run]
        assert seconds["attention"] > 0
        assert seconds["all"] > 0
    assert metrics["seconds"]["sparse"]["masks"] > 0
    assert metrics["implementation"]["sparse"].startswith("xla")
    assert {"device", "jax", "commit", "date", "command", "options"} <= set(metrics)


def test_screen_shows_tables_and_files(weights, tmp_path, capsys):
    argv = ["demo", "--weights", str(weights), "--out", str(tmp_path), "--quick", "--predictor", "mean-query"]
    assert main([*argv, "--theta", "1", "--query-order", "raster"]) == 0
    out, err = capsys.readouterr()
    for text in (
        "density of the masks by layer",
        "attention",
        "PSNR",
        "SSIM",
        "share 1",
        "side_by_side.png",
    ):
        assert text in out
    assert "sparse: step 4 of 4" in err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["steps_run"]) == 4
    # Keeping everything is dense attention, computed by another implementation.
    assert metrics["density"] > 0.999
    assert metrics["psnr"] is None or metrics["psnr"] > 60


def test_both_runs_are_those_of_the_shipped_sampler(guided):
    model, predictor, policy, dense, sparse = guided
    label = jnp.array([1])
    wanted_dense = sample(model, NOISE, label, steps=4, guidance=3.0)
    wanted = sample(model, NOISE, label, steps=4, guidance=3.0, predictor=predictor, refresh=policy)
    scale = float(jnp.abs(wanted.video).max())
    np.testing.assert_allclose(dense.video, wanted_dense.video[0], atol=1e-3 * scale)
    np.testing.assert_allclose(sparse.video, wanted.video[0], atol=1e-3 * scale)
    np.testing.assert_allclose(sparse.density, wanted.density, atol=1e-3)
    np.testing.assert_array_equal(dense.density, 1)
    # The runs differ by more than rounding: what is compared is not one run with itself.
    assert np.abs(sparse.video - dense.video).max() > 10e-3 * scale


def test_masks_of_a_step_are_those_made_last(guided):
    *_, dense, sparse = guided
    assert list(sparse.masks) == [0, 2]
    assert sparse.mask_of_step(1) is sparse.masks[0]
    assert sparse.mask_of_step(2) is sparse.mask_of_step(3) is sparse.masks[2]
    assert not dense.masks
    assert dense.mask_of_step(3) is None


def test_a_terminal_gets_a_bar(monkeypatch):
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with _demo_run.progress("dense", 3) as advance:
        for _ in range(3):
            advance("some words")
    assert "3/3" in terminal.getvalue()
    assert "some words" in terminal.getvalue()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "0"], "`--steps`"),
        (["--steps", "4", "--dense-first", "4"], "dense_first=4"),
        (["--dense-first", "-1"], "dense_first=-1"),
        (["--refresh-every", "0"], "`--refresh-every`"),
        (["--theta", "1.5"], "theta=1.5"),
        (["--theta", "nan"], "theta=nan"),
        (["--tau", "0.5"], "`--theta`"),
        (["--predictor", "exact", "--theta", "0.9"], "`--tau`"),
        (["--predictor", "mean-query", "--theta", "0.9", "--tau", "1"], "both"),
        (["--predictor", "exact", "--tau", "-1"], "tau=-1"),
        (["--query-order", "spiral"], "'spiral'"),
        (["--guidance", "inf"], "guidance=inf"),
    ],
)
def test_bad_options_end_in_one_line(weights, tmp_path, capsys, argv, words):
    assert main(["demo", "--weights", str(weights), "--out", str(tmp_path / "x"), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "x").exists()


def test_missing_and_corrupt_weights_end_in_one_line(tmp_path, capsys):
    missing, corrupt = tmp_path / "none.safetensors", tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(b"no weights" * 10)
    for path in (missing, corrupt):
        assert main(["demo", "--weights", str(path), "--out", str(tmp_path / "out")]) == 2
        _, err = capsys.readouterr()
        assert err.count("\n") == 1
        assert path.name in err


def test_a_file_in_place_of_the_folder_is_refused_first(weights, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--weights", str(weights), "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
