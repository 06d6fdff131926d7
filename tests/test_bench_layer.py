"""`fgattn bench --layer`: phases are timed once each, a step is their mean, rows of other devices stay."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.attention import attention
from fgattn_jax.cli.main import main
from fgattn_jax.evaluation import (
    benchmark_report,
    layer,
    layer_inputs,
    layer_report,
    layer_timing,
    model_shapes,
    tables,
)
from fgattn_jax.evaluation.layer import LayerSetup, PhaseTimes
from fgattn_jax.evaluation.model_shapes import ModelShape
from fgattn_jax.predictors import RefreshPolicy

EXACT = PhaseTimes(dense=10.0, lse=13.0, mask=5.0, order=0.5, sparse=3.5)
MEAN = dataclasses.replace(EXACT, lse=None, mask=1.5)
SMALL = ModelShape("small", "small", (3, 4, 5), num_heads=3, head_dim=16, num_layers=2, num_branches=2, text_tokens=6)
TWENTY = RefreshPolicy(every=5).schedule(20)  # 4 refreshes


def test_exact_masks_run_dense_at_refresh_steps():
    assert layer.step_parts(EXACT, TWENTY) == pytest.approx((4 * 13 / 20, 4 * 5 / 20, 16 * 0.5 / 20, 16 * 3.5 / 20))


def test_mean_query_masks_run_sparse_at_every_step():
    assert layer.step_parts(MEAN, TWENTY) == pytest.approx((0, 4 * 1.5 / 20, 0.5, 3.5))


def test_steps_before_the_first_mask_run_dense():
    kinds = RefreshPolicy(every=5, dense_first=10).schedule(20)
    assert layer.step_parts(MEAN, kinds) == pytest.approx((10 * 10 / 20, 2 * 1.5 / 20, 0.25, 1.75))


def test_break_even_counts_what_the_lse_adds():
    assert layer.break_even_uses(EXACT) == pytest.approx((5 + 13 - 10) / (10 - 0.5 - 3.5))
    assert layer.break_even_uses(MEAN) == pytest.approx(1.5 / 6)
    assert layer.break_even_uses(dataclasses.replace(MEAN, sparse=9.5)) is None
    assert layer.break_even_uses(dataclasses.replace(MEAN, sparse=12.0)) is None


@pytest.mark.parametrize(("uses", "words"), [(None, "never"), (0.02, "1 use"), (1.0, "1 use"), (1.2, "2 uses")])
def test_break_even_in_words(uses, words):
    assert layer_report.pays_after({"break_even_uses": uses}).startswith(words)


def test_the_search_finds_a_factor_or_says_what_is_nearest():
    gain, density = layer.find_gain(lambda gain: 1 / (1 + gain), 0.25)
    assert density == pytest.approx(0.25, abs=0.005)
    assert gain == pytest.approx(3, rel=0.05)
    with pytest.raises(ValueError, match=r"density=0\.3 where the nearest found is 0\.900"):
        layer.find_gain(lambda gain: 0.9, 0.3)


def test_shapes_have_the_tokens_of_the_papers():
    tokens = {shape.name: shape.num_tokens for shape in model_shapes.SHAPES}
    assert tokens["wan-1.3b-480p"] == tokens["wan-14b-480p"] == 32760
    assert tokens["wan-1.3b-720p"] == tokens["wan-14b-720p"] == 75600
    assert tokens["hunyuan-720p"] == 119056
    assert tokens["dit"] == 4096
    for shape in model_shapes.SHAPES:
        assert sum(shape.rotary_dims()) == shape.head_dim
        assert all(width % 2 == 0 for width in shape.rotary_dims())


def test_grids_are_made_and_cut():
    assert model_shapes.grid_of(4096) == (16, 16, 16)
    assert model_shapes.grid_of(7) == (1, 1, 7)
    assert model_shapes.smaller_grid((16, 16, 16), 4096) == (16, 16, 16)
    grid = model_shapes.smaller_grid((21, 30, 52), 4096)
    assert 0.8 * 4096 < math.prod(grid) <= 4096
    cut = model_shapes.with_grid(model_shapes.find("wan-1.3b-480p"), grid)
    assert cut.title.endswith("instead of 21x30x52")
    with pytest.raises(ValueError, match="tokens=0"):
        model_shapes.grid_of(0)


def test_inputs_are_normalised_smooth_and_seeded():
    query, key, value = (
        np.asarray(x, np.float64) for x in layer_inputs.make_inputs(SMALL, num_heads=2, dtype="float32")
    )
    assert query.shape == key.shape == value.shape == (1, 66, 2, 16)
    for x in (query, key, value):
        np.testing.assert_allclose((x**2).mean(-1), 1, rtol=1e-3)
    again = layer_inputs.make_inputs(SMALL, num_heads=2, dtype="float32")
    np.testing.assert_array_equal(query, again[0])
    # A query lies nearer to the key of its own place than to that of the farthest one; text is noise.
    scores = np.einsum("tnh,snh->nts", query[0], key[0])
    assert scores[:, np.arange(60), np.arange(60)].mean() > scores[:, np.arange(60), np.arange(60)[::-1]].mean() + 1
    neighbours = np.einsum("tnh,tnh->nt", value[0, :59], value[0, 1:60]).mean()
    assert neighbours > np.einsum("tnh,tnh->nt", value[0, 60:65], value[0, 61:66]).mean() + 1


CALL = ["bench", "--layer", "--tokens", "60", "--heads", "3", "--run-heads", "2", "--head-dim", "16", "--layers", "2"]
CALL += ["--branches", "2", "--predictor", "exact", "--predictor", "mean-query", "--query-block", "16"]
CALL += ["--density", "0.5", "--steps", "8", "--refresh-every", "4", "--rounds", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one small call of the command left its files."""
    folder = tmp_path_factory.mktemp("layer")
    names = {"rows": "results/layer.json", "out": "docs/benchmarks.md", "readme": "none", "png": "one.png"}
    files = [f"--{option}={folder / name}" for option, name in names.items()]
    assert main([*CALL, *files]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return tables.read_rows(folder / "results" / "layer.json")


def test_rows_hold_what_they_claim(rows, folder):
    assert [row["predictor"] for row in rows] == ["exact", "mean-query"]
    for row in rows:
        assert set(layer.KEY) <= set(row)
        assert row["density"] == pytest.approx(0.5, abs=0.05)
        assert row["error"] < 5e-5
        assert row["mask_ms_p10"] <= row["mask_ms"] <= row["mask_ms_p90"]
        parts = sum(row[f"step_{part}_ms"] for part in ("dense", "mask", "order", "sparse"))
        assert row["step_ms"] == pytest.approx(parts, abs=1e-3)
        assert row["step_order_ms"] == 0
        assert "order_ms" not in row
        assert row["refreshes"] == 2
        # 3 heads where 2 ran, 2 layers, 2 forwards
        assert row["model_dense_ms"] == pytest.approx(1.5 * 4 * row["dense_ms"], rel=1e-3)
        # 3 heads x 4 rows x 4 words of 4 bytes, the order, the age of each branch
        assert row["cached_layer_bytes"] == 3 * 4 * 16 + 60 * 4 + 4
        assert row["cached_model_bytes"] == 4 * 3 * 4 * 16 + 60 * 4 + 8
        assert row["sparse_bytes"] > 3 * 60 * 2 * 16 * 4
        assert row["command"].startswith("fgattn bench --layer --tokens 60 --grid 3 4 5 --heads 3 --head-dim 16")
        assert str(folder) not in json.dumps(row)
        assert row["mask_made"] == "XLA"
    assert [("lse_ms" in row) for row in rows] == [True, False]


def test_a_wrong_program_is_not_timed(monkeypatch):
    monkeypatch.setattr(layer_timing, "attention", lambda *a, **b: attention(*a, **b) + jnp.float32(0.1))
    setup = LayerSetup(SMALL, 2, "float32", query_block=16, predictors=("mean-query",), rounds=1)
    with pytest.raises(AssertionError, match=r"error=.* against the oracle"):
        layer_timing.measure(setup)


def test_new_rows_replace_those_of_the_same_question_only(rows):
    other = [{**row, "device": "Another"} for row in rows]
    newer = {**rows[0], "dense_ms": 1.0}
    kept = layer.replace_rows([*other, *rows], [newer])
    assert kept == [*other, *rows[1:], newer]


def test_the_command_leaves_pictures_and_a_report(rows, folder, tmp_path):
    device = rows[0]["device"]
    assert (folder / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "docs" / "images" / layer_report.picture_name(device)).exists()
    text = (folder / "docs" / "benchmarks.md").read_text()
    assert f"### {device}" in text
    files = [f"--rows={folder / 'results/attention.json'}", f"--out={tmp_path / 'b.md'}", "--readme=none"]
    assert main(["bench", "--render-only", *files]) == 0
    assert (tmp_path / "b.md").read_text() == text


def test_the_terminal_gets_a_table(rows):
    text = layer_report.text_table(rows)
    assert "own layer, grid 3x4x5, 3 heads of width 16, 2 of 3 heads: a step is the mean of 8" in text
    assert "2 layers x 2 forwards x 3 heads" in text
    assert text.count("in sparse") == 2


def test_documents_show_every_device(rows, tmp_path):
    rows = [{**row, "device": "Test device"} for row in rows]
    gpu = [
        {
            **row,
            "device": "NVIDIA H100",
            "order_ms": 0.1,
            "order_ms_p90": 900.0,
            "step_order_ms": 0.1,
            "jax_nn_cudnn_ms": 2.5,
        }
        for row in rows
    ]
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "\nold\n".join(benchmark_report.README_MARKS) + "\nafter\n")
    out = tmp_path / "docs" / "benchmarks.md"
    benchmark_report.render([], out, rows_name="rows.json", layer_rows=[*rows, *gpu])
    assert benchmark_report.update_readme([], readme, layer_rows=[*rows, *gpu])
    text = out.read_text()
    for device, name in (("Test device", "layer_test_device.png"), ("NVIDIA H100", "layer_nvidia_h100.png")):
        assert f"### {device}" in text
        assert f"(images/{name})" in text
        assert (out.parent / "images" / name).read_bytes().startswith(b"\x89PNG")
        assert f"mask making included, on {device}" in readme.read_text()
    assert "own layer, grid 3x4x5, 3 heads of width 16, 2 of 3 heads" in text
    assert "in sparse" in text
    assert "of 3 heads: 2.5 ms." in text
    assert "phases took at most 9000.00 x the median" in text
    assert readme.read_text().startswith("before")
    assert "old" not in readme.read_text()


