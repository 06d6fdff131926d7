"""Rows about making masks: checks of masks, shares of dense attention, break-even, and the whole way on a CPU."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import contest, fields, inputs, mask_checks, mask_rows, mask_summary, masks, run, summary
from benchmarks.gpu.cases import (
    CASES,
    DENSE,
    MAKERS,
    MASK_CASES,
    MASKS,
    ORDER,
    ORDER_CALLS,
    OURS,
    PARTS,
    SPARSE,
    GpuCase,
    cases_of,
)
from benchmarks.gpu.client import Worker
from benchmarks.peers import base, fgattn_masks
from fgattn_jax import predictors, query_order
from fgattn_jax.evaluation import tables
from fgattn_jax.predictors import Budget, ExactPredictor, MeanQueryPredictor
from fgattn_jax.predictors.exact import MASS_SHARE, PEAK_THRESHOLD
from fgattn_jax.predictors.mean_query import MEAN_THRESHOLD

SMALL = GpuCase(
    "masks, small",
    num_queries=300,
    num_keys=300,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    query_block=64,
    values="video",
    grid=(3, 10, 10),
    mask="full",
    density=1.0,
    contestants=("cudnn", "xla", *MAKERS),
)
FAST = contest.Settings(rounds=2, batch_ms=1.0, warm_ms=1.0, prepare_s=60, step_s=20)


@pytest.fixture(scope="module")
def workers():
    """Makers of masks in XLA's operations, and dense attention, on the CPU."""
    environment = {"JAX_PLATFORMS": "cpu"}
    makers = Worker("benchmarks.peers.fgattn_masks", environment=environment, options={"without_kernels": True})
    known = dict.fromkeys(MAKERS, makers)
    known["cudnn"] = Worker("benchmarks.peers.jax_nn", environment=environment)
    known["xla"] = Worker("benchmarks.peers.fgattn", environment=environment)
    yield known
    for worker in (makers, known["cudnn"], known["xla"]):
        worker.stop()


