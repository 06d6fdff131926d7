"""`fgattn tune`: configs that are right are timed, all others are named; the fastest is kept for its device."""

import dataclasses
import datetime
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from fgattn_jax.cli.main import main
from fgattn_jax.evaluation import benchmark, tables, tuning
from fgattn_jax.implementations import reference
from fgattn_jax.pallas_kernels import attention, support
from fgattn_jax.pallas_kernels import config as configs

SHIPPED = Path(configs.__file__).parent / "tuned.json"
SOURCE = {
    "device": "Some GPU",
    "jax": "0.12.0",
    "python": "3.12.1",
    "commit": "0123456789ab",
    "date": "2026-01-31",
    "command": "fgattn tune --rounds 2",
}
CANDIDATES = configs.candidates
CONFIG = {"tile_keys": 128, "stages": 2, "compute_registers": 216, "copy_registers": 40}
SHAPE = {"tokens": 200, "heads": 2, "density": 0.3, "dtype": "bfloat16", "rounds": 2}
SMALL = ("--tokens", "200", "--heads", "2", "--rounds", "2")
PAIRS = [(h, m) for h in support.HEAD_DIMS for m in support.QUERY_BLOCKS]


def make_row(**changes):
    """A row as it should be, for H = 128 and M = 128, with some fields changed."""
    row = {"head_dim": 128, "query_block": 128, "config": CONFIG, "ms": 2.5, "runner_up_ms": 3.0, "shape": SHAPE}
    return row | {name: SOURCE[name] for name in ("device", "jax", "date", "command", "commit")} | changes


@dataclasses.dataclass
class FakeGpu:
    """What the fake kernel and the fake timer do, by config; other configs run, are right and take 9 ms."""

    ms: dict = dataclasses.field(default_factory=dict)
    broken: set = dataclasses.field(default_factory=set)
    wrong: dict = dataclasses.field(default_factory=dict)
    timed: list = dataclasses.field(default_factory=list)
    rounds: int | None = None


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()

    def forward(query, key, value, bits, query_order, work_order, *, scale, query_block, config):
        assert work_order is not None
        if config in fake.broken:
            raise NotImplementedError("no such instruction\nand much more text")
        output, lse = reference.masked(query, key, value, bits, query_order, scale=scale, query_block=query_block)
        return output + jnp.asarray(fake.wrong.get(config, 0.0), output.dtype), lse

    def time_rounds(contestants, rounds):
        fake.rounds = rounds
        fake.timed += [contestant.name for contestant in contestants]
        named = {str(config): ms for config, ms in fake.ms.items()}
        times = [named.get(contestant.name, 9.0) for contestant in contestants]
        return [benchmark.Timing(ms, ms - 0.5, ms + 0.5) for ms in times]

    monkeypatch.setattr(attention, "forward", forward)
    monkeypatch.setattr(benchmark, "time_rounds", time_rounds)
    monkeypatch.setattr(tuning, "unsupported_reasons", lambda case: ())
    monkeypatch.setattr(tables, "provenance", lambda command: SOURCE | {"command": command})
    return fake


def candidates(head_dim=128, query_block=128):
    return configs.candidates(head_dim=head_dim, query_block=query_block)


@pytest.fixture
def two_candidates(monkeypatch):
    """Compiling all of them takes long where head widths are small."""
    monkeypatch.setattr(configs, "candidates", lambda **sizes: CANDIDATES(**sizes)[:2])


