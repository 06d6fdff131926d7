"""No kernel lands untested: what `RELEASED` needs from the ledger, and that the ledger cannot be had for less."""

import json
import shutil
from types import SimpleNamespace

import gpu_ledger
import pytest
from gpu_ledger import MINIMUM_PASSED, NotRecordedError, Tally

from fgattn_jax.pallas_kernels import support as pallas_support
from fgattn_jax.xla_ffi import library
from fgattn_jax.xla_ffi import support as cuda_support

GOOD = {
    "source_hash": "ab" * 32,
    "date": "2026-01-02T03:04:05Z",
    "device": "some GPU",
    "compute_capability": "9.0",
    "num_devices": 1,
    "driver": "1.2.3",
    "versions": {"jax": "1"},
    "passed": MINIMUM_PASSED,
    "failed": 0,
    "tests": {"tests/test_a.py": MINIMUM_PASSED - 1, "tests/test_b.py": 1},
}


by_kernel = pytest.mark.parametrize(
    ("kernel", "folder", "module", "present"),
    [
        ("cuda", "xla_ffi", cuda_support, gpu_ledger.source_hash),
        ("pallas", "pallas_kernels", pallas_support, gpu_ledger.pallas_hash),
        ("masks", "xla_ffi", cuda_support, gpu_ledger.mask_hash),
    ],
    ids=["cuda", "pallas", "masks"],
)


def gate(kernel: str) -> str:
    return "MASKS_RELEASED" if kernel == "masks" else "RELEASED"


def released_in_the_sources(folder: str, kernel: str) -> bool:
    """What the file says; `--allow-unreleased` changes the module."""
    text = (gpu_ledger.ROOT / folder / "support.py").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"{gate(kernel)} ")]
    assert line in (f"{gate(kernel)} = True", f"{gate(kernel)} = False")
    return line.endswith("True")


@by_kernel
def test_a_released_kernel_has_passed_its_gpu_tests_with_exactly_these_sources(kernel, folder, module, present):
    if released_in_the_sources(folder, kernel):
        assert gpu_ledger.release_errors(gpu_ledger.read(), present(), kernel) == []


@by_kernel
def test_the_module_says_what_its_source_says(request, kernel, folder, module, present):
    allowed = request.config.getoption("--allow-unreleased")
    assert (released_in_the_sources(folder, kernel) or allowed) == getattr(module, gate(kernel))


def test_all_entries_are_well_formed():
    assert [error for entry in gpu_ledger.read() for error in gpu_ledger.entry_errors(entry)] == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"source_hash": "cd" * 32}, "no GPU run of the present sources"),
        ({"passed": MINIMUM_PASSED - 1, "tests": {"a": MINIMUM_PASSED - 1}}, f"passed={MINIMUM_PASSED - 1}"),
        ({"failed": 1}, "failed=1"),
        ({"compute_capability": "8.0"}, "expected a run on compute_capability='9.0'"),
        ({"passed": MINIMUM_PASSED + 1}, "expected `tests` to add up"),
        ({"driver": ""}, "expected `driver` to say something"),
        ({"driver": None}, "expected `driver` of type"),
        ({"date": "yesterday"}, "expected a UTC time as `date`"),
    ],
)
def test_a_release_needs_a_whole_run_of_these_sources_on_hopper(change, error):
    assert gpu_ledger.release_errors([GOOD], GOOD["source_hash"]) == []
    errors = gpu_ledger.release_errors([GOOD | change], GOOD["source_hash"])
    assert errors
    assert error in errors[0]


def test_one_whole_run_is_enough_and_an_empty_ledger_is_not():
    assert gpu_ledger.release_errors([GOOD | {"failed": 1}, GOOD], GOOD["source_hash"]) == []
    assert gpu_ledger.release_errors([], GOOD["source_hash"])


def test_a_run_counts_for_the_kernels_of_which_it_holds_enough():
    other = "cd" * 32
    both = GOOD | {"pallas_hash": other, "kernels": {"pallas": MINIMUM_PASSED}}
    assert gpu_ledger.release_errors([both], other, "pallas") == []
    assert "passed=0" in gpu_ledger.release_errors([both], GOOD["source_hash"], "cuda")[0]
    assert "pallas_hash=" in gpu_ledger.release_errors([GOOD], other, "pallas")[0]
    few = both | {"kernels": {"pallas": MINIMUM_PASSED - 1}}
    assert "GPU tests of `pallas`" in gpu_ledger.release_errors([few], other, "pallas")[0]


