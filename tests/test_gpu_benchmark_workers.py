"""Workers, gate, rounds and bundles of the GPU benchmark, with `jax.nn` and `xla` on the CPU as contestants."""

import dataclasses
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

import fgattn_jax
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import contest, inputs, protocol, run
from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.client import PeerAbsentError, Worker, WorkerError, WorkerLostError
from benchmarks.peers import base, bundle, fgattn, jax_side
from fgattn_jax import masks as public_masks
from fgattn_jax.evaluation import tables

SMALL = GpuCase(
    "small",
    num_queries=300,
    num_keys=333,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    query_block=64,
    contestants=("xla", "cudnn"),
    device_timer=True,
)
FAST = contest.Settings(rounds=2, batch_ms=1.0, warm_ms=1.0, prepare_s=60, step_s=20, device_calls=1)


def test_batches_are_timed_without_what_a_batch_costs_once(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(base.time, "perf_counter", lambda: now[0])

    def sync():
        now[0] += 0.02 + 0.002 * len(calls)
        calls.clear()

    ms, number = base.time_calls(lambda: calls.append(1), sync, target_ms=100)
    assert number == 5  # of 22 ms the first, of 2 ms each one more: the first says how many fill 100 ms
    assert ms == pytest.approx(2.0)


# Peers that misbehave, each in its own way; `make_peer` stands in a module that the test writes.
_PEER = """
import time
import numpy as np
from benchmarks.peers.base import AbstractPeer, Fetched, Program
{imports}

class Peer(AbstractPeer):
    names = ("odd",)

    def describe(self):
        print("a library that prints to standard output")
        return {{"device": "none", "versions": {{"odd": "1"}}}}

    def prepare(self, name, case, files):
        def fetch(arrays, queries):
            return Fetched(np.zeros((len(queries), case.num_heads, case.head_dim), np.float32), None, True)
        {prepare}
        return Program(self.call, fetch)

    def call(self):
        {call}

    def sync(self): pass
    def release(self): pass
    def device_ms(self, program, calls): return None

def make_peer(options):
    return Peer()
"""


@pytest.fixture
def odd_worker(tmp_path):
    """Makes a worker of a peer that is wrong in the given places."""
    workers = []

    def make(*, imports: str = "", prepare: str = "pass", call: str = "return None", starts: int = 3) -> Worker:
        (tmp_path / "odd_peer.py").write_text(_PEER.format(imports=imports, prepare=prepare, call=call))
        worker = Worker("odd_peer", folders=[str(tmp_path)], starts=starts)
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        worker.stop()


@pytest.fixture(scope="module")
def good_workers():
    """`xla` and `jax.nn` on the CPU, started once for this file."""
    environment = {"JAX_PLATFORMS": "cpu"}
    ours = Worker("benchmarks.peers.fgattn", environment=environment)
    workers = dict.fromkeys(("cuda", "pallas", "xla"), ours)
    workers["cudnn"] = Worker("benchmarks.peers.jax_nn", environment=environment)
    yield workers
    for worker in (ours, workers["cudnn"]):
        worker.stop()


class TestWorker:
    def test_a_missing_package_is_said_in_words(self, odd_worker):
        worker = odd_worker(imports="import a_package_that_nobody_has")
        with pytest.raises(PeerAbsentError, match="a_package_that_nobody_has"):
            worker.hello(60)
        assert not worker.running

    def test_what_libraries_print_does_not_disturb_the_answers(self, odd_worker):
        assert odd_worker().hello(60)["versions"] == {"odd": "1"}

    def test_errors_come_back_and_the_worker_lives_on(self, odd_worker):
        worker = odd_worker()
        worker.hello(60)
        with pytest.raises(WorkerError, match="KeyError"):
            worker.ask({"do": "time", "contestant": "nobody", "target_ms": 1}, 20)
        with pytest.raises(WorkerError, match="do='dance'"):
            worker.ask({"do": "dance"}, 20)
        assert worker.ask({"do": "release"}, 20) == {}

    def test_a_hung_worker_is_killed_and_started_again_a_few_times(self, odd_worker, tmp_path):
        worker = odd_worker(prepare="time.sleep(600)", starts=2)
        files = inputs.make_files(SMALL, tmp_path / "files")
        for _ in range(2):
            worker.hello(60)
            with pytest.raises(WorkerLostError, match=r"no answer to 'prepare' in 0\.5 s: killed"):
                worker.ask(protocol.prepare_message("odd", SMALL, files), 0.5)
            assert not worker.running
        with pytest.raises(WorkerLostError, match="lost too often"):
            worker.hello(60)

    def test_a_worker_that_dies_is_said_with_its_last_line(self, odd_worker, tmp_path):
        worker = odd_worker(prepare="import os, sys; print('CUDA error 700', file=sys.stderr, flush=True); os._exit(3)")
        worker.hello(60)
        files = inputs.make_files(SMALL, tmp_path / "files")
        with pytest.raises(WorkerLostError, match="status 3 at 'prepare'"):
            worker.ask(protocol.prepare_message("odd", SMALL, files), 20)


class TestContest:
    def test_right_contestants_are_timed_in_every_round(self, good_workers, tmp_path):
        case = dataclasses.replace(SMALL, contestants=("xla", "cudnn", "cuda", "pallas"))
        files = inputs.make_files(case, tmp_path)
        entries = contest.run_case(case, files, good_workers, FAST)
        rows = {row["implementation"]: row for row in contest.rows_of(case, files, entries)}
        for name in ("xla", "cudnn"):
            assert rows[name]["status"] == "timed", rows[name]["note"]
            # A call of microseconds: what starting a batch costs, which is taken off, varies by more than it takes.
            assert math.isfinite(rows[name]["ms"])
            assert rows[name]["ms_p10"] <= rows[name]["ms"] <= rows[name]["ms_p90"]
            assert rows[name]["error"] < 2e-2
            assert "jax=" in rows[name]["versions"]
        assert rows["xla"]["lse_error"] < 2e-3
        assert rows["xla"]["density"] == pytest.approx(0.3, abs=0.05)
        assert rows["cudnn"]["density"] == 1.0
        flops = 4 * 300 * 333 * 16 * 4 * rows["xla"]["density"]
        assert rows["xla"]["tflops"] == pytest.approx(flops / rows["xla"]["ms"] / 1e9, rel=0.01)
        # Not on a CPU, and not before its tests passed on a GPU.
        assert rows["cuda"]["status"] == "missing"
        assert rows["cuda"]["ms"] is None
        assert "platform='cpu'" in rows["cuda"]["note"]
        assert rows["pallas"]["status"] == "missing"

    def test_a_query_order_reaches_the_kernel(self, good_workers, tmp_path):
        case = dataclasses.replace(
            SMALL, mask="video", grid=(3, 10, 10), order="hilbert", num_keys=300, contestants=("xla",)
        )
        files = inputs.make_files(case, tmp_path)
        assert "query_order" in files.arrays
        (entry,) = contest.run_case(case, files, good_workers, FAST)
        assert entry.status == "timed", entry.note

    def test_a_wrong_contestant_is_not_timed_and_the_others_are(self, good_workers, odd_worker, tmp_path):
        case = dataclasses.replace(SMALL, contestants=("odd", "cudnn"))
        files = inputs.make_files(case, tmp_path / "files")
        odd, cudnn = contest.run_case(case, files, good_workers | {"odd": odd_worker()}, FAST)
        assert odd.status == "wrong"
        assert "against float64, allowed 0.02" in str(odd.note)
        assert odd.times_ms == []
        assert cudnn.status == "timed"
        assert len(cudnn.times_ms) == FAST.rounds

    def test_a_contestant_that_hangs_in_a_round_fails_and_the_others_go_on(
        self, good_workers, odd_worker, tmp_path, monkeypatch
    ):
        case = dataclasses.replace(SMALL, contestants=("odd", "cudnn"), device_timer=False)
        files = inputs.make_files(case, tmp_path / "files")
        hangs = "self.calls = getattr(self, 'calls', 0) + 1; time.sleep(600 if self.calls > 1 else 0)"
        workers = good_workers | {"odd": odd_worker(call=hangs)}
        monkeypatch.setattr(contest, "check", lambda *_: None)  # it would be wrong, too
        odd, cudnn = contest.run_case(case, files, workers, dataclasses.replace(FAST, step_s=10))
        assert odd.status == "failed"
        assert "no answer to 'time' in 10 s" in str(odd.note)
        assert cudnn.status == "timed"
        row = contest.rows_of(case, files, [odd])[0]
        assert row["ms"] is None

    def test_shapes_not_numbers_and_infinities_are_wrong(self, tmp_path):
        files = inputs.make_files(SMALL, tmp_path)
        oracle = inputs.Oracle(SMALL, files)
        output, lse = oracle.of("xla")
        np.save(tmp_path / "output.npy", output)
        np.save(tmp_path / "lse.npy", lse)
        np.save(tmp_path / "short.npy", output[:-1])
        np.save(tmp_path / "nan.npy", np.where(output == output.max(), np.nan, output))
        np.save(tmp_path / "shifted.npy", lse + 0.01)
        right = {"output": str(tmp_path / "output.npy"), "lse": str(tmp_path / "lse.npy"), "finite": True}
        wrong = {
            "expected": right | {"output": str(tmp_path / "short.npy")},
            "allowed": right | {"output": str(tmp_path / "nan.npy")},
            "LSE error": right | {"lse": str(tmp_path / "shifted.npy")},
            "not finite": right | {"finite": False},
        }
        entry = contest.Entry("xla", Worker("none"))
        contest.check(entry, SMALL, oracle, right)
        assert (entry.status, entry.error) == ("timed", 0)
        for note, answer in wrong.items():
            entry = contest.Entry("xla", Worker("none"))
            contest.check(entry, SMALL, oracle, answer)
            assert entry.status == "wrong"
            assert note in str(entry.note)


class TestRun:
    def test_peers_do_not_see_each_other(self, tmp_path):
        for name in ("flashinfer", "fa4"):
            (tmp_path / name).mkdir()
        workers = run.make_workers(tmp_path, options={}, log=None)
        assert workers["flashinfer_fused"] is workers["flashinfer_launches"]
        assert workers["fa4_128x64"]._folders == [str(tmp_path / "fa4")]
        assert workers["fa3"]._folders == []
        assert workers["flashinfer"]._environment == {"FLASHINFER_WORKSPACE_BASE": str(tmp_path / "flashinfer")}
        assert len({id(worker) for worker in workers.values()}) == len(run.PEERS)

    def test_cases_follow_each_other_and_a_spent_budget_leaves_out_the_rest(self, good_workers, tmp_path):
        cases = [SMALL, dataclasses.replace(SMALL, name="file", mask="file")]
        plan = run.Plan(cases, FAST, budget_s=1000, contestants=("cudnn",), source={"commit": "c"}, scratch=tmp_path)
        # `run` ends its workers: these are its own.
        workers = {"cudnn": Worker("benchmarks.peers.jax_nn", environment={"JAX_PLATFORMS": "cpu"})}
        said = []
        first, second = run.run(plan, workers, said.append)
        assert [(row["implementation"], row["status"], row["commit"]) for row in first] == [("cudnn", "timed", "c")]
        assert second[0]["status"] == "missing"
        assert "--dit-masks" in second[0]["note"]
        assert not workers["cudnn"].running
        assert "small: cudnn" in said[0]
        (rows,) = run.run(dataclasses.replace(plan, cases=[SMALL], budget_s=-1), workers, said.append)
        assert rows[0]["status"] == "left out"
        assert rows[0]["ms"] is None
        assert list(tmp_path.iterdir()) == []

    def test_the_command_without_a_gpu_reports_everybody_missing(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        case = dataclasses.replace(SMALL, contestants=("cuda", "fa3"))
        monkeypatch.setattr(command, "cases_of", lambda **_: (case,))
        rows_file = tmp_path / "rows.json"
        assert command.main(["--rows", str(rows_file), "--commit", "abc", "--rounds", "1"]) == 1
        rows = tables.read_rows(rows_file)
        assert [row["status"] for row in rows] == ["missing", "missing"]
        assert rows[0]["commit"] == "abc"
        assert rows[0]["command"].startswith("python -m benchmarks.gpu --rows")
        assert "ours: not timed" in capsys.readouterr().out
        assert command.main(["--rows", str(rows_file), "--summary"]) == 0

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--case", "no such"], "'no such'"),
            (["--only", "nobody"], "'nobody'"),
            (["--rounds", "0"], "rounds=0"),
        ],
    )
    def test_bad_input_is_refused(self, words, message, capsys, tmp_path):
        assert command.main([*words, "--rows", str(tmp_path / "rows.json")]) == 2
        assert message in capsys.readouterr().err

    def test_importing_the_benchmark_loads_no_gpu_library(self, run_python):
        code = "import sys, benchmarks.gpu.__main__; print([m for m in ('torch', 'flashinfer') if m in sys.modules])"
        assert run_python(code, platform="none").strip() == "[]"


