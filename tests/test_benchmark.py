"""`fgattn bench`: what is timed is right, rows are complete, documents come from rows only."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fgattn_jax.cli.main import main
from fgattn_jax.evaluation import benchmark, benchmark_report, tables
from fgattn_jax.evaluation.cases import (
    CPU_BENCHMARK_CASES,
    GPU_BENCHMARK_CASES,
    SMALL_CASES,
    AttentionCase,
    make_inputs,
)

FIELDS = (
    *("bench", "implementation", "batch", "heads", "kv_heads", "queries", "keys", "head_dim", "query_block", "dtype"),
    *("density", "ms", "tflops", "device", "jax", "commit", "date", "command"),
)
TINY = AttentionCase("tiny, density 0.3", "", num_queries=64, num_keys=64, head_dim=16, query_block=16)


def rows_of(names=benchmark.BENCHES, cases=(TINY,)):
    source = {"rounds": 2, "device": "test", "jax": "0", "commit": "0", "date": "2026-01-01", "command": "fgattn bench"}
    return [{**row, **source} for row in benchmark.run_benches(names, cases, 2)]


@pytest.fixture(scope="module")
def rows():
    return rows_of()


def test_rows_hold_every_field_and_plain_values(rows, tmp_path):
    assert {row["bench"] for row in rows} == set(benchmark.BENCHES)
    for row in rows:
        assert set(FIELDS) <= set(row)
        assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]
    tables.write_rows(tmp_path / "rows.json", rows)
    assert tables.read_rows(tmp_path / "rows.json") == rows


def test_rates_count_kept_slices_only(rows):
    sparse = next(r for r in rows if r["bench"] == "attention" and r["implementation"] == "xla")
    assert sparse["density"] == pytest.approx(float(make_inputs(TINY).mask.density()))
    assert sparse["tflops"] == pytest.approx(4 * 2 * 64 * 64 * 16 * sparse["density"] / sparse["ms"] / 1e9, rel=1e-3)


def test_a_wrong_program_is_not_timed():
    inputs = make_inputs(TINY)
    with pytest.raises(AssertionError, match=r"error=.* against the oracle"):
        benchmark.gate(TINY, inputs, jnp.zeros_like(inputs.query))


def test_contestants_take_turns_and_the_first_round_does_not_count():
    calls = []
    contestants = [benchmark.Contestant(name, lambda name=name: calls.append(name), None) for name in "ab"]
    timings = benchmark.time_rounds(contestants, 2)
    assert "".join(calls) == "ababab"
    assert len(timings) == 2
    with pytest.raises(ValueError, match="at least one round, got rounds=0"):
        benchmark.time_rounds(contestants, 0)


def line(density: float, ms: float) -> dict:
    sizes = dict.fromkeys(("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "query_block"), 64)
    case = {"case": f"4096 tokens, density {density:g}", "mask": "random", "dtype": "bfloat16", **sizes}
    return {"bench": "attention", "implementation": "xla", "density": density, "ms": ms, **case}


def test_linearity_measures_the_distance_from_the_best_line():
    exact = [line(d, 10 + 100 * d) for d in (0.05, 0.1, 0.2, 0.5)]
    assert benchmark_report.linearity(exact) == pytest.approx((10, 100, 0), abs=1e-9)
    bent = [*exact[:-1], line(0.5, 120)]
    assert benchmark_report.linearity(bent)[2] > 0.1
    assert benchmark_report.linearity(exact[:2]) is None
    assert benchmark_report.linearity(exact, "cuda") is None
    other_size = line(0.3, 1) | {"queries": 128}
    assert benchmark_report.linearity([*exact, other_size]) == pytest.approx((10, 100, 0), abs=1e-9)


def test_documents_are_made_from_rows(rows, tmp_path):
    out, readme = tmp_path / "docs" / "benchmarks.md", tmp_path / "README.md"
    readme.write_text(f"before\n{benchmark_report.README_MARKS[0]}\nold\n{benchmark_report.README_MARKS[1]}\nafter\n")
    benchmark_report.render(rows, out, rows_name="rows.json")
    text = out.read_text()
    assert "tiny, density 0.3" in text
    assert "Mask making" in text
    assert "mean query, threshold" in text
    assert benchmark_report.update_readme(rows, readme)
    text = readme.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "tiny, density 0.3" in text
    assert not benchmark_report.update_readme(rows, tmp_path / "absent.md")
    with pytest.raises(ValueError, match="got none; run `fgattn bench` first"):
        benchmark_report.render([], out, rows_name="rows.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "expected `--rounds` of at least 1, got rounds=0"),
        (["--case", "huge"], "expected `--case` to name one of"),
        (["--bench", "speed"], "expected benches among attention, gradient, predictors, got 'speed'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path):
    assert main(["bench", *arguments, "--rows", str(tmp_path / "rows.json")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_list_names_every_case(capsys):
    assert main(["bench", "--list"]) == 0
    assert "4096 tokens, density 0.2" in capsys.readouterr().out


def test_case_names_are_unique_and_masks_have_the_density_they_claim():
    cases = (*SMALL_CASES, *CPU_BENCHMARK_CASES, *GPU_BENCHMARK_CASES)
    assert len({case.name for case in cases}) == len(cases)
    for case in CPU_BENCHMARK_CASES:
        small = dataclasses.replace(case, num_keys=512, num_queries=2048)
        rows = make_inputs(small).rows
        assert np.mean(rows) == pytest.approx(case.density, rel=0.25)
