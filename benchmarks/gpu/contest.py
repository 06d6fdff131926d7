"""One case: everybody prepared, everybody compared with the oracle, then rounds in which all take turns."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.gpu import inputs, mask_checks, masks, protocol
from benchmarks.gpu.cases import DENSE, MAKERS, MASKS, ORDER, SPARSE, GpuCase
from benchmarks.gpu.client import PeerAbsentError, Worker, WorkerError, WorkerLostError
from benchmarks.gpu.inputs import CaseFiles
from fgattn_jax.evaluation.tables import Row

OUTPUT_BOUND = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 5e-5}
"""Largest distance of an output from the oracle, as in `fgattn bench`."""

LSE_BOUND = 2e-3
"""Largest distance of an LSE; products of 16-bit numbers are summed in float32."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long things may take.

    Args:
        rounds: Turns of every contestant.
        batch_ms: Work that is enqueued per turn.
        warm_ms: Work of the first dense peer before every turn of a case that makes masks: contestants find the GPU as
            dense attention leaves it, and not as the one before them has, which may have been hungrier.
        hello_s: Limit for starting a worker.
        prepare_s: Limit for loading, compiling and one call.
        step_s: Limit for everything else.
        device_calls: Calls under the device's own timer.
    """

    rounds: int = 5
    batch_ms: float = 40.0
    warm_ms: float = 300.0
    hello_s: float = 120.0
    prepare_s: float = 90.0
    step_s: float = 20.0
    device_calls: int = 5


@dataclasses.dataclass
class Entry:
    """A contestant of a case and what became of it."""

    name: str
    worker: Worker
    status: str = "timed"
    note: str | None = None
    error: float | None = None
    lse_error: float | None = None
    plan_ms: float | None = None
    device_ms: float | None = None
    density: float | None = None
    wrong_slices: float | None = None
    calls: int = 1
    runs: str | None = None
    times_ms: list[float] = dataclasses.field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether it still takes turns."""
        return self.status == "timed"

    def drop(self, status: str, note: str) -> None:
        """Take it out: "missing", "wrong" or "failed"."""
        self.status, self.note = status, note


def _dropped(entry: Entry, error: WorkerError) -> None:
    entry.drop("missing" if isinstance(error, PeerAbsentError) else "failed", str(error))


def _ask(entry: Entry, message: protocol.Message, timeout: float, entries: Sequence[Entry]) -> protocol.Message | None:
    """The answer, or None after the contestant was dropped, and with it those of the same lost process."""
    try:
        return entry.worker.ask(message, timeout)
    except WorkerError as error:
        _dropped(entry, error)
        if isinstance(error, WorkerLostError):
            for other in entries:
                if other is not entry and other.worker is entry.worker and other.live:
                    other.drop("failed", f"its process was lost at {entry.name!r}: {error}")
        return None


def _prepare(
    worker: Worker, mine: Sequence[Entry], case: GpuCase, files: CaseFiles, oracle: inputs.Oracle, settings: Settings
) -> None:
    for entry in mine:
        try:
            worker.hello(settings.hello_s)
        except WorkerError as error:
            _dropped(entry, error)
            continue
        if not entry.live:
            continue
        answer = _ask(entry, protocol.prepare_message(entry.name, case, files), settings.prepare_s, mine)
        if answer is None:
            continue
        if reason := answer.get("missing"):
            entry.drop("missing", reason)
            continue
        entry.calls, entry.runs = answer["calls"], answer["runs"]
        if entry.name in MAKERS:
            check_made(entry, case, files, oracle, np.load(answer["made"]))
        if entry.live and answer.get("output") is not None:
            check(entry, case, oracle, answer)