def test_equal_rows_give_equal_pictures(rows, tmp_path):
    for name in ("a.png", "b.png"):
        layer_report.draw(rows, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match="expected rows"):
        layer_report.draw([], tmp_path / "c.png")


def test_the_models_are_listed(capsys):
    assert main(["bench", "--layer", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(shape.name in out for shape in model_shapes.SHAPES)


def test_models_are_cut_to_fit_a_cpu(monkeypatch):
    from fgattn_jax.cli import _bench_layer
    from fgattn_jax.cli.main import _parser

    args = _parser("bench").parse_args(["bench", "--layer", "--model", "wan-14b-720p"])
    setup = _bench_layer.make_setup(args)
    assert setup.shape.num_tokens <= 4096
    assert (setup.heads, setup.shape.num_heads) == (4, 40)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    setup = _bench_layer.make_setup(args)
    assert (setup.shape.num_tokens, setup.heads, setup.dtype) == (75600, 40, "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "dit"], "`--model` goes with `--layer`"),
        (["--refresh-every", "3"], "`--refresh-every` goes with `--layer`"),
        (["--layer", "--model", "sora"], "expected `--model` to be one of wan-1.3b-480p"),
        (["--layer", "--bench", "attention"], "`--bench` does not go with `--layer`"),
        (["--layer", "--render-only", "--steps", "3"], "`--steps` does not go with `--render-only`"),
        (["--layer", "--list", "--model", "dit"], "`--model` does not go with `--list`"),
        (["--layer", "--model", "dit", "--heads", "2"], "expected `--model` or `--tokens`"),
        (["--layer", "--tokens", "64", "--heads", "2"], "`--head-dim`, `--layers` missing"),
        (["--layer", "--branches", "2"], "`--branches` goes with `--tokens`"),
        (["--layer", "--steps", "0"], "expected `--steps` of at least 1, got 0"),
        (["--layer", "--grid", "0", "1", "1"], "three sides of at least 1 for `--grid`, got 0 1 1"),
        (["--layer", "--run-heads", "5"], "expected `--run-heads` of at most the layer's heads=4, got 5"),
        (["--layer", "--predictor", "oracle"], "expected `--predictor` of exact, exact-mass, mean-query; got 'oracle'"),
        (["--layer", "--implementation", "fast"], "expected `--implementation` of cuda, pallas, xla, reference"),
        (["--layer", "--implementation", "cuda"], "`--implementation` cuda cannot run this layer here: "),
        (["--layer", "--dtype", "int8"], "expected `--dtype` of float32, bfloat16 or float16, got 'int8'"),
        (["--layer", "--query-block", "48"], "expected `--query-block` of 16, 32, 64, 128; got 48"),
        (["--layer", "--query-order", "spiral"], "got order='spiral'"),
        (["--layer", "--density", "0.3", "1.5"], "expected `--density` from 0.01 to 0.95, got 1.5"),
        (["--layer", "--top-k", "9", "--density", "0.3"], "`--top-k` says the density itself"),
        (["--layer", "--top-k", "5000"], "expected `top_k` <= num_keys=4096, got top_k=5000"),
        (["--layer", "--top-p", "0"], "expected `--top-p` above 0 and at most 1, got 0"),
        (["--layer", "--threshold", "-1"], "expected a finite `--threshold` of at least 0, got -1"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path):
    assert main(["bench", *arguments, "--rows", str(tmp_path / "rows.json")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_without_matplotlib_it_says_so_before_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "--layer", "--rows", str(tmp_path / "rows.json")]) == 2
    assert "needs matplotlib: pip install 'fgattn-jax[demo]', or give `--rows-only`" in capsys.readouterr().err


@pytest.mark.parametrize(("lse_ms", "said"), [(9.0, "up to 10 % less"), (11.0, None), (None, None)])
def test_a_dense_call_that_is_faster_with_its_lse_is_named(lse_ms, said):
    (found,) = layer_report._faster_dense([{"dense_ms": 10.0, "lse_ms": lse_ms}]) or (None,)
    assert (found is None) if said is None else (said in found)