def test_the_pallas_hash_covers_every_source_but_support(tmp_path):
    folder = tmp_path / "pallas_kernels"
    shutil.copytree(gpu_ledger.PALLAS_SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    seen = {gpu_ledger.pallas_hash(folder)}
    assert seen == {gpu_ledger.pallas_hash()}
    (folder / "support.py").write_text("changed")
    assert seen == {gpu_ledger.pallas_hash(folder)}
    sources = [f for f in sorted(folder.rglob("*.py")) if f.name != "support.py"]
    for source in sources:
        source.write_bytes(source.read_bytes() + b"\n")
        seen.add(gpu_ledger.pallas_hash(folder))
    assert len(seen) == len(sources) + 1
    assert {f.name for f in sources} >= {"attention.py", "kernel.py", "config.py", "gather.py"}


def test_the_hash_covers_every_source_and_its_name(tmp_path):
    folder = tmp_path / "csrc"
    shutil.copytree(gpu_ledger.SOURCES, folder)
    first = gpu_ledger.source_hash(folder)
    assert first == gpu_ledger.source_hash()
    (folder / "notes.txt").write_text("not a source")
    assert gpu_ledger.source_hash(folder) == first
    seen = {first}
    for source in sorted(folder.glob("*.c*")) + sorted(folder.glob("*.h")):
        source.write_bytes(source.read_bytes() + b"\n")
        seen.add(gpu_ledger.source_hash(folder))
    (folder / "launch.h").rename(folder / "start.h")
    seen.add(gpu_ledger.source_hash(folder))
    sources = [f for f in folder.iterdir() if f.suffix in (".cc", ".cu", ".cuh", ".h")]
    assert len(seen) == len(sources) + 2


def report(nodeid="tests/test_a.py::test[cuda]", *, outcome="passed", when="call", gpu=True):
    keywords = {"gpu": 1} if gpu else {}
    flags = {name: outcome == name for name in ("passed", "failed", "skipped")}
    return SimpleNamespace(nodeid=nodeid, when=when, keywords=keywords, **flags)


def whole_run() -> Tally:
    tally = Tally()
    for number in range(MINIMUM_PASSED):
        tally.pytest_runtest_logreport(report(when="setup"))
        tally.pytest_runtest_logreport(report(f"tests/test_{number % 2}.py::test[cuda]"))
    return tally


@pytest.fixture
def machine(monkeypatch):
    facts = {k: GOOD[k] for k in ("date", "device", "compute_capability", "num_devices", "driver", "versions")}
    monkeypatch.setattr(gpu_ledger, "_machine", lambda: facts)
    hashes = {"source_hash": gpu_ledger.source_hash, "mask_hash": gpu_ledger.mask_hash}
    monkeypatch.setattr(gpu_ledger, "_hash_of_library", lambda name: hashes[name]())


def test_a_whole_run_is_recorded_and_releases(machine, tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps({"runs": [GOOD]}))
    entry = gpu_ledger.record(whole_run(), clean=True, path=path)
    again = gpu_ledger.record(whole_run(), clean=True, path=path)
    assert gpu_ledger.read(path) == [GOOD, entry]
    assert again == entry
    assert entry["tests"] == {"tests/test_0.py": MINIMUM_PASSED // 2, "tests/test_1.py": MINIMUM_PASSED // 2}
    assert gpu_ledger.release_errors(gpu_ledger.read(path), gpu_ledger.source_hash()) == []


@pytest.mark.parametrize(
    ("extra", "recorded"),
    [
        (report(outcome="failed"), False),
        (report(outcome="failed", gpu=False), False),
        (report(outcome="failed", when="teardown"), False),
        (report(outcome="skipped", when="setup"), False),
        (report(outcome="skipped", when="setup", gpu=False), True),
    ],
    ids=["a failure", "a failure on the CPU", "an error", "a skipped GPU test", "a skipped CPU test"],
)
def test_a_run_with_anything_that_did_not_pass_is_not_recorded(machine, tmp_path, extra, recorded):
    tally, path = whole_run(), tmp_path / "ledger.json"
    tally.pytest_runtest_logreport(extra)
    if recorded:
        gpu_ledger.record(tally, clean=True, path=path)
    else:
        with pytest.raises(NotRecordedError, match="not everything passed"):
            gpu_ledger.record(tally, clean=True, path=path)
    assert path.exists() == recorded


def test_a_run_that_is_short_or_of_another_library_is_not_recorded(machine, monkeypatch, tmp_path):
    path = tmp_path / "ledger.json"
    with pytest.raises(NotRecordedError, match="not everything passed"):
        gpu_ledger.record(whole_run(), clean=False, path=path)
    short = Tally()
    short.pytest_runtest_logreport(report())
    for _ in range(MINIMUM_PASSED):
        short.pytest_runtest_logreport(report(gpu=False))
    assert short.num_passed == MINIMUM_PASSED + 1
    with pytest.raises(
        NotRecordedError, match=f"at least {MINIMUM_PASSED} passed GPU tests of a kernel, got {{'cuda': 1}}"
    ):
        gpu_ledger.record(short, clean=True, path=path)
    monkeypatch.setattr(gpu_ledger, "_hash_of_library", lambda name: "")
    with pytest.raises(NotRecordedError, match="built from other sources: expected source_hash="):
        gpu_ledger.record(whole_run(), clean=True, path=path)
    assert not path.exists()


def test_a_run_in_parts_counts_as_one(machine, monkeypatch, tmp_path):
    parts, path = tmp_path / "parts", tmp_path / "ledger.json"
    gpu_ledger.begin_part(parts)
    first = Tally(parts)
    for number in range(MINIMUM_PASSED - 1):
        first.pytest_runtest_logreport(report(f"tests/test_a.py::test[cuda-{number}]"))
    with parts.open("a") as file:
        file.write("passed: tests/test_a.py::cut_o")
    assert len(gpu_ledger.noted(parts)[0]) == MINIMUM_PASSED - 1
    parts.write_text(parts.read_text().removesuffix("passed: tests/test_a.py::cut_o"))
    gpu_ledger.begin_part(parts)
    second = Tally(parts)
    with pytest.raises(NotRecordedError, match="at least"):
        gpu_ledger.record(second, clean=True, path=path)
    second.pytest_runtest_logreport(report("tests/test_b.py::test[cuda]"))
    entry = gpu_ledger.record(second, clean=True, path=path)
    assert entry["tests"] == {"tests/test_a.py": MINIMUM_PASSED - 1, "tests/test_b.py": 1}
    second.pytest_runtest_logreport(report("tests/test_b.py::test_more[cuda]", outcome="failed"))
    with pytest.raises(NotRecordedError, match=r"not everything passed: .*test_more"):
        gpu_ledger.record(Tally(parts), clean=True, path=path)
    monkeypatch.setattr(gpu_ledger, "_hash_of_library", lambda name: "another")
    with pytest.raises(NotRecordedError, match="of another run"):
        gpu_ledger.begin_part(parts)


def test_the_library_says_from_which_sources_it_was_built(host_library, monkeypatch):
    monkeypatch.setattr(library, "find_library", lambda: host_library)
    assert gpu_ledger._hash_of_library() == gpu_ledger.source_hash()
    assert gpu_ledger._hash_of_library("mask_hash") == gpu_ledger.mask_hash()
    monkeypatch.setattr(library, "find_library", lambda: None)
    assert gpu_ledger._hash_of_library() == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--write-ledger"], "--write-ledger needs --require-gpu and --min-passed"),
        (["--write-ledger", "--min-passed=1"], "--write-ledger needs --require-gpu and --min-passed"),
        (["--resume", "parts"], "--resume needs --require-gpu"),
    ],
)
def test_a_ledger_needs_a_gpu_run_with_a_minimum(run_python, options, message):
    code = f"import sys; sys.stderr = sys.stdout; import pytest; print(pytest.main({['--collect-only', *options]!r}))"
    said = run_python(code)
    assert message in said
    assert said.split()[-1] == str(pytest.ExitCode.USAGE_ERROR.value) or "USAGE_ERROR" in said