def check_made(entry: Entry, case: GpuCase, files: CaseFiles, oracle: inputs.Oracle, made: np.ndarray) -> None:
    """Compare a mask with the scores of some rows, or a work order with its mask."""
    bits, note = files.load(inputs.bits_name(entry.name)), None
    if entry.name == ORDER:
        note = mask_checks.check_order(made, bits)
    else:
        shape, rule = (case.num_heads, case.num_rows, bits.shape[2]), MASKS[entry.name]
        entry.wrong_slices, note = mask_checks.check_mask(made, oracle.scores, rule, shape, case.num_keys)
        bits = made
    if note is not None:
        entry.drop("wrong", note)
    if bits.ndim == 3:
        entry.density = masks.density(bits, case.num_queries, case.num_keys, case.query_block)


def check(entry: Entry, case: GpuCase, oracle: inputs.Oracle, answer: Mapping[str, Any]) -> None:
    """Compare a first result with the oracle; a wrong contestant is dropped and never timed."""
    output, lse = oracle.of(entry.name)
    got = np.load(answer["output"])
    if got.shape != output.shape:
        entry.drop("wrong", f"output of shape {got.shape}, expected {output.shape}")
        return
    entry.error = _distance(got, output)
    if answer.get("lse") is not None:
        entry.lse_error = _distance(np.load(answer["lse"]), lse)
    bound = OUTPUT_BOUND[case.dtype]
    if not answer["finite"]:
        entry.drop("wrong", "the output is not finite")
    elif not entry.error <= bound:
        entry.drop("wrong", f"output error={entry.error:.3g} against float64, allowed {bound}")
    elif entry.lse_error is not None and not entry.lse_error <= LSE_BOUND:
        entry.drop("wrong", f"LSE error={entry.lse_error:.3g} against float64, allowed {LSE_BOUND}")
    # JSON knows no NaN; the note says it.
    entry.error, entry.lse_error = (
        x if x is not None and np.isfinite(x) else None for x in (entry.error, entry.lse_error)
    )


def _distance(got: np.ndarray, expected: np.ndarray) -> float:
    if got.shape != expected.shape:
        return float("nan")
    same = got == expected  # two infinities: a row without keys
    return float(np.where(same, 0.0, np.abs(got.astype(np.float64) - np.where(same, 0.0, expected))).max(initial=0.0))


def run_case(
    case: GpuCase,
    files: CaseFiles,
    workers: Mapping[str, Worker],
    settings: Settings,
    oracle: inputs.Oracle | None = None,
) -> list[Entry]:
    """Prepare, check and time the contestants of a case.

    Args:
        case: What to measure.
        files: Its arrays.
        workers: The worker of every contestant; several may share one.
        settings: Rounds and limits.
        oracle: What they are compared with; None makes it.

    Returns:
        One entry per contestant, whatever became of it.
    """
    entries = [Entry(name, workers[name]) for name in case.contestants]
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(id(entry.worker), []).append(entry)
    oracle = oracle or inputs.Oracle(case, files)
    # Compilers of different peers may run at once: nothing is timed yet.
    with ThreadPoolExecutor(len(groups)) as pool:
        jobs = [pool.submit(_prepare, mine[0].worker, mine, case, files, oracle, settings) for mine in groups.values()]
        for job in jobs:
            job.result()
    for entry in entries:
        message = {"do": "plan", "contestant": entry.name}
        if entry.live and (answer := _ask(entry, message, settings.step_s, entries)):
            entry.plan_ms = answer["ms"]
    makes_masks = any(entry.name in MAKERS for entry in entries)
    for _ in range(settings.rounds):
        for entry in entries:
            if entry.live and makes_masks:
                _warm(entries, settings)
            message = {"do": "time", "contestant": entry.name, "target_ms": settings.batch_ms}
            if entry.live and (answer := _ask(entry, message, settings.step_s, entries)):
                entry.times_ms.append(answer["ms"])
    if case.device_timer:
        for entry in entries:
            message = {"do": "device_time", "contestant": entry.name, "calls": settings.device_calls}
            if entry.live:
                _device_time(entry, message, settings.step_s, entries)
    for mine in groups.values():
        if mine[0].worker.running:
            _release(mine[0].worker, settings.step_s)
    return entries


