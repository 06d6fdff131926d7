"""The GPU ledger: which kernels' sources passed their tests on a GPU. Written by `--write-ledger`, never by hand.

A run counts for every kernel of which it holds enough tests: `-k pallas` runs those of one alone.
"""

import datetime
import hashlib
import json
import platform
import re
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "xla_ffi" / "csrc"
LEDGER = ROOT / "tests" / "gpu_ledger.json"
PALLAS_SOURCES = ROOT / "pallas_kernels"
KERNELS = ("cuda", "pallas", "masks")
MINIMUM_PASSED = 1450
"""GPU tests of a kernel that a run must hold to count; below what `-m gpu` collects on a machine with one GPU."""
MINIMUM_PASSED_MASKS = 720
"""The same for the kernels that make masks, which have a list of their own."""

_SUFFIXES = {".cc", ".cu", ".cuh", ".h"}
_HASH_NAMES = {"cuda": "source_hash", "pallas": "pallas_hash", "masks": "mask_hash"}
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy")


class NotRecordedError(Exception):
    """The run does not belong into the ledger; the message says why."""


class Tally:
    """Counts what pytest reports; with pytest-xdist, the controller's counts all workers.

    Args:
        parts: Where a run in parts notes its tests; `begin_part` comes first. None for a run at one go.
    """

    def __init__(self, parts: Path | None = None) -> None:
        self._parts = parts
        # not_passed: failures and errors of any test, skips of GPU tests
        self.gpu_passed, self.not_passed = ([], []) if parts is None else noted(parts)
        self.num_passed = len(self.gpu_passed)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        on_gpu = "gpu" in report.keywords
        if report.failed or (report.skipped and on_gpu):
            self.not_passed.append(report.nodeid)
            self._note(f"not passed: {report.nodeid}")
        elif report.passed and report.when == "call":
            self.num_passed += 1
            if on_gpu:
                self.gpu_passed.append(report.nodeid)
                self._note(f"passed: {report.nodeid}")

    def _note(self, line: str) -> None:
        if self._parts is not None:
            with self._parts.open("a") as file:
                file.write(line + "\n")

    def by_file(self) -> dict[str, int]:
        """GPU tests passed in each test file."""
        return dict(sorted(Counter(test.partition("::")[0] for test in self.gpu_passed).items()))

    def by_kernel(self) -> dict[str, int]:
        """GPU tests passed of each kernel that the test's parameters name."""
        named = [re.search(rf"[\[-]({'|'.join(KERNELS)})[\]-]", test) for test in self.gpu_passed]
        return dict(Counter(found[1] for found in named if found))


def begin_part(path: Path) -> None:
    """Begins the next part of a run that is too long to be done at one go.

    The file's first line says what is tested, and on what; the others name tests, as they end. It is made here if there
    is none yet.

    Raises:
        NotRecordedError: Earlier parts were of other sources, another library or another machine.
    """
    facts = {**_sources(), **_machine()}
    if not path.exists():
        path.write_text(json.dumps(facts) + "\n")
        return
    before = json.loads(path.read_text().partition("\n")[0])
    if before != facts:
        raise NotRecordedError(f"{path} is of another run: expected {facts}, got {before}")


def noted(path: Path) -> tuple[list[str], list[str]]:
    """GPU tests that passed in earlier parts of a run, and tests that did not; a line that was cut off is neither."""
    lines = [line.partition(": ") for line in path.read_text().split("\n")[1:-1]]
    passed = [test for kind, _, test in lines if kind == "passed"]
    return passed, [test for kind, _, test in lines if kind == "not passed"]


def source_hash(folder: Path = SOURCES) -> str:
    """SHA-256 of the lines `sha256sum` prints for the C++ and CUDA sources of a folder, sorted by name.

    As in `cd xla_ffi/csrc && sha256sum *.cc *.cu *.cuh *.h | LC_ALL=C sort -k 2 | sha256sum`; the build passes the
    same to handlers.cc.
    """
    files = sorted((f for f in folder.iterdir() if f.suffix in _SUFFIXES), key=lambda f: f.name)
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def mask_hash(folder: Path = SOURCES) -> str:
    """The same over these sources and those of `masks/`, which use them, with paths inside the folder."""
    files = sorted(f for f in folder.rglob("*") if f.suffix in _SUFFIXES)
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n" for f in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def minimum_passed(kernel: str) -> int:
    """GPU tests of a kernel that a run must hold to count."""
    return MINIMUM_PASSED_MASKS if kernel == "masks" else MINIMUM_PASSED


def pallas_hash(folder: Path = PALLAS_SOURCES) -> str:
    """SHA-256 of the same kind of lines for the Python sources of the Pallas kernel, with paths inside the folder.

    Without `support.py`, which says whether the kernel is released, and the tuned configs, which are data.
    """
    files = sorted(f for f in folder.rglob("*.py") if f != folder / "support.py")
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n" for f in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read(path: Path = LEDGER) -> list[dict[str, Any]]:
    """The entries; none where there is no file yet."""
    return json.loads(path.read_text())["runs"] if path.exists() else []


