"""A whole run: workers, cases in order, rows written after each case, a time budget."""

import dataclasses
import datetime
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu import contest, inputs, mask_rows
from benchmarks.gpu.cases import MAKERS, SPARSE, GpuCase
from benchmarks.gpu.client import Worker
from fgattn_jax.evaluation import tables

PEERS: Mapping[str, tuple[str, ...]] = {
    "fgattn": ("cuda", "pallas", "xla", *SPARSE),
    "fgattn_masks": MAKERS,
    "fa3": ("fa3",),
    "flashinfer": ("flashinfer", "flashinfer_fused", "flashinfer_launches"),
    "jax_nn": ("cudnn",),
    "fa4": ("fa4", "fa4_128x128", "fa4_128x64"),
    "tokamax": ("tokamax",),
}
"""Modules of `benchmarks.peers`, each a process of its own, and their contestants."""


_ENVIRONMENT = {
    # Without CUDA graphs, the calls of a program run in order on one stream: short ones must not overlap.
    "fgattn_masks": {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()},
}


def make_workers(peer_folder: Path | None, *, options: Mapping[str, Any], log: Path | None) -> dict[str, Worker]:
    """The worker of every contestant; none of them runs yet.

    Args:
        peer_folder: Holds a folder of unpacked packages per peer, named like its module. Each is seen by that peer
            alone: two of them bring the same package in different versions.
        options: For the peers, see `benchmarks.peers.fgattn`.
        log: File for what workers print.
    """
    workers = {}
    for peer, names in PEERS.items():
        folder = None if peer_folder is None else peer_folder / peer
        environment = dict(_ENVIRONMENT.get(peer, {}))
        if folder and peer == "flashinfer":
            environment["FLASHINFER_WORKSPACE_BASE"] = str(folder)
        worker = Worker(
            f"benchmarks.peers.{peer}",
            folders=[str(folder)] if folder and folder.is_dir() else [],
            environment=environment,
            options=options,
            log=log,
        )
        workers |= dict.fromkeys(names, worker)
    return workers


def machine() -> dict[str, str]:
    """`device` and `driver` of the first NVIDIA GPU, "none" where there is none; touches no CUDA context."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        device, driver = (part.strip() for part in done.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        device, driver = "none", "none"
    return {"device": device, "driver": driver}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        cases: In order of importance.
        settings: Rounds and limits.
        budget_s: No case starts later than this after the start.
        mask_file: See `GpuCase.mask`.
        contestants: Only these; None is all of every case.
        source: Columns of all rows: command, commit and whatever else the caller knows.
        scratch: Folder for arrays, best in memory; None takes `/dev/shm` if there is one.
    """

    cases: Sequence[GpuCase]
    settings: contest.Settings
    budget_s: float
    mask_file: Path | None = None
    contestants: tuple[str, ...] | None = None
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scratch: Path | None = None


def run(plan: Plan, workers: Mapping[str, Worker], say: Callable[[str], None]) -> Iterator[list[tables.Row]]:
    """Rows of one case after the other; a case that could not run gives rows that say why."""
    start = time.monotonic()
    source = {
        **machine(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rounds": plan.settings.rounds,
        **plan.source,
    }
    memory = Path("/dev/shm")
    scratch = plan.scratch or (memory if os.access(memory, os.W_OK) else None)
    cases = [_with(case, plan.contestants) for case in plan.cases]
    oracle: inputs.Oracle | None = None
    try:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="benchmark_") as name, ThreadPoolExecutor(1) as maker:
            folder = Path(name)
            # Arrays and oracle of the next case are made while this one is timed: two sets of bits lie side by side.
            prepared = _submit(maker, cases, 0, folder, plan.mask_file, None)
            for number, case in enumerate(cases):
                used = time.monotonic() - start
                if used > plan.budget_s:
                    say(f"{case.name}: left out, {used:.0f} s of budget_s={plan.budget_s:g} are used")
                    yield _empty(case, source, "left out", f"the time budget of {plan.budget_s:g} s was used up")
                    continue
                assert prepared is not None, "the first case was submitted, and every case submits the next"
                try:
                    files, oracle = prepared.result()
                except ValueError as error:
                    prepared = _submit(maker, cases, number + 1, folder, plan.mask_file, oracle)
                    yield _empty(case, source, "missing", str(error))
                    continue
                prepared = _submit(maker, cases, number + 1, folder, plan.mask_file, oracle)
                entries = contest.run_case(case, files, workers, plan.settings, oracle)
                rows = [row | source for row in mask_rows.complete(contest.rows_of(case, files, entries))]
                say(f"{case.name}: {_short(rows)} ({time.monotonic() - start:.0f} s)")
                yield rows
    finally:
        for worker in {id(worker): worker for worker in workers.values()}.values():
            worker.stop()


def _with(case: GpuCase, contestants: tuple[str, ...] | None) -> GpuCase:
    if contestants is None:
        return case
    return dataclasses.replace(case, contestants=tuple(name for name in case.contestants if name in contestants))


_Prepared = tuple[inputs.CaseFiles, inputs.Oracle]


def _submit(
    maker: ThreadPoolExecutor,
    cases: Sequence[GpuCase],
    number: int,
    folder: Path,
    mask_file: Path | None,
    before: inputs.Oracle | None,
) -> Future[_Prepared] | None:
    if number >= len(cases):
        return None
    case = cases[number]

    def make() -> _Prepared:
        files = inputs.make_files(case, folder, mask_file, part=f"{number % 2}")
        oracle = inputs.Oracle(case, files, before)
        for name in case.contestants:
            oracle.prepare(name)
        return files, oracle

    return maker.submit(make)


def _empty(case: GpuCase, source: Mapping[str, Any], status: str, note: str) -> list[tables.Row]:
    blank = inputs.CaseFiles(Path(), {}, case.density, ())
    entries = [contest.Entry(name, Worker("none"), status, note) for name in case.contestants]
    entries = [entry for entry in entries if entry.name not in inputs.BLOCK_KEYS]
    return [row | dict(source) for row in mask_rows.complete(contest.rows_of(case, blank, entries))]


def _short(rows: Sequence[tables.Row]) -> str:
    return ", ".join(
        f"{row['implementation']} {_figure(row)}" for row in rows if row["bench"] != mask_rows.BREAK_EVEN_BENCH
    )


def _figure(row: tables.Row) -> str:
    if row["tflops"] is not None:
        return f"{row['tflops']:.0f}"
    return row["status"] if row["ms"] is None else f"{row['ms']:.3f} ms"
