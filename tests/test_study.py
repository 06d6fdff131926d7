"""The study: its masks are the predictors', its runs the sampler's, its report made of rows only."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from study_model import save_tiny_weights

import fgattn_jax
from fgattn_jax import query_order
from fgattn_jax.cli.main import main
from fgattn_jax.evaluation.study import attention, report, runs
from fgattn_jax.evaluation.study.context import Context
from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor

TOKENS, HEADS, WIDTH = 256, 2, 16
ORDER = query_order.cubes((4, 8, 8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def context(weights):
    from fgattn_jax.cli.study import load_model

    return Context(load_model(weights)[0], seeds=(0,), quick=True, report=lambda line: None)


def operands(seed=0):
    query, key, value = jax.random.normal(jax.random.key(seed), (3, 2, TOKENS, HEADS, WIDTH))
    return 2 * query, 2 * key, value


@pytest.mark.parametrize(
    ("statistic", "rule", "value"),
    [
        ("peak", "threshold", 4.0),
        ("peak", "threshold", 200.0),  # most rows keep their best key only
        ("mass", "top_p", 0.9),
        ("mass", "top_p", 0.3),
        ("mean", "top_p", 0.8),
        ("mean", "threshold", 0.7),
    ],
)
def test_masks_are_those_of_the_predictors(statistic, rule, value):
    query, key, value_array = operands()
    number = value / TOKENS if rule == "threshold" else value
    settings = runs.make_settings(ORDER, num_steps=4, statistic=statistic, **{rule: number})
    kept = jax.jit(attention.predict_rows, static_argnums=3)(query, key, settings, 64)
    budget = Budget(**{rule: number})
    if statistic == "mean":
        mask = MeanQueryPredictor(64, ORDER, budget=budget)(query, key)
    else:
        lse = fgattn_jax.attention_with_lse(query, key, value_array).lse
        mask = ExactPredictor(64, ORDER, statistic=statistic, budget=budget)(query, key, lse)
    # Scores are summed in another order: a key whose score is the border within rounding may fall on either side.
    assert np.mean(np.asarray(kept) != np.asarray(mask.to_rows())) < 5e-4
    assert 0.001 < float(mask.density()) < 0.9


def test_attention_is_that_of_the_library():
    query, key, value = operands()
    mask = ExactPredictor(64, ORDER, statistic="mass", budget=Budget(top_p=0.6))(query, key)
    output = attention.masked_attention(query, key, value, mask.to_rows(), jnp.asarray(ORDER), 64)
    np.testing.assert_allclose(output, fgattn_jax.attention(query, key, value, mask), atol=2e-5)
    dense = attention.masked_attention(query, key, value, None, jnp.asarray(ORDER), 64)
    np.testing.assert_allclose(dense, fgattn_jax.attention(query, key, value), atol=2e-5)


def test_selection_keeps_the_best_key_of_every_row():
    scores = jnp.array([[0.1, 0.3, 0.2], [0.0, 0.0, 0.0]])
    kept = attention.select_traced(scores, jnp.float32(0.5), jnp.float32(0))
    np.testing.assert_array_equal(kept[0], [False, True, False])
    assert kept[1].any()


def test_one_program_serves_a_whole_sweep(context):
    before = runs.run_sparse._cache_size()
    for statistic, rule, value in (("mass", "top_p", 0.9), ("peak", "threshold", 0.5), ("mean", "top_p", 0.8)):
        for order, steps in (("cubes", 4), ("raster", 3)):
            context.point("test", statistic=statistic, rule=rule, value=value, order=order, num_steps=steps)
    assert runs.run_sparse._cache_size() - before == 1


def test_dense_runs_of_both_programs_are_the_euler_loop(context):
    labels, noise = jnp.asarray(context.labels), context.noise(context.frames)
    apply = context.apply(64)
    video, _ = runs.run_dense(context.model.params, noise, labels, None, apply=apply, num_steps=3)
    x = noise
    for step in range(3):
        x = x - apply(context.model.params, x, jnp.full(labels.shape, 1 - step / 3), labels)[0] / 3
    scale = float(jnp.abs(x).max())
    np.testing.assert_allclose(video, x, atol=1e-3 * scale)
    sparse_program = context.dense_video(num_steps=3, frames=context.frames, query_block=64)
    np.testing.assert_allclose(sparse_program, np.clip(video, -1, 1), atol=1e-3 * scale)


def test_density_counts_steps_under_masks_and_work_counts_all(context):
    row = context.point("test", value=0.7, num_steps=4, refresh_every=2)
    assert 0.2 < row["density"] < 0.7
    assert row["work"] == pytest.approx((2 + 2 * row["density"]) / 4, abs=1e-3)
    at_once = context.point("test", value=0.7, num_steps=4, refresh_every=1, dense_at_refresh=False)
    assert at_once["work"] == pytest.approx(at_once["density"], abs=1e-4)
    every_step = context.point("test", value=0.7, num_steps=4, refresh_every=1)
    assert every_step["density"] is None
    assert every_step["work"] == 1
    assert every_step["psnr"] == 120


def test_keeping_more_is_closer_to_dense(context):
    quality = [context.point("test", value=value, num_steps=4)["psnr"] for value in (0.5, 0.8, 0.99)]
    assert quality == sorted(quality)
    assert quality[2] - quality[0] > 3


def test_points_measured_before_are_not_measured_again(context):
    row = context.point("test", value=0.7, num_steps=3, refresh_every=2)
    again = Context(context.model, seeds=(0,), quick=True, known=[{**row, "psnr": 1.25}], report=lambda line: None)
    assert again.point("test", value=0.7, num_steps=3, refresh_every=2)["psnr"] == 1.25
    assert again.known(section="test", value=0.7)
    assert not again.known(section="test", value=0.8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_p": 0.9, "threshold": 0.1}, "threshold=0.1 and top_p=0.9"),
        ({}, "threshold=None"),
        ({"top_p": 0.9, "num_steps": 51}, "num_steps=51"),
        ({"top_p": 0.9, "dense_first": 4}, "dense_first=4"),
        ({"top_p": 0.9, "refresh_every": 0}, "refresh_every=0"),
        ({"top_p": 0.9, "statistic": "median"}, "statistic='median'"),
    ],
)
def test_wrong_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        runs.make_settings(ORDER, **{"num_steps": 4, **options})


def test_interpolation_between_measured_densities():
    rows = [{"density": 0.2, "psnr": 20.0}, {"density": 0.4, "psnr": 30.0}, {"density": 0.6, "psnr": 50.0}]
    assert report.interpolate(rows, 0.3) == 25
    assert report.interpolate(rows, 0.6) == 50
    assert report.interpolate(rows, 0.7) is None
    assert report.interpolate(rows[:1], 0.2) is None


def study(weights, folder, *argv):
    rows, out = folder / "rows.json", folder / "study.md"
    status = main(["study", "--weights", str(weights), "--rows", str(rows), "--out", str(out), "--quick", *argv])
    assert status == 0
    return json.loads(rows.read_text()), out


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    """All sections once: the folder and the rows."""
    folder = tmp_path_factory.mktemp("study")
    return folder, study(weights, folder)[0]


def test_the_whole_study_makes_rows(whole):
    _, rows = whole
    sections = {row["section"] for row in rows}
    assert sections >= {"negligible", "agreement", "thresholds", "refresh", "orders", "mean query", "spread", "check"}
    for row in rows:
        assert {"device", "jax", "commit", "date", "command"} <= set(row)
        assert not any(isinstance(cell, dict | list) for cell in row.values())
    for row in rows:
        if row["section"] == "agreement" and row["step"] == row["reference_step"]:
            assert row["iou"] == row["recall"] == 1


def test_study_and_shipped_sampler_give_the_same_clips(whole):
    _, rows = whole
    checks = {row["what"]: row for row in rows if row["section"] == "check"}
    for what in ("dense: here, shipped", "sparse: here, shipped"):
        assert checks[what]["psnr_least"] > 55
        assert checks[what]["psnr"] > checks["shipped: sparse, dense"]["psnr"] + 10
    assert checks["sparse: here, shipped"]["density"] == pytest.approx(
        checks["sparse: here, shipped"]["density_shipped"], abs=2e-3
    )


def test_the_report_is_made_of_rows_only(weights, whole):
    folder, rows = whole
    out = folder / "study.md"
    text = out.read_text()
    links = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(links) >= 6
    for link in links:
        assert (folder / link).is_file()
    shares = {row["shape"]: row["share"] for row in rows if row["section"] == "negligible" and row["order"] == "cubes"}
    assert f"{100 * shares['16x1']:.1f} %" in text
    before = out.read_bytes(), (folder / links[0]).read_bytes()
    out.unlink()
    study(weights, folder, "--render-only")
    assert (out.read_bytes(), (folder / links[0]).read_bytes()) == before


def test_one_section_replaces_its_rows_and_keeps_the_others(weights, tmp_path):
    source = {"device": "d", "jax": "j", "commit": "c", "date": "t", "command": "x"}
    other, stale = {"section": "spread", **source}, {"section": "thresholds", **source}
    (tmp_path / "rows.json").write_text(json.dumps([other, stale]))
    rows, _ = study(weights, tmp_path, "--only", "thresholds", "--rows-only")
    assert other in rows
    assert stale not in rows
    assert sum(row["section"] == "thresholds" for row in rows) == 5
    assert not (tmp_path / "study.md").exists()


def test_resume_measures_only_what_is_missing(weights, whole, tmp_path, capsys):
    _, rows = whole
    wanted = [row for row in rows if row["section"] == "thresholds"]
    marked = [{**row, "seconds": -1} for row in wanted[:-1]]
    (tmp_path / "rows.json").write_text(json.dumps(marked))
    capsys.readouterr()
    again, _ = study(weights, tmp_path, "--only", "thresholds", "--rows-only", "--resume")
    assert again[:-1] == marked
    assert {name: again[-1][name] for name in ("value", "density")} == {
        name: wanted[-1][name] for name in ("value", "density")
    }
    assert capsys.readouterr().err.count("thresholds:") == 1


def test_a_deadline_stops_between_points_and_keeps_rows(weights, tmp_path, capsys):
    rows, _ = study(weights, tmp_path, "--only", "thresholds", "--rows-only", "--minutes", "1e-9")
    assert rows == []
    assert "out of time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--only", "orders and more"], "'orders and more'"),
        (["--seeds", "0"], "seeds=0"),
        (["--minutes", "0"], "minutes=0"),
        (["--render-only"], "none"),
    ],
)
def test_bad_options_end_in_one_line(weights, tmp_path, capsys, argv, words):
    rows = tmp_path / "rows.json"
    assert main(["study", "--weights", str(weights), "--rows", str(rows), "--out", str(tmp_path / "s.md"), *argv]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert words in err