def entry_errors(entry: dict[str, Any]) -> list[str]:
    """What is wrong with the form of an entry; empty if nothing is."""
    errors = []
    kinds: dict[str, type | tuple[type, ...]] = {
        "source_hash": str, "date": str, "device": str, "compute_capability": str, "num_devices": int, "driver": str,
        "versions": dict, "passed": int, "failed": int, "tests": dict,
    }  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(entry.get(name), kind) or isinstance(entry.get(name), bool):
            errors.append(f"expected `{name}` of type {kind}, got {entry.get(name)!r}")
    if errors:
        return errors
    if not re.fullmatch(r"[0-9a-f]{64}", entry["source_hash"]):
        errors.append(f"expected a SHA-256 as `source_hash`, got {entry['source_hash']!r}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["date"]):
        errors.append(f"expected a UTC time as `date`, got {entry['date']!r}")
    if entry["passed"] != sum(entry["tests"].values()):
        errors.append(f"expected `tests` to add up to passed={entry['passed']}, got {sum(entry['tests'].values())}")
    for name in ("device", "compute_capability", "driver"):
        if not entry[name]:
            errors.append(f"expected `{name}` to say something, got nothing")
    return errors


def passed_of(entry: dict[str, Any], kernel: str) -> int:
    """GPU tests of a kernel that a run passed. Entries from before there were two kernels are of `cuda` alone."""
    if "kernels" not in entry:
        return entry["passed"] if kernel == "cuda" else 0
    return entry["kernels"].get(kernel, 0)


def release_errors(runs: list[dict[str, Any]], wanted_hash: str, kernel: str = "cuda") -> list[str]:
    """Why the kernel of these sources may not be released; empty if a run in the ledger covers them."""
    of_these = [run for run in runs if run.get(_HASH_NAMES[kernel]) == wanted_hash]
    if not of_these:
        return [f"the ledger has no GPU run of the present sources ({_HASH_NAMES[kernel]}={wanted_hash})"]
    every = []
    for run in of_these:
        errors = entry_errors(run)
        if not errors and run["failed"]:
            errors.append(f"failed={run['failed']}")
        passed = passed_of(run, kernel)
        least = minimum_passed(kernel)
        if not errors and passed < least:
            errors.append(f"passed={passed}, and a run must pass at least {least} GPU tests of `{kernel}`")
        if not errors and run["compute_capability"] != "9.0":
            errors.append(f"expected a run on compute_capability='9.0', got {run['compute_capability']!r}")
        if not errors:
            return []
        every.extend(errors)
    return every


def record(tally: Tally, *, clean: bool, path: Path = LEDGER) -> dict[str, Any]:
    """Add the run to the ledger, in place of older ones of the same sources, kernels and kind of device.

    Raises:
        NotRecordedError: Something did not pass, too few tests ran, or the library is of other sources.
    """
    if not clean or tally.not_passed:
        raise NotRecordedError(f"not everything passed: {tally.not_passed[:5] or 'see above'}")
    by_kernel = tally.by_kernel()
    kernels = {name: by_kernel[name] for name in KERNELS if by_kernel.get(name, 0) >= minimum_passed(name)}
    if not kernels:
        raise NotRecordedError(f"expected at least {MINIMUM_PASSED} passed GPU tests of a kernel, got {by_kernel or 0}")
    sources = _sources()
    for kernel, name in (("cuda", "source_hash"), ("masks", "mask_hash")):
        present, built = sources[name], sources.pop(f"library_{name}")
        if kernel in kernels and built != present:
            raise NotRecordedError(
                f"the library under test was built from other sources: expected {name}={present}, got {built!r}; "
                "build and install it anew"
            )
    entry = {
        **sources,
        "kernels": kernels,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **_machine(),
        "passed": len(tally.gpu_passed),
        "failed": 0,
        "tests": tally.by_file(),
    }
    same = ("source_hash", "pallas_hash", "mask_hash", "device", "kernels")
    others = [run for run in read(path) if [run.get(name) for name in same] != [entry[name] for name in same]]
    path.write_text(json.dumps({"runs": [*others, entry]}, indent=2) + "\n")
    return entry


def _sources() -> dict[str, str]:
    present = {"source_hash": source_hash(), "pallas_hash": pallas_hash(), "mask_hash": mask_hash()}
    return present | {f"library_{name}": _hash_of_library(name) for name in ("source_hash", "mask_hash")}


def _hash_of_library(name: str = "source_hash") -> str:
    import ctypes

    from fgattn_jax.xla_ffi import library

    found = library.find_library()
    if found is None:
        return ""
    function = getattr(ctypes.CDLL(str(found)), f"fgattn_{name}")
    function.restype = ctypes.c_char_p
    return function().decode()


def _machine() -> dict[str, Any]:
    import jax

    device = jax.devices("cuda")[0]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device.device_kind,
        "compute_capability": str(device.compute_capability),
        "num_devices": jax.device_count("cuda"),
        "driver": driver,
        "versions": versions,
    }