def _warm(entries: Sequence[Entry], settings: Settings) -> None:
    dense = next((entry for entry in entries if entry.live and entry.name in DENSE), None)
    if dense is not None and settings.warm_ms > 0:
        message = {"do": "time", "contestant": dense.name, "target_ms": settings.warm_ms}
        _ask(dense, message, settings.step_s, entries)


def _device_time(entry: Entry, message: protocol.Message, timeout: float, entries: Sequence[Entry]) -> None:
    # A timer that does not work costs its column, not the times that are there.
    try:
        entry.device_ms = entry.worker.ask(message, timeout)["ms"]
    except WorkerLostError as error:
        for other in entries:
            if other.worker is entry.worker:
                other.note = f"lost at the device timer: {error}"
    except WorkerError as error:
        entry.note = f"no device timer: {error}"


def _release(worker: Worker, timeout: float) -> None:
    try:
        worker.ask({"do": "release"}, timeout)
    except WorkerError:
        worker.stop()  # what it holds would be missing to the next case


def rows_of(case: GpuCase, files: CaseFiles, entries: Sequence[Entry]) -> list[Row]:
    """Data rows of a case, one per contestant; figures of those that were not timed are None."""
    rows = []
    for entry in entries:
        num_queries, num_keys = inputs.lengths(case, entry.name)
        density = 1.0 if entry.name in DENSE else files.density
        if entry.name in inputs.BLOCK_KEYS:
            kept = files.load(f"blocks_{entry.name}").shape[2]
            density = kept * inputs.BLOCK_KEYS[entry.name] / num_keys
        if entry.name in SPARSE:
            density = _density_of(case, files, entry.name)
        if entry.name in MAKERS:
            density = entry.density
        timed = entry.live and len(entry.times_ms) > 0
        low, median, high = np.percentile(entry.times_ms, [10, 50, 90]) if timed else (None, None, None)
        description = entry.worker.description or {}
        rows.append(
            {
                "bench": "gpu_attention",
                "implementation": entry.name,
                "case": case.name,
                "batch": 1,
                "heads": case.num_heads,
                "kv_heads": case.num_kv_heads,
                "queries": num_queries,
                "keys": num_keys,
                "head_dim": case.head_dim,
                "query_block": case.query_block,
                "dtype": case.dtype,
                "mask": _mask_text(case, entry.name),
                "density": density,
                "ms": _rounded(median),
                "ms_p10": _rounded(low),
                "ms_p90": _rounded(high),
                "tflops": None
                if median is None or density is None or entry.name in MAKERS
                else case.flops(density, num_queries, num_keys) / median / 1e9,
                "device_ms": _rounded(entry.device_ms),
                "plan_ms": _rounded(entry.plan_ms),
                "error": entry.error,
                "lse_error": entry.lse_error,
                "status": entry.status,
                "note": entry.note,
                "versions": " ".join(f"{k}={v}" for k, v in description.get("versions", {}).items()),
            }
            | (_maker_columns(entry) if entry.name in MAKERS else {})
        )
    return rows


def _density_of(case: GpuCase, files: CaseFiles, contestant: str) -> float:
    if inputs.bits_name(contestant) not in files.arrays:  # the case was never made
        return SPARSE[contestant]
    bits = files.load(inputs.bits_name(contestant))
    return masks.density(bits, case.num_queries, case.num_keys, case.query_block)


def _mask_text(case: GpuCase, contestant: str) -> str:
    if contestant in MASKS:
        return MASKS[contestant].text
    if contestant in inputs.BLOCK_KEYS:
        return "blocks"
    return "random" if contestant in SPARSE or contestant == ORDER else case.mask


def _maker_columns(entry: Entry) -> Row:
    """Columns of contestants that make masks alone; shares of dense attention follow in `mask_rows`."""
    return {"wrong_slices": entry.wrong_slices, "runs": entry.runs, "calls_per_program": entry.calls}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)
