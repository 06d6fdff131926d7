"""The command line: help that teaches, bad input in one line, figures that are right."""

import json
import sys

import numpy as np
import pytest

from fgattn_jax import masks
from fgattn_jax.cli.main import main

COMMANDS = ["demo", "generate", "explain", "mask-stats", "bench", "tune", "study"]


@pytest.fixture(scope="module")
def saved_mask(tmp_path_factory):
    """Two heads, 40 queries (3 rows of 16), 50 keys: head 0 keeps 10 keys in every row, head 1 keeps 0, 50 and 5."""
    rows = np.zeros((1, 2, 3, 50), bool)
    rows[0, 0, :, 20:30] = True
    rows[0, 1, 1, :] = True
    rows[0, 1, 2, ::10] = True
    path = tmp_path_factory.mktemp("masks") / "mask.safetensors"
    masks.save_mask(path, masks.from_rows(rows, query_block=16, num_queries=40))
    return path


def fails(capsys, *argv):
    """Runs a call that must fail; returns its only line on standard error."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_alone_it_prints_help_without_loading_jax(run_python):
    out = run_python("import sys; from fgattn_jax.cli.main import main; print(main([]), 'jax' in sys.modules)")
    for name in COMMANDS:
        assert name in out
    assert "examples:" in out
    assert out.splitlines()[-1] == "0 False"


def test_python_m_is_the_same_command(monkeypatch, capsys):
    import runpy

    monkeypatch.setattr(sys, "argv", ["fgattn", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("fgattn_jax", run_name="__main__")
    assert capsys.readouterr().out.startswith("fgattn_jax ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_examples_without_loading_jax(command, run_python):
    code = f"""
import sys
from fgattn_jax.cli.main import main
try:
    main([{command!r}, "--help"])
except SystemExit as stop:
    print(stop.code, "jax" in sys.modules)
"""
    out = run_python(code)
    assert out.splitlines()[-1] == "0 False"
    assert f"fgattn {command}" in out
    assert "example" in out.lower()


def test_an_unknown_command_lists_the_known_ones(capsys):
    line = fails(capsys, "expalin")
    assert "'expalin'" in line
    assert "`explain`" in line


def test_a_wrong_option_ends_with_status_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["explain", "--heads", "many"])
    assert "invalid int value: 'many'" in capsys.readouterr().err


def test_traceback_is_shown_when_asked_for(tmp_path):
    with pytest.raises(ValueError, match="no file at"):
        main(["--traceback", "mask-stats", str(tmp_path / "none")])


def test_explain_says_what_runs_and_why_not_the_others(capsys):
    assert main(["explain", "--queries", "256", "--heads", "4", "--kv-heads", "2", "--density", "0.25"]) == 0
    out = capsys.readouterr().out
    assert "[1, 256, 4, 64]" in out
    assert "[1, 256, 2, 64]" in out
    # 4 heads x 4 rows x 256 keys x 0.25
    assert "1,024 slices kept" in out
    for name in ("xla", "pallas", "cuda"):
        assert name in out


def test_explain_json_holds_reasons_and_cost(capsys):
    assert main(["explain", "--queries", "100", "--keys", "200", "--heads", "2", "--json", "--density", "0.5"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["implementation"] == "xla"
    assert set(answer["reasons"]) >= {"pallas", "cuda"}
    assert answer["mask_bytes"] == 2 * 2 * 4 * 8
    assert answer["gflop_dense"] == pytest.approx(4e-9 * 2 * 100 * 200 * 64, abs=1e-6)
    assert answer["gflop"] == pytest.approx(answer["gflop_dense"] / 2, abs=1e-6)


def test_explain_without_a_mask(capsys):
    assert main(["explain", "--dense", "--json", "--queries", "128"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["query_block"], answer["mask_bytes"], answer["density"]) == (None, 0, 1.0)


def test_explain_of_an_implementation_that_cannot_run(capsys):
    status = main(["explain", "--implementation", "cuda", "--queries", "128"])
    out, err = capsys.readouterr()
    assert status in (1, 2)
    assert "needs an NVIDIA GPU of the Hopper generation" in out + err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--queries", "0"], "`--queries` of at least 1, got 0"),
        (["--kv-heads", "-2"], "`--kv-heads` of at least 1, got -2"),
        (["--density", "1.5"], "`--density` between 0 and 1, got 1.5"),
        (["--density", "nan"], "`--density` between 0 and 1, got nan"),
        (["--query-block", "48"], "48"),
        (["--query-block", "0"], "0"),
        (["--heads", "6", "--kv-heads", "4"], "4"),
        (["--implementation", "flash"], "flash"),
    ],
)
def test_explain_bad_input_is_one_line(words, message, capsys):
    assert message in fails(capsys, "explain", *words)


def test_mask_stats_figures(saved_mask, capsys):
    assert main(["mask-stats", str(saved_mask), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["density_per_head"] == pytest.approx([0.2, 55 / 150])
    assert stats["density"] == pytest.approx(85 / 300)
    assert stats["count"] == {
        "min": 0,
        "median": 10.0,
        "mean": pytest.approx(85 / 6),
        "max": 50,
        "max_by_mean": pytest.approx(300 / 85),
    }
    assert (stats["empty_rows"], stats["full_rows"], stats["rows"]) == (1, 1, 3)
    # Counts 10 10 10 0 50 5 in bins 5 keys wide; the last bin is closed.
    assert stats["histogram"]["rows"] == [1, 1, 3, 0, 0, 0, 0, 0, 0, 1]
    assert stats["bytes"] == {"bits": 2 * 3 * 4 * 4, "as_booleans": 2 * 40 * 50}


def test_mask_stats_text(saved_mask, capsys):
    assert main(["mask-stats", str(saved_mask)]) == 0
    out = capsys.readouterr().out
    assert "40 queries x 50 keys, 16 queries per slice" in out
    assert "head   0  0.2000  ########\n" in out
    assert "empty rows 1, full rows 1" in out


def test_mask_stats_of_an_empty_mask(tmp_path, capsys):
    masks.save_mask(
        tmp_path / "none.safetensors",
        masks.from_rows(np.zeros((1, 1, 1, 8), bool), query_block=16, num_queries=16),
    )
    assert main(["mask-stats", str(tmp_path / "none.safetensors")]) == 0
    assert "density 0.0000" in capsys.readouterr().out


def test_mask_stats_plot(saved_mask, tmp_path, capsys):
    from PIL import Image

    assert main(["mask-stats", str(saved_mask), "--plot", str(tmp_path / "mask.png")]) == 0
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10


def test_mask_stats_plot_without_matplotlib(saved_mask, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "fgattn-jax[demo]" in fails(capsys, "mask-stats", str(saved_mask), "--plot", str(tmp_path / "mask.png"))


def test_mask_stats_bad_files_are_one_line(saved_mask, tmp_path, capsys):
    assert "no file at" in fails(capsys, "mask-stats", str(tmp_path / "none.safetensors"))
    (tmp_path / "short.safetensors").write_bytes(saved_mask.read_bytes()[:-40])
    fails(capsys, "mask-stats", str(tmp_path / "short.safetensors"))
    (tmp_path / "text.safetensors").write_text("not a mask")
    fails(capsys, "mask-stats", str(tmp_path / "text.safetensors"))
