"""The benchmark of whole denoising steps: sums over a video, extrapolation, rows. Tiny models; no speed is checked."""

import json
from pathlib import Path

import pytest

from benchmarks.video.__main__ import ROWS, extrapolated, main, summary, video_seconds
from benchmarks.video.worker import StepTimes, measure, with_layers
from fgattn_jax.evaluation import tables
from fgattn_jax.models import hunyuan_video, wan


def test_a_video_is_fifty_steps_with_new_masks_every_fifteen():
    assert video_seconds("dense", {"dense": 2.0}) == 100.0
    assert video_seconds("mean-query", {"refresh": 2.0}) == 100.0
    assert video_seconds("cached", {"refresh": 3.0, "cached": 1.0}) == 4 * 3.0 + 46 * 1.0


def test_layers_are_extrapolated_on_a_line():
    few = StepTimes({"refresh": 1.5, "cached": 1.1}, 0.3, None, 10, 3.0)
    many = StepTimes({"refresh": 2.5, "cached": 1.3}, 0.3, 7, 20, 3.0)
    all_layers = extrapolated(few, many, 2, 30)
    assert all_layers.seconds == pytest.approx({"refresh": 0.5 + 30 * 0.5, "cached": 0.9 + 30 * 0.1})
    assert (all_layers.mask_bytes, all_layers.peak_bytes) == (150, 7)


def test_fewer_layers_keep_the_kinds_of_blocks():
    assert with_layers(wan.PRESETS["wan-1.3b"], 4).num_attentions == 4
    few = with_layers(hunyuan_video.HunyuanVideoConfig(), 6)
    assert (few.num_dual_layers, few.num_single_layers) == (2, 4)
    with pytest.raises(ValueError, match="multiple of 3 for HunyuanVideo, got 4"):
        with_layers(hunyuan_video.HunyuanVideoConfig(), 4)


def test_steps_of_each_kind_are_timed_and_densities_are_those_asked_for():
    asked = [("cached", 0.25), ("mean-query", 0.5)]
    exact, mean = measure("wan-tiny", asked, layers=1, repeats=1, frames=5)
    assert (set(exact.seconds), set(mean.seconds)) == ({"refresh", "cached"}, {"refresh"})
    assert (exact.density, mean.density) == (pytest.approx(0.25, abs=0.02), pytest.approx(0.5, abs=0.02))
    assert exact.mask_bytes > mean.mask_bytes == 0
    assert exact.first_step_s > exact.seconds["refresh"]


@pytest.mark.slow
def test_rows_name_what_was_not_measured(tmp_path, capsys):
    rows = tmp_path / "video.json"
    assert main(["--shapes", "hunyuan-tiny", "--repeats", "1", "--results", str(rows)]) == 0
    assert main(["--shapes", "hunyuan-tiny", "--budget-s", "-1", "--results", str(rows)]) == 1
    assert "hunyuan-tiny cached 0.35: no time left" in capsys.readouterr().err
    kept = {row["attention"]: row for row in json.loads(rows.read_text())}
    assert set(kept) == {"dense", "none", "cached", "mean-query"}
    assert kept["dense"]["speed"] == 1
    assert kept["cached"]["refresh_s"] > 0
    assert kept["cached"]["weights"] == "random"
    assert (kept["cached"]["device"], kept["cached"]["peak_bytes"]) == ("x86_64 CPU", None)
    assert kept["cached"]["command"].startswith("python -m benchmarks.video --shapes hunyuan-tiny")


def test_a_run_says_that_it_keeps_no_rows(capsys):
    assert main(["--shapes", "wan-tiny", "--budget-s", "-1"]) == 1
    assert "--results benchmarks/results/video.json adds them there" in capsys.readouterr().err


def test_the_readme_of_the_benchmarks_shows_the_rows(capsys):
    root = Path(__file__).resolve().parents[1]
    shown = summary(tables.read_rows(root / ROWS))
    assert shown in (root / "benchmarks" / "README.md").read_text()
    assert main(["--summary", "--results", str(root / ROWS)]) == 0
    assert shown in capsys.readouterr().out