class TestBundle:
    def test_archives_hold_what_is_needed_and_leave_out_the_rest(self, tmp_path):
        kept = ["flashinfer/sparse.py", "flashinfer/data/csrc/batch_prefill_sm90.cu", ".cache/a/b.so"]
        left = ["flashinfer/data/cutlass/x.h", "flashinfer/data/csrc/gemm.cu", "flashinfer/data/csrc/sub/batch_a.cu",
                ".cache/a/b.o", "flashinfer/__pycache__/sparse.pyc"]  # fmt: skip
        for name in [*kept, *left]:
            path = tmp_path / "in" / "flashinfer" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        bundle.pack(tmp_path / "in", tmp_path / "out", ["flashinfer", "fa3"])
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["flashinfer.tar.xz"]
        assert bundle.unpack(tmp_path / "out", tmp_path / "there") == ["flashinfer"]
        there = tmp_path / "there" / "flashinfer"
        found = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
        assert found == set(kept)
        assert (there / kept[0]).read_text() == kept[0]

    def test_an_archive_may_travel_in_parts(self, tmp_path):
        (tmp_path / "in" / "fa4").mkdir(parents=True)
        content = np.random.default_rng(0).bytes(100_000)
        (tmp_path / "in" / "fa4" / "big").write_bytes(content)
        bundle.pack(tmp_path / "in", tmp_path / "out", ["fa4"])
        archive = tmp_path / "out" / "fa4.tar.xz"
        data = archive.read_bytes()
        archive.unlink()
        for number in range(3):
            (tmp_path / "out" / f"fa4.tar.xz.{number}").write_bytes(data[number * 40_000 : (number + 1) * 40_000])
        bundle.unpack(tmp_path / "out", tmp_path / "there")
        assert (tmp_path / "there" / "fa4" / "big").read_bytes() == content

    def test_nothing_there_is_said(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="run `fetch` first"):
            bundle.pack(tmp_path, tmp_path / "out", ["fa3"])
        with pytest.raises(FileNotFoundError, match="peer"):
            bundle.unpack(tmp_path, tmp_path / "there")

    def test_every_version_is_pinned_once_per_peer(self):
        for requirements in bundle.WHEELS.values():
            names = [requirement.split("==")[0] for requirement in requirements]
            assert all("==" in requirement for requirement in requirements)
            assert len(set(names)) == len(names)