class TestFields:
    def test_a_query_looks_for_keys_near_its_own_place(self):
        grid = (4, 12, 12)
        query, key = fields.video_fields(grid, 4, 2, 32, seed=1)
        assert query.shape == (576, 4, 32)
        assert key.shape == (576, 2, 32)
        places = np.stack(np.unravel_index(np.arange(576), grid), axis=1) / np.array(grid)
        distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
        for head in range(4):
            scores = query[:, head] @ key[:, head // 2].T
            assert scores[distance < 0.1].mean() > scores[distance > 0.4].mean() + 10
        assert not np.array_equal(query[:, 0], query[:, 1])
        np.testing.assert_array_equal(query, fields.video_fields(grid, 4, 2, 32, seed=1).query)

    def test_a_case_takes_them_for_queries_and_keys_alone(self, tmp_path):
        files = inputs.make_files(SMALL, tmp_path, part="0")
        plain = inputs.make_files(dataclasses.replace(SMALL, values="normal"), tmp_path, part="1")
        assert files.arrays["value"] == plain.arrays["value"]
        assert not np.array_equal(files.load("query"), plain.load("query"))
        expected = fields.video_fields((3, 10, 10), 4, 2, 16, seed=7)
        np.testing.assert_allclose(inputs._load_values(files, "key").astype(np.float32), expected.key, rtol=1e-2)


class TestCases:
    def test_rules_are_those_of_the_predictors(self):
        assert (MASKS["exact"].value, MASKS["exact_mass"].value) == (PEAK_THRESHOLD, MASS_SHARE)
        assert MASKS["mean_query"].value == MEAN_THRESHOLD
        assert Budget(**MASKS["exact"].budget(200)) == Budget(threshold=PEAK_THRESHOLD / 200)
        assert Budget(**MASKS["mean_query_topk"].budget(200)) == Budget(top_k=60)

    def test_the_shapes_of_the_issue_are_covered_by_everybody(self):
        shapes = {(case.num_queries, case.num_heads, case.head_dim, case.query_block) for case in MASK_CASES}
        assert shapes == {(32760, 12, 128, 128), (75600, 8, 128, 128), (32760, 12, 64, 64)}
        assert {case.order for case in MASK_CASES} == {None, "cubes_2x8x8"}
        known = {name for names in run.PEERS.values() for name in names}
        for case in MASK_CASES:
            assert {"fa3", "cudnn", *OURS, *SPARSE, *MAKERS} <= set(case.contestants) <= known
            assert case.head_dim == 64 or {*DENSE} - {"flashinfer"} <= set(case.contestants)
            assert np.prod(case.grid) == case.num_queries == case.num_keys

    def test_parts_select_and_the_profiler_stays_last(self):
        assert cases_of(quick=False, part="masks") == MASK_CASES
        assert cases_of(quick=False, part="attention") == CASES
        assert [case.name for case in cases_of(quick=True)] == [case.name for case in CASES if case.quick]
        assert [case.device_timer for case in PARTS["all"]].index(True) == len(CASES) + len(MASK_CASES) - 1
        with pytest.raises(ValueError, match="part='masks': leave out `--quick`"):
            cases_of(quick=True, part="masks")


def _scores(case, files):
    return inputs.Oracle(case, files).scores()


class TestChecks:
    @pytest.mark.parametrize("order", [None, "hilbert"])
    def test_scores_are_plain_softmax(self, tmp_path, order):
        case = dataclasses.replace(SMALL, order=order)
        files = inputs.make_files(case, tmp_path)
        scores = _scores(case, files)
        assert scores.rows == (0, 2, 4)
        numbers = np.arange(300) if order is None else query_order.resolve(order, (3, 10, 10))
        query, key = (inputs._load_values(files, name).astype(np.float64) for name in ("query", "key"))
        for place, row in enumerate(scores.rows):
            block = query[numbers[row * 64 : row * 64 + 64], 3]
            weights = np.exp(block @ key[:, 1].T / 4)
            probabilities = weights / weights.sum(1, keepdims=True)
            mean = np.exp(block.mean(0) @ key[:, 1].T / 4)
            np.testing.assert_allclose(scores.peak[3, place], probabilities.max(0), rtol=1e-9)
            np.testing.assert_allclose(scores.mass[3, place], probabilities.sum(0), rtol=1e-9)
            np.testing.assert_allclose(scores.mean[3, place], mean / mean.sum(), rtol=1e-9)
        assert scores.mass[3, 2].sum() == pytest.approx(300 - 4 * 64)

    @pytest.mark.parametrize("name", list(MASKS))
    def test_the_right_keys_pass_and_one_key_more_or_less_does_not(self, name):
        rule = MASKS[name]
        scores = np.random.default_rng(0).permuted(np.exp(np.linspace(-9, 0, 200))[None, None].repeat(3, 1), axis=-1)
        scores /= scores.sum(-1, keepdims=True)
        best = np.argsort(-scores, axis=-1)
        value = rule.budget(200)[rule.rule]
        if rule.rule == "top_k":
            count = value
        elif rule.rule == "threshold":
            count = int((scores[0, 0] > value).sum())
        else:
            count = 1 + int((np.cumsum(np.sort(scores[0, 0])[::-1]) < value).sum())
        assert 10 < count < 190

        def kept(number):
            rows = np.zeros(scores.shape, bool)
            np.put_along_axis(rows, best[..., :number], True, axis=-1)
            return rows

        assert mask_checks.wrong_share(scores, kept(count), rule) == 0
        assert mask_checks.wrong_share(scores, kept(count + 2), rule) >= 1 / 200
        assert mask_checks.wrong_share(scores, kept(count - 2), rule) >= 1 / 200
        assert mask_checks.wrong_share(scores, ~kept(count), rule) > 0.9

    def test_a_row_below_the_threshold_keeps_its_best_key(self):
        scores = np.array([[[1e-5, 3e-5, 2e-5]]])
        assert mask_checks.wrong_share(scores, np.array([[[False, True, False]]]), MASKS["exact"]) == 0
        assert mask_checks.wrong_share(scores, np.array([[[False, True, True]]]), MASKS["exact"]) == 1 / 3

    def test_what_is_wrong_with_a_mask_is_said(self, tmp_path):
        files = inputs.make_files(SMALL, tmp_path)
        query, key = (jnp.asarray(inputs._load_values(files, name))[None] for name in ("query", "key"))
        bits = np.array(ExactPredictor(64)(query, key).bits[0])

        def verdict(bits):
            return mask_checks.check_mask(
                bits, lambda: _scores(SMALL, files), MASKS["exact"], (4, 5, files.load("bits").shape[2]), 300
            )

        assert verdict(bits) == (0.0, None)
        assert "slices are wrong" in str(verdict(~bits).note)
        assert "expected uint32(4, 5, 12)" in str(verdict(bits[:, :4]).note)
        empty = bits.copy()
        empty[1, 3] = 0  # no checked row
        assert "1 rows keep nothing" in str(verdict(empty).note)
        bits[0, 0, 300 // 32] |= np.uint32(1 << 300 % 32)
        assert "past num_keys=300" in str(verdict(bits).note)

    def test_orders_are_compared_exactly(self):
        bits = masks.random_mask(2, 9, 333, 0.3, seed=0)
        counts = masks.count_kept(bits)
        rows = np.argsort(-counts, axis=-1, kind="stable")
        order = np.stack([rows, np.take_along_axis(counts, rows, -1)], -1).astype(np.int32)
        assert mask_checks.check_order(order, bits) is None
        swapped = order.copy()
        swapped[0, [0, 1]] = order[0, [1, 0]]
        assert "2 of 18 rows" in str(mask_checks.check_order(swapped, bits))
        assert "shape (2, 8, 2)" in str(mask_checks.check_order(order[:, 1:], bits))


def _row(name: str, ms: float | None, case: str = MASK_CASES[0].name, **more) -> dict:
    sizes = {"batch": 1, "heads": 12, "kv_heads": 12, "queries": 32760, "keys": 32760, "head_dim": 128}
    row = {"bench": "gpu_attention", "implementation": name, "case": case, "query_block": 128, "dtype": "bfloat16"}
    row |= {"mask": "full", "density": SPARSE.get(name, 1.0), "ms": ms, "tflops": None if ms is None else 6600 / ms}
    row |= {"plan_ms": None, "device_ms": None, "status": "timed" if ms else "missing", "note": None}
    row |= {"device": "a GPU", "commit": "abc", "date": "2026-11-21T11:44:27+00:00", "runs": "cuda"}
    return row | more | sizes


def _rows() -> list[dict]:
    rows = [_row("fa3", 9.0), _row("cudnn", 10.0), _row("cuda", 9.5), _row("pallas", 8.0)]
    rows += [_row(name, 10 * share) for name, share in SPARSE.items()]
    rows += [_row("exact", 4.5), _row("exact_mass", 7.2), _row("one_pass", 10.0), _row("mean_query", 0.15)]
    return mask_rows.complete([*rows, _row("mean_query_topk", None, note="no kernel"), _row(ORDER, 0.03)])


class TestRows:
    def test_shares_are_of_the_fastest_peer(self):
        rows = {row["implementation"]: row for row in _rows() if row["bench"] == "mask"}
        assert set(rows) == {"exact", "exact_mass", "one_pass", "mean_query", "mean_query_topk", ORDER}
        exact = rows["exact"]
        assert (exact["fastest_dense"], exact["dense_ms"], exact["own_dense_ms"]) == ("fa3", 9.0, 9.5)
        assert exact["share_of_dense"] == 0.5
        assert exact["share_of_any_dense"] == pytest.approx(4.5 / 8.0)  # our own `pallas` is faster here
        assert rows["mean_query_topk"]["share_of_dense"] is None
        assert exact["total_share_of_dense"] is None

    def test_one_pass_is_what_it_takes_beyond_our_dense_attention(self):
        row = next(row for row in _rows() if row["implementation"] == "one_pass")
        assert row["share_of_dense"] == pytest.approx(0.5 / 9.0, abs=1e-5)
        assert row["total_share_of_dense"] == pytest.approx(10 / 9.0, abs=1e-5)
        alone = mask_rows.complete([_row("fa3", 9.0), _row("one_pass", 10.0)])[1]
        assert (alone["share_of_dense"], alone["own_dense_ms"]) == (None, None)

    def test_break_even_is_mask_time_over_what_a_call_saves(self):
        rows = [row for row in _rows() if row["bench"] == "break_even"]
        assert {row["implementation"] for row in rows} == {"exact", "exact_mass", "mean_query"}
        found = {(row["implementation"], row["sparse"]): row for row in rows}
        assert len(rows) == 3 * len(SPARSE)
        assert found["exact", "cuda_0.3"]["reuses"] == pytest.approx(4.5 / (9 - 3 - 0.03), abs=1e-4)
        assert found["exact", "cuda_0.3"]["density"] == 0.3
        slow = mask_rows.complete([_row("fa3", 2.0), _row("cuda_0.2", 2.0), _row("exact", 1.0), _row(ORDER, 0.03)])[-1]
        assert slow["reuses"] is None
        assert "saves nothing" in slow["note"]

    def test_without_a_dense_peer_or_an_order_nothing_breaks_even(self):
        rows = mask_rows.complete([_row("cuda", 9.0), _row("cuda_0.2", 2.0), _row("exact", 1.0), _row(ORDER, 0.03)])
        assert [row["bench"] for row in rows].count("break_even") == 0
        assert rows[2]["share_of_dense"] is None
        assert rows[2]["share_of_any_dense"] == pytest.approx(1 / 9, abs=1e-4)


class TestSummary:
    def test_bars_are_judged_row_by_row(self):
        text = summary.summarise(_rows(), MASK_CASES[:1])
        cells = {cell[1]: cell for cell in (re.split(r"  +", line) for line in text.splitlines()) if len(cell) == 10}
        assert cells["exact"][-3:] == ["0.5000", "<= 0.55", "met"]
        assert cells["exact_mass"][-3:] == ["0.8000", "<= 0.75", "NOT met"]
        assert cells["one_pass"][-3:] == ["0.0556", "<= 0.1", "met"]
        assert cells["mean_query"][-3:] == ["0.0167", "<= 0.02", "met"]
        assert cells["mean_query_topk"][-3:] == ["-", "<= 0.04", "-"]
        assert cells[ORDER][-3:] == ["0.0033", "<= 0.003", "NOT met"]
        assert "together 1.111 of fa3" in text
        assert "a GPU, commit abc, 2026-11-21" in text
        assert "mean_query_topk: missing: no kernel" in text
        assert "useful TFLOP/s" not in text

    def test_break_even_is_a_table_by_density(self):
        lines = summary.summarise(_rows(), MASK_CASES[:1]).split("break-even: ")[1].splitlines()
        assert re.split(r"  +", lines[1]) == ["case", "maker", "mask ms", "0.2", "0.3", "0.4", "0.5", "0.6"]
        expected = [f"{4.5 / (9 - 10 * share - 0.03):.2f}" for share in SPARSE.values()]
        assert re.split(r"  +", lines[3]) == [MASK_CASES[0].name, "exact", "4.500", *expected]

    def test_other_widths_have_no_bar(self):
        row = next(row for row in _rows() if row["implementation"] == "exact")
        assert mask_summary.met(row) is True
        assert mask_summary.bar_of(row | {"head_dim": 64}) is None
        assert mask_summary.met(row | {"head_dim": 64}) is None

    def test_rows_of_masks_do_not_reach_the_tables_of_attention(self):
        text = summary.summarise([_row("fa3", 9.0, case="480p, full"), *_rows()], (CASES[1], *MASK_CASES[:1]))
        assert text.index("ours: not timed") < text.index("making masks")
        assert "ours: cuda" not in text

    def test_the_last_runs_of_both_parts_are_shown(self):
        older, newer = "2026-11-20T00:00:00+00:00", "2026-11-21T00:00:00+00:00"
        rows = [_row("cuda", 3.0, case=CASES[0].name, date=older), _row("exact", 4.0, date=newer)]
        rows += [_row("exact", 5.0, date=older)]
        assert [row["ms"] for row in command._last_run(rows)] == [3.0, 4.0]


class TestContest:
    def test_makers_are_checked_and_timed_beside_dense_attention(self, workers, tmp_path):
        case = dataclasses.replace(SMALL, order="hilbert")
        files = inputs.make_files(case, tmp_path)
        entries = contest.run_case(case, files, workers, FAST)
        rows = {row["implementation"]: row for row in mask_rows.complete(contest.rows_of(case, files, entries))}
        for name in (name for name in MAKERS if name != "one_pass"):
            row = rows[name]
            assert row["status"] == "timed", row["note"]
            assert row["bench"] == "mask"
            assert (row["runs"], row["calls_per_program"]) == ("xla", 1)
            assert math.isfinite(row["ms"])
            assert row["tflops"] is None
            assert row["fastest_dense"] == "cudnn"
            assert row["wrong_slices"] == (None if name == ORDER else 0)
        assert rows["mean_query_topk"]["density"] == pytest.approx(0.3)
        assert rows[ORDER]["density"] == pytest.approx(0.3, abs=0.03)
        assert 0.02 < rows["exact_mass"]["density"] < rows["exact"]["density"] < 0.98
        assert rows["xla"]["bench"] == "gpu_attention"
        if not hasattr(predictors, "one_pass_refresh"):
            assert rows["one_pass"]["status"] == "missing"
            assert "one_pass_refresh" in rows["one_pass"]["note"]

    def test_a_wrong_mask_is_not_timed(self, tmp_path):
        files = inputs.make_files(SMALL, tmp_path)
        oracle = inputs.Oracle(SMALL, files)
        for name, made in (("exact", files.load("bits")), (ORDER, np.zeros((4, 5, 2), np.int32))):
            entry = contest.Entry(name, Worker("none"))
            contest.check_made(entry, SMALL, files, oracle, made)
            assert entry.status == "wrong"
            row = mask_rows.complete(contest.rows_of(SMALL, files, [entry]))[0]
            assert (row["ms"], row["share_of_dense"]) == (None, None)
            assert row["note"]

    def test_a_case_that_is_left_out_has_rows_of_masks_all_the_same(self):
        case = dataclasses.replace(SMALL, name=MASK_CASES[0].name, contestants=("fa3", "cuda_0.2", *MAKERS))
        plan = run.Plan([case], FAST, budget_s=-1, source={"commit": "c"})
        (rows,) = run.run(plan, {}, lambda _: None)
        assert [row["bench"] for row in rows] == ["gpu_attention"] * 2 + ["mask"] * len(MAKERS)
        assert {row["status"] for row in rows} == {"left out"}
        assert "left out" in summary.summarise(rows, [case])

    def test_kernels_that_are_not_released_are_reported(self, monkeypatch):
        peer = fgattn_masks.make_peer({})
        case = dataclasses.replace(SMALL, head_dim=64)
        monkeypatch.setattr(fgattn_masks.support, "MASKS_RELEASED", False)
        assert "not passed its tests on a GPU yet" in str(peer.why_not("exact", case))
        assert "platform='cpu'" in str(peer.why_not("exact", case))
        monkeypatch.setattr(fgattn_masks.support, "RELEASED", True)
        fgattn_masks.make_peer({"allow_unreleased": True})
        assert fgattn_masks.support.MASKS_RELEASED
        assert "not passed its tests" not in str(peer.why_not("exact", case))

    def test_a_missing_refresh_in_one_pass_is_said(self, monkeypatch):
        monkeypatch.delattr(predictors, "one_pass_refresh", raising=False)
        peer = fgattn_masks.make_peer({"without_kernels": True})
        assert "one_pass_refresh" in str(peer.why_not("one_pass", SMALL))

    def test_one_pass_returns_attention_and_a_mask(self, monkeypatch, tmp_path):
        def one_pass_refresh(predictor, query, key, value, lse):
            output, new_lse = fgattn_masks.fgattn_jax.attention_with_lse(query, key, value)
            return output, new_lse, predictor(query, key, lse)

        monkeypatch.setattr(predictors, "one_pass_refresh", one_pass_refresh, raising=False)
        files = inputs.make_files(SMALL, tmp_path)
        peer = fgattn_masks.make_peer({"without_kernels": True})
        assert peer.why_not("one_pass", SMALL) is None
        program = peer.prepare("one_pass", SMALL, files)
        fetched = program.fetch(program.call(), files.queries)
        entry, oracle = contest.Entry("one_pass", Worker("none")), inputs.Oracle(SMALL, files)
        contest.check_made(entry, SMALL, files, oracle, fetched.made)
        for name in ("output", "lse"):
            np.save(tmp_path / f"{name}.npy", getattr(fetched, name))
        paths = {name: str(tmp_path / f"{name}.npy") for name in ("output", "lse")}
        contest.check(entry, SMALL, oracle, paths | {"finite": fetched.finite})
        assert (entry.status, entry.wrong_slices) == ("timed", 0)
        assert entry.error is not None
        assert entry.error < contest.OUTPUT_BOUND["bfloat16"]

    def test_budgets_are_those_of_the_rules(self, tmp_path):
        files = inputs.make_files(SMALL, tmp_path)
        exact = fgattn_masks.make_predictor("exact_mass", SMALL, files)
        assert isinstance(exact, ExactPredictor)
        assert (exact.statistic, exact.budget) == ("mass", Budget(top_p=0.95))
        mean = fgattn_masks.make_predictor("mean_query_topp", SMALL, files)
        assert isinstance(mean, MeanQueryPredictor)
        assert (mean.query_block, mean.budget) == (64, Budget(top_p=0.9))


class TestWarmth:
    """What runs before a turn."""

    @pytest.mark.parametrize(("names", "warmed"), [(("exact", "cudnn", "fa3"), True), (("cuda", "cudnn"), False)])
    def test_the_first_dense_peer_works_before_every_turn_where_masks_are_made(self, monkeypatch, names, warmed):
        asked = []

        def answer(entry, message, *_):
            if message["do"] == "time":
                asked.append((entry.name, message["target_ms"]))
            return {"ms": 1.0}

        case = dataclasses.replace(SMALL, contestants=names, device_timer=False)
        monkeypatch.setattr(contest, "_ask", answer)
        monkeypatch.setattr(contest, "_prepare", lambda *_: None)
        workers = dict.fromkeys(names, Worker("none"))
        settings = contest.Settings(rounds=2, batch_ms=4.0, warm_ms=30.0)
        entries = contest.run_case(case, None, workers, settings, oracle=object())
        turn = [("cudnn", 30.0)] * warmed
        assert asked == 2 * [one for name in names for one in (*turn, (name, 4.0))]
        assert all(len(entry.times_ms) == 2 for entry in entries)


class TestRepeatedCalls:
    def test_a_program_holds_a_call_for_each_first_argument(self, monkeypatch):
        done = []

        def seen(x, y):
            done.append(float(x))
            return np.asarray(x + y)

        def call(x, y):
            return jax.pure_callback(seen, jax.ShapeDtypeStruct((), x.dtype), x, y)

        monkeypatch.setattr(fgattn_masks, "_OUR_CALL", 'custom_call_target="xla_ffi_python_cpu_callback"')
        peer = fgattn_masks.make_peer({"without_kernels": True})
        firsts = [jnp.float32(3) for _ in range(5)]
        program = peer._repeated(("call", SMALL), call, firsts, (jnp.float32(1),), lambda made, _: made)
        assert (program.calls, program.runs) == (5, "cuda")
        assert float(program.fetch(program.call(), ())) == 4
        assert done == [3.0] * 5
        alone = peer._repeated(("alone", SMALL), call, firsts[:1], (jnp.float32(1),), lambda made, _: made)
        assert (alone.calls, float(alone.fetch(alone.call(), ()))) == (1, 4)

    def test_calls_that_xla_merged_are_refused(self, monkeypatch):
        monkeypatch.setattr(fgattn_masks, "_OUR_CALL", 'custom_call_target="lapack_spotrf')
        peer = fgattn_masks.make_peer({"without_kernels": True})
        firsts, square = [jnp.float32(3) for _ in range(5)], (4 * jnp.eye(2),)
        own = peer._repeated(("own", SMALL), lambda x, y: jnp.linalg.cholesky(x * y), firsts, square, lambda x, _: x)
        assert own.calls == 5
        with pytest.raises(RuntimeError, match="expected 5 kernel calls in a program of 5 calls, found 1"):
            peer._repeated(("one", SMALL), lambda _, y: jnp.linalg.cholesky(y), firsts, square, lambda x, _: x)

    def test_orders_of_the_library_are_made_many_times_in_a_program(self, host_kernel, tmp_path):
        files = inputs.make_files(SMALL, tmp_path)
        program = fgattn_masks.make_peer({}).prepare(ORDER, SMALL, files)
        assert (program.calls, program.runs) == (ORDER_CALLS, "cuda")
        entry = contest.Entry(ORDER, Worker("none"))
        made = program.fetch(program.call(), files.queries).made
        contest.check_made(entry, SMALL, files, inputs.Oracle(SMALL, files), made)
        assert entry.status == "timed", entry.note

    def test_calls_of_a_program_do_not_overlap(self, monkeypatch):
        workers = run.make_workers(None, options={}, log=None)
        assert workers["exact"]._environment["XLA_FLAGS"].endswith("--xla_gpu_enable_command_buffer=")
        assert workers["cuda"]._environment == {}

    def test_times_are_those_of_one_call_of_many(self, monkeypatch):
        from benchmarks.gpu import worker

        monkeypatch.setattr(worker, "time_calls", lambda call, sync, target_ms: (8.0, 5))
        session = worker._Session(lambda options: None)
        session._peer = type("Peer", (), {"sync": None, "device_ms": lambda self, program, calls: 16.0})()
        session._programs["many"] = base.Program(lambda: None, lambda arrays, queries: None, calls=4)
        assert session.time({"contestant": "many", "target_ms": 40}) == {"ms": 2.0, "calls": 20}
        assert session.device_time({"contestant": "many", "calls": 5}) == {"ms": 4.0}


def test_the_command_writes_rows_of_masks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    case = dataclasses.replace(SMALL, name=MASK_CASES[0].name, contestants=("exact", "cuda_0.2"))
    monkeypatch.setattr(command, "cases_of", lambda **_: (case,))
    rows_file = tmp_path / "rows.json"
    assert command.main(["--part", "masks", "--rows", str(rows_file), "--commit", "abc", "--rounds", "1"]) == 1
    rows = {row["implementation"]: row for row in tables.read_rows(rows_file)}
    assert (rows["exact"]["bench"], rows["exact"]["status"]) == ("mask", "missing")
    assert rows["cuda_0.2"]["mask"] == "random"
    assert "platform='cpu'" in rows["exact"]["note"]
    printed = capsys.readouterr().out
    assert "making masks on one" in printed
    assert command.main(["--rows", str(rows_file), "--summary"]) == 0
    assert "making masks on one" in capsys.readouterr().out