def fails(capsys, *argv):
    """Runs a call that must fail; returns its only line on standard error."""
    assert main(["tune", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(("head_dim", "query_block"), PAIRS)
def test_candidates_fit_and_begin_with_the_heuristics_choice(head_dim, query_block):
    found = candidates(head_dim, query_block)
    assert found[0] == configs.heuristic(head_dim=head_dim, query_block=query_block)
    assert len(set(found)) == len(found) == 3 * (found[0].stages - 1)
    assert {config.tile_keys for config in found} == {query_block}
    for config in found:
        assert config.shared_bytes(head_dim=head_dim, query_block=query_block) <= configs.SHARED_BYTES
    more = dataclasses.replace(found[0], stages=found[0].stages + 1)
    assert more.shared_bytes(head_dim=head_dim, query_block=query_block) > configs.SHARED_BYTES


def test_the_list_names_all_candidates_and_needs_neither_a_device_nor_jax(run_python):
    words = ["tune", "--list", "--head-dim", "64", "128", "--query-block", "64", "128"]
    code = f"import sys; from fgattn_jax.cli.main import main; print(main({words}), 'jax' in sys.modules)"
    lines = run_python(code, platform="none_such").splitlines()
    assert lines[-1] == "0 False"
    assert sum("stages=" in line for line in lines) == sum(len(candidates(*pair)) for pair in PAIRS)
    assert sum("the heuristic's" in line for line in lines) == len(PAIRS)
    for head_dim, query_block in PAIRS:
        assert f"head_dim={head_dim}, query_block={query_block}" in lines


def test_without_a_hopper_gpu_it_says_why_and_touches_no_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(support, "RELEASED", True)
    line = fails(capsys, *SMALL, "--rows", str(tmp_path / "rows.json"))
    assert "needs an NVIDIA GPU of the Hopper generation" in line
    assert "platform=" in line
    assert "has not passed its tests" not in line
    assert not any(tmp_path.iterdir())


def test_an_unreleased_kernel_is_timed_only_when_asked_for(capsys, tmp_path, monkeypatch):
    rows = ("--rows", str(tmp_path / "rows.json"))
    monkeypatch.setattr(support, "RELEASED", False)
    assert "has not passed its tests" in fails(capsys, *SMALL, *rows)
    assert "has not passed its tests" not in fails(capsys, *SMALL, *rows, "--allow-unreleased")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--head-dim", "128", "96"], "`--head-dim` of 64 or 128, got 96"),
        (["--query-block", "32"], "`--query-block` of 64 or 128, got 32"),
        (["--tokens", "0"], "`--tokens` of at least 1, got 0"),
        (["--heads", "-1"], "`--heads` of at least 1, got -1"),
        (["--rounds", "0"], "`--rounds` of at least 1, got 0"),
        (["--density", "0"], "`--density` above 0 and at most 1, got 0.0"),
        (["--density", "1.5"], "`--density` above 0 and at most 1, got 1.5"),
        (["--density", "nan"], "`--density` above 0 and at most 1, got nan"),
        (["--rows", "no_such_folder/rows.json"], "`--rows` in a folder that exists, got 'no_such_folder/rows.json'"),
    ],
)
def test_wrong_arguments_are_named(words, message, capsys):
    assert message in fails(capsys, *words)


def test_a_wrong_dtype_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "--dtype", "float32"])
    assert "--dtype" in capsys.readouterr().err