def test_folders_of_packages_may_name_further_folders(odd_worker, tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "hidden_package.py").write_text("")
    (tmp_path / "some.pth").write_text(str(tmp_path / "deeper"))
    assert odd_worker(imports="import hidden_package").hello(60)["device"] == "none"


def test_device_time_is_that_of_streams_alone():
    def line(name, *durations):
        return types.SimpleNamespace(name=name, events=[types.SimpleNamespace(duration_ns=d) for d in durations])

    planes = [
        types.SimpleNamespace(name="/device:GPU:0", lines=[line("Stream #13(Compute)", 5, 7), line("XLA Ops", 12)]),
        types.SimpleNamespace(name="/host:CPU", lines=[line("Stream #1", 100)]),
    ]
    assert jax_side.stream_ns(types.SimpleNamespace(planes=planes)) == 12


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", ["cuda", "pallas"])
def test_our_kernels_are_handed_bits_orders_and_scale(tmp_path, monkeypatch, name, ordered):
    case = dataclasses.replace(SMALL, num_keys=300, contestants=(name,))
    if ordered:
        case = dataclasses.replace(case, mask="video", grid=(3, 10, 10), order="hilbert")
    asked = {}

    # Stand-ins with the signatures of the adapter: no GPU is here to run the kernel.
    def work_order(bits, *, num_keys):
        asked["num_keys"] = num_keys
        return jnp.zeros((*bits.shape[:3], 2), jnp.int32)

    def forward(query, key, value, bits, query_order, work_order, *, scale, query_block):
        asked["work_order"] = work_order.shape
        mask = public_masks.SliceMask(bits, query_order, query_block=query_block, num_keys=300, num_queries=300)
        return fgattn_jax.attention_with_lse(query, key, value, mask, scale=scale, implementation="xla")

    monkeypatch.setattr(fgattn.cuda_attention, "work_order", work_order)
    monkeypatch.setattr({"cuda": fgattn.cuda_attention, "pallas": fgattn.pallas_attention}[name], "forward", forward)
    peer = fgattn.make_peer({})
    assert "platform='cpu'" in str(peer.why_not(name, case))
    files = inputs.make_files(case, tmp_path)
    program = peer.prepare(name, case, files)
    fetched = program.fetch(program.call(), files.queries)
    output, lse = inputs.expected(case, files, name)
    np.testing.assert_allclose(fetched.output, output, atol=contest.OUTPUT_BOUND["bfloat16"])
    np.testing.assert_allclose(fetched.lse, lse, atol=contest.LSE_BOUND)
    assert asked == {"work_order": (1, 4, 5, 2)} | ({"num_keys": 300} if name == "cuda" else {})
    assert program.plan is not None
    program.plan()