def test_the_fastest_config_becomes_a_row_with_its_source(gpu, capsys, tmp_path):
    path = tmp_path / "rows.json"
    found = candidates()
    gpu.ms = {found[3]: 2.5, found[1]: 3.0}
    assert main(["tune", *SMALL, "--rows", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    command = row.pop("command")
    assert row == {name: value for name, value in make_row().items() if name != "command"} | {
        "config": dataclasses.asdict(found[3])
    }
    assert command.startswith("fgattn tune --head-dim 128 --query-block 128 --tokens 200 --heads 2 --density 0.3")
    assert str(tmp_path) not in command
    assert gpu.timed == [str(config) for config in found]
    assert gpu.rounds == 2
    err = capsys.readouterr().err
    assert err.count("TFLOP/s") == len(found)
    assert "2.5000 ms (2.0000-3.0000)" in err


def test_the_heuristics_config_stays_unless_another_is_faster_beyond_noise():
    case = tuning.make_case(head_dim=128, query_block=128, tokens=200, heads=2, density=0.3, dtype="bfloat16")
    usual, other, *_ = candidates()

    def row_of(*times):
        trials = [
            tuning.Trial(config, benchmark.Timing(*ms))
            for config, ms in zip((other, usual), times, strict=False)
            if ms is not None
        ]
        return tuning.best_row(case, trials, 5, SOURCE | {"command": "fgattn tune"})

    overlapping = row_of((2.0, 1.9, 2.7), (2.6, 2.5, 3.0))
    assert (overlapping["config"], overlapping["ms"]) == (dataclasses.asdict(usual), 2.6)
    assert overlapping["runner_up_ms"] == 2.0
    tuning.check_row(overlapping)
    apart = row_of((2.0, 1.9, 2.4), (2.6, 2.5, 3.0))
    assert (apart["config"], apart["ms"], apart["runner_up_ms"]) == (dataclasses.asdict(other), 2.0, 2.6)
    assert row_of((2.0, 1.9, 2.7))["config"] == dataclasses.asdict(other)


def test_rates_count_kept_slices(gpu, two_candidates):
    case = tuning.make_case(head_dim=64, query_block=64, tokens=150, heads=2, density=0.5, dtype="float16")
    trials = list(tuning.time_candidates(case, 1))
    density = float(tuning.make_inputs(case).mask.density())
    assert density == pytest.approx(0.5, abs=0.1)
    assert trials[0].tflops == pytest.approx(4 * 150 * 150 * 2 * 64 * density / 9.0 / 1e9)


def test_what_does_not_compile_or_is_wrong_is_named_and_not_timed(gpu, capsys, tmp_path):
    found = candidates()
    # The first that runs is held against the oracle, later ones against that; NaN is wrong too.
    gpu.broken = {found[0], found[4]}
    gpu.wrong = {found[1]: 0.5, found[3]: 0.25, found[5]: float("nan")}
    gpu.ms = dict.fromkeys([found[0], found[1], found[3], found[4], found[5]], 0.001)
    assert main(["tune", *SMALL, "--rows", str(tmp_path / "rows.json")]) == 0
    assert gpu.timed == [str(found[2])]
    (row,) = tuning.read_tuned(tmp_path / "rows.json")
    assert row["config"] == dataclasses.asdict(found[2])
    assert row["runner_up_ms"] is None
    err = capsys.readouterr().err
    assert err.count("left out: NotImplementedError: no such instruction\n") == 2
    assert err.count("left out: AssertionError") == 3
    assert "against the oracle" in err
    assert "error=nan against the first config's output" in err


@pytest.mark.slow
def test_one_unit_in_the_last_place_is_rounding(gpu):
    case = tuning.make_case(head_dim=128, query_block=128, tokens=200, heads=2, density=0.3, dtype="bfloat16")
    inputs = tuning.make_inputs(case)
    output, _ = reference.masked(
        inputs.query, inputs.key, inputs.value, inputs.mask.bits, None, scale=case.scale, query_block=128
    )
    unit = float(jnp.finfo(jnp.bfloat16).eps * jnp.max(jnp.abs(output.astype(jnp.float32))))
    found = candidates()
    gpu.wrong = {found[1]: unit, found[2]: 8 * unit}
    trials = {trial.config: trial for trial in tuning.time_candidates(case, 1)}
    assert trials[found[1]].reason is None
    assert "against the first config's output" in str(trials[found[2]].reason)


def test_where_no_config_runs_nothing_is_written(gpu, capsys, tmp_path):
    gpu.broken = set(candidates())
    assert main(["tune", *SMALL, "--rows", str(tmp_path / "rows.json")]) == 2
    err = capsys.readouterr().err
    assert err.count("left out") == len(candidates())
    assert "none of the 6 configs for head_dim=128, query_block=128" in err
    assert not any(tmp_path.iterdir())


def test_a_row_replaces_only_that_of_its_device_and_sizes(gpu, tmp_path):
    path = tmp_path / "rows.json"
    narrow = make_row(query_block=64, config=CONFIG | {"tile_keys": 64})
    tuning.write_tuned(path, [make_row(device="Other GPU"), make_row(ms=1.0, date="2020-01-01"), narrow])
    assert main(["tune", *SMALL, "--rows", str(path), "--commit", "feedbeef"]) == 0
    other, same_narrow, new = tuning.read_tuned(path)
    assert (other, same_narrow) == (make_row(device="Other GPU"), narrow)
    assert (new["device"], new["query_block"], new["ms"]) == ("Some GPU", 128, 9.0)
    assert (new["date"], new["commit"]) == (SOURCE["date"], "feedbeef")
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.slow
def test_one_row_for_every_pair(gpu, two_candidates, tmp_path):
    path = tmp_path / "rows.json"
    sizes = ["--head-dim", "64", "128", "64", "--query-block", "128", "64"]
    assert main(["tune", *SMALL, *sizes, "--rows", str(path)]) == 0
    assert [(row["head_dim"], row["query_block"]) for row in tuning.read_tuned(path)] == PAIRS


def test_an_absent_file_holds_no_rows_and_none_can_be_written(tmp_path):
    path = tmp_path / "rows.json"
    assert tuning.read_tuned(path) == []
    tuning.write_tuned(path, [])
    assert json.loads(path.read_text()) == {"rows": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": CONFIG | {"stages": 4}}, "shared memory, got 296961 from stages=4"),
        ({"config": CONFIG | {"tile_keys": 64}}, "got tile_keys=64"),
        ({"config": CONFIG | {"compute_registers": 240}}, "compute_registers=240"),
        ({"config": {"tile_keys": 128, "stages": 2}}, "`config` with whole numbers"),
        ({"config": CONFIG | {"stages": 2.0}}, "`config` with whole numbers"),
        ({"head_dim": 96}, "head_dim=96"),
        ({"query_block": 32}, "query_block=32"),
        ({"ms": 0}, "ms=0"),
        ({"ms": "fast"}, "ms='fast'"),
        ({"runner_up_ms": -2.0}, "runner_up_ms=-2.0"),
        ({"shape": {"tokens": 200}}, "`shape` with tokens, heads"),
        ({"shape": SHAPE | {"density": 0}}, "density=0"),
        ({"shape": SHAPE | {"dtype": "float32"}}, "dtype='float32'"),
        ({"device": ""}, "`device` in words"),
        ({"commit": None}, "`commit` in words"),
        ({"date": "yesterday"}, "`date` as year-month-day, got 'yesterday'"),
        ({"command": "by hand"}, "`command` to be a call of `fgattn tune`"),
        ({"note": "edited"}, "expected the fields"),
    ],
)
def test_rows_edited_by_hand_are_refused(changes, message, tmp_path):
    tuning.check_row(make_row())
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [make_row(device="Other GPU"), make_row(**changes)]}))
    with pytest.raises(ValueError, match=r"row 1 of 'rows\.json'") as caught:
        tuning.read_tuned(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "another JSON value"),
        ("{", "got: "),
        (json.dumps({"rows": [make_row(), make_row(ms=1.0)]}), "one row per device, head_dim and query_block"),
    ],
)
def test_files_of_another_kind_are_refused_before_anything_is_timed(text, message, gpu, capsys, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert message in fails(capsys, *SMALL, "--rows", str(path))
    assert path.read_text() == text
    assert gpu.timed == []


def test_the_shipped_rows_are_well_formed_and_say_where_they_come_from():
    rows = tuning.read_tuned(SHIPPED)
    assert tuple(rows) == configs.tuned_rows()
    for row in rows:
        assert row["commit"] != "unknown"
        # A day ahead: the date is that of UTC.
        assert datetime.date.fromisoformat(row["date"]) <= datetime.date.today() + datetime.timedelta(days=1)


def test_a_tuned_row_is_taken_on_its_device_and_the_heuristic_elsewhere(monkeypatch):
    row = make_row()
    monkeypatch.setattr(configs, "tuned_rows", lambda: (make_row(device="Other GPU"), row))
    tuned = configs.KernelConfig(**CONFIG)
    guess = configs.heuristic(head_dim=128, query_block=128)
    assert tuned != guess
    assert configs.choose(head_dim=128, query_block=128, device_kind="Some GPU") == tuned
    for device in ("Unknown GPU", None):
        assert configs.choose(head_dim=128, query_block=128, device_kind=device) == guess
    narrow = configs.heuristic(head_dim=64, query_block=128)
    assert configs.choose(head_dim=64, query_block=128, device_kind="Some GPU") == narrow


def test_what_was_written_is_what_is_chosen(monkeypatch, tmp_path):
    configs.tuned_rows()
    monkeypatch.setattr(configs.importlib.resources, "files", lambda package: tmp_path)
    tuning.write_tuned(tmp_path / "tuned.json", [make_row()])
    try:
        chosen = configs.choose(head_dim=128, query_block=128, device_kind="Some GPU")
    finally:
        configs.tuned_rows.cache_clear()
    assert chosen == configs.KernelConfig(**CONFIG)
