"""The GPU benchmark without a GPU: masks, cases, expected results and the arithmetic of the summary."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import inputs, masks, protocol, run, summary
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.cases import BREAK_EVEN_BAR, CASES, EVEN, FLASHINFER, OURS, Bar, GpuCase, cases_of
from fgattn_jax import masks as public_masks
from fgattn_jax import query_order

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


class TestMasks:
    def test_bits_are_those_of_the_public_builder(self):
        rows = np.random.default_rng(0).random((5, 333)) < 0.4
        public = public_masks.from_rows(rows[None, None], query_block=64, num_queries=300)
        np.testing.assert_array_equal(masks.pack(rows), np.asarray(public.bits)[0, 0])
        np.testing.assert_array_equal(masks.unpack(masks.pack(rows), 333), rows)

    @pytest.mark.parametrize("share", [0.03, 0.3, 0.88])
    def test_random_masks_have_their_density_and_differ_between_heads(self, share):
        bits = masks.random_mask(3, 8, 5000, share, seed=1)
        assert masks.density(bits, 8 * 128, 5000, 128) == pytest.approx(share, rel=0.03)
        assert not np.array_equal(bits[0], bits[1])
        np.testing.assert_array_equal(bits, masks.random_mask(3, 8, 5000, share, seed=1))

    def test_a_full_mask_keeps_every_key_and_no_padding(self):
        bits = masks.random_mask(2, 3, 333, 1.0, seed=0)
        assert (masks.count_kept(bits) == 333).all()

    def test_density_counts_the_queries_of_the_last_row(self):
        bits = masks.pack(np.array([[True] * 10, [False] * 10]))[None]
        assert masks.density(bits, 65, 10, 64) == pytest.approx(64 / 65)

    def test_uneven_masks_have_the_stated_spread_and_the_even_mean(self):
        counts = masks.count_kept(masks.uneven_mask(12, 256, 2000, 0.3, seed=5)).astype(float)
        heads = counts.mean(axis=1)
        assert counts.mean() / 2000 == pytest.approx(0.3, rel=0.01)
        # A row cannot keep more than all keys: that takes a little off both.
        assert np.mean(counts.std(axis=1) / heads) == pytest.approx(0.5, abs=0.1)
        assert heads.std() / heads.mean() == pytest.approx(0.4, abs=0.1)

    @pytest.mark.parametrize("overlap", [0.3, 0.6, 0.8])
    def test_neighbours_share_the_stated_part(self, overlap):
        bits = masks.overlap_mask(2, 40, 5000, 0.3, overlap, seed=2)
        assert masks.neighbour_overlap(bits) == pytest.approx(overlap, abs=0.02)
        assert masks.density(bits, 40 * 64, 5000, 64) == pytest.approx(0.3, rel=0.03)

    def test_an_overlap_that_no_chain_has_is_refused(self):
        with pytest.raises(ValueError, match=r"share=0\.9 overlap=0\.1"):
            masks.overlap_mask(1, 2, 10, 0.9, 0.1, seed=0)

    def test_video_masks_are_runs_near_the_row_and_fit_cubes_better_than_lines(self):
        grid = (4, 16, 16)
        order = query_order.resolve("cubes_2x8x8", grid)
        for chosen in (None, order):
            bits = masks.video_mask(grid, 3, 128, 0.3, seed=3, order=chosen)
            assert masks.density(bits, 1024, 1024, 128) == pytest.approx(0.3, abs=0.01)
            rows = masks.unpack(bits, 1024)
            runs = (rows[..., 1:] & ~rows[..., :-1]).sum()
            assert runs < 0.75 * 0.3 * 0.7 * rows[..., 1:].size  # what independent keys would have
            own = np.arange(1024) if chosen is None else chosen
            assert rows[:, 2, own[256:384]].mean() > 0.7

    def test_blocks_are_distinct_ascending_and_equally_many(self):
        kept = masks.block_mask(2, 7, 20, 0.3, seed=0)
        assert kept.shape == (2, 7, 6)
        assert (np.diff(kept, axis=-1) > 0).all()
        assert kept.max() < 20


class TestCases:
    def test_the_table_of_the_issue_is_covered(self):
        densities = {case.density for case in CASES if case.name.startswith("480p, density") or case.mask == "full"}
        assert [case.device_timer for case in CASES] == [False] * (len(CASES) - 1) + [True]
        assert densities == {0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.88, 1.0}
        assert {case.overlap for case in CASES if case.query_block == 64} == {0.3, 0.6, 0.8}
        assert {case.mask for case in CASES} == {"random", "full", "uneven", "overlap", "video", "file"}
        assert any(case.head_dim == 64 and set(case.bars) == set(OURS) for case in CASES)
        assert any(case.num_keys == 75600 for case in CASES)
        assert any(case.dtype == "float16" for case in CASES)
        assert any(case.order for case in CASES)
        assert any(case.num_kv_heads < case.num_heads for case in CASES)

    def test_every_contestant_has_a_peer_and_every_bar_can_be_decided(self):
        known = {name for names in run.PEERS.values() for name in names}
        by_name = {case.name: case for case in CASES}
        assert len(by_name) == len(CASES)
        for case in CASES:
            assert set(case.contestants) <= known
            assert set(case.bars) <= set(OURS) & set(case.contestants)
            for bar in [bar for bars in case.bars.values() for bar in (bars.must, bars.stretch)]:
                if bar is not None and bar.against:
                    assert set(bar.against) & set(by_name[bar.case or case.name].contestants)

    def test_names_select_and_wrong_ones_are_refused(self):
        assert [case.name for case in cases_of(quick=False, names=(EVEN,))] == [EVEN]
        assert {case.density for case in cases_of(quick=True)} == {0.1, 0.3, 0.5, 1.0}
        with pytest.raises(ValueError, match=r"'480p, density 0\.31'"):
            cases_of(quick=False, names=("480p, density 0.31",))

    def test_heads_come_in_groups_of_key_heads(self):
        with pytest.raises(ValueError, match="num_heads=8 and num_kv_heads=12 in 'wrong'"):
            GpuCase("wrong", num_heads=8)

    def test_a_case_survives_the_way_to_a_worker(self):
        files = inputs.CaseFiles(Path("x"), {"bits": "x/bits.npy"}, 0.3, (0, 5))
        case = next(case for case in CASES if case.grid is not None)
        name, got, got_files = protocol.read_prepare(
            protocol.decode(protocol.encode(protocol.prepare_message("cuda", case, files)))
        )
        assert (name, got_files) == ("cuda", files)
        assert got == dataclasses.replace(case, bars={})


class TestInputs:
    def test_the_oracle_of_a_case_is_plain_attention(self, tmp_path):
        case = dataclasses.replace(SMALL, contestants=("xla", "cudnn", "fa4_128x64"))
        files = inputs.make_files(case, tmp_path)
        assert files.queries[-1] == 299
        query, key, value = (inputs._load_values(files, n).astype(np.float64) for n in ("query", "key", "value"))
        for name in case.contestants:
            output, lse = inputs.expected(case, files, name)
            queries = inputs.checked_queries(case, files, name)
            assert (queries[-1] == 299) == (name != "fa4_128x64")
            for head, place in ((0, 0), (3, len(queries) - 1)):
                row = np.ones(333, bool)
                if name == "xla":
                    row = masks.unpack(files.load("bits"), 333)[head, queries[place] // 64]
                if name == "fa4_128x64":
                    blocks = files.load(f"blocks_{name}")[head, queries[place] // 128]
                    row = np.isin(np.arange(333) // 64, blocks)
                scores = key[row, head // 2] @ query[queries[place], head] * case.scale
                weights = np.exp(scores)
                np.testing.assert_allclose(output[place, head], weights @ value[row, head // 2] / weights.sum(), 1e-9)
                np.testing.assert_allclose(lse[head, place], np.log(weights.sum()), 1e-9)

    def test_cases_of_one_shape_share_query_key_and_value(self, tmp_path):
        first = inputs.make_files(SMALL, tmp_path, part="0")
        second = inputs.make_files(dataclasses.replace(SMALL, name="other"), tmp_path, part="1")
        assert first.arrays["query"] == second.arrays["query"]
        assert first.arrays["bits"] != second.arrays["bits"]
        assert not np.array_equal(first.load("bits"), second.load("bits"))

    def test_masks_from_a_file(self, tmp_path):
        case = dataclasses.replace(SMALL, mask="file", layer=1)
        bits = np.stack([masks.random_mask(4, 5, 333, 0.2, seed)[None] for seed in range(2)])
        order = np.stack([np.roll(np.arange(300, dtype=np.int32), layer)[None, None] for layer in range(2)])
        mask = public_masks.SliceMask(bits, order, query_block=64, num_keys=333, num_queries=300)
        public_masks.save_mask(tmp_path / "masks.safetensors", mask)
        got, got_order = inputs.make_bits(case, tmp_path / "masks.safetensors")
        np.testing.assert_array_equal(got, bits[1, 0])
        np.testing.assert_array_equal(got_order, order[1, 0, 0])
        with pytest.raises(ValueError, match="heads=7"):
            inputs.make_bits(dataclasses.replace(case, num_heads=7), tmp_path / "masks.safetensors")
        with pytest.raises(ValueError, match="--dit-masks"):
            inputs.make_bits(case, None)


def _row(implementation: str, case: str, rate: float, density: float = 0.3, mask: str = "random", **more) -> dict:
    main = next(case for case in CASES if case.name == EVEN)
    facts = {"queries": main.num_queries, "keys": main.num_keys, "heads": 12, "kv_heads": 12, "head_dim": 128}
    facts |= {"query_block": 128, "dtype": "bfloat16", "plan_ms": None, "device_ms": None, "status": "timed"}
    row = {
        "bench": "gpu_attention",
        "implementation": implementation,
        "case": case,
        "density": density,
        "mask": mask,
        "note": None,
    }
    return row | facts | {"tflops": rate, "ms": main.flops(density) / rate / 1e9} | more


class TestSummary:
    def test_a_bar_needs_both_its_rate_and_its_ratio(self):
        bar = Bar(tflops=640, factor=1.22, against=FLASHINFER)
        slow, fast = _row("flashinfer_fused", EVEN, 500), _row("flashinfer_launches", EVEN, 530)
        assert summary.met(bar, [_row("cuda", EVEN, 650), slow, fast], EVEN, "cuda") is True
        assert summary.met(bar, [_row("cuda", EVEN, 641), slow, fast], EVEN, "cuda") is False  # 1.21x the better one
        assert summary.met(bar, [_row("cuda", EVEN, 630), slow], EVEN, "cuda") is False
        assert summary.met(bar, [_row("cuda", EVEN, 650)], EVEN, "cuda") is None
        assert summary.met(bar, [_row("cuda", EVEN, 630)], EVEN, "cuda") is False  # whatever the peer would give
        assert summary.met(None, [_row("cuda", EVEN, 650)], EVEN, "cuda") is None

    def test_a_bar_against_ourselves_looks_at_the_other_case(self):
        uneven = next(case for case in CASES if case.mask == "uneven")
        rows = [_row("cuda", EVEN, 650), _row("pallas", EVEN, 900), _row("cuda", uneven.name, 620, mask="uneven")]
        bars = uneven.bars["cuda"]
        assert summary.met(bars.must, rows, uneven.name, "cuda") is True
        assert summary.met(bars.stretch, rows, uneven.name, "cuda") is False

    def test_break_even_lies_where_the_lines_cross(self):
        assert summary.break_even([(0.5, 5.0), (0.8, 8.0), (1.0, 10.0)], dense_ms=9.0) == pytest.approx(0.9)
        assert summary.break_even([(0.5, 5.0), (1.0, 10.0)], dense_ms=11.0) == 1.0
        assert summary.break_even([(0.5, 5.0), (1.0, 10.0)], dense_ms=4.0) == 0.0
        assert summary.break_even([(0.5, 5.0)], dense_ms=4.0) is None

    def test_linearity_is_the_least_squares_line(self):
        line = summary.linearity([(0.1, 1.3), (0.5, 5.3), (1.0, 10.3)])
        assert line.fixed_ms == pytest.approx(0.3)
        assert line.full_ms == pytest.approx(10.0)
        assert line.r2 == pytest.approx(1.0)
        # By hand: the line through (0, 0), (1, 1), (2, 1) is 1/6 + x/2; what is left is 1/6, the spread 2/3.
        assert summary.linearity([(0.0, 0.0), (1.0, 1.0), (2.0, 1.0)]).r2 == pytest.approx(0.75)
        assert summary.linearity([(0.1, 1.0), (0.2, 2.0)]) is None

    def test_only_even_masks_of_the_main_shape_are_on_the_line(self):
        rows = [
            _row("cuda", EVEN, 600),
            _row("cuda", "480p, full", 600, density=1.0, mask="full"),
            _row("cuda", "uneven", 600, mask="uneven"),
            _row("cuda", "H=64", 600, head_dim=64),
            _row("fa3", "480p, full", 600, density=1.0, mask="full"),
        ]
        assert [density for density, _ in summary.even_points(rows, "cuda")] == [0.3, 1.0]

    def test_the_text_holds_the_verdicts(self):
        rows = [
            _row("cuda", EVEN, 660, plan_ms=0.02),
            _row("flashinfer_fused", EVEN, 520, plan_ms=2.5, device_ms=9.0),
            _row("fa3", EVEN, 700, density=1.0),
            _row("cuda", "480p, full", 650, density=1.0, mask="full"),
            _row("fa3", "480p, full", 700, density=1.0, mask="full"),
            _row("cuda", "480p, density 0.1", 600, density=0.1),
            _row("fa4", "480p, full", 1, 1.0, "full", ms=None, tflops=None, status="missing", note="no cutlass"),
        ]
        text = summary.summarise(rows, CASES[:4])
        cells = {line.split("  ")[0]: re.split(r"  +", line) for line in text.splitlines()}
        assert cells[EVEN][2:5] == ["660", "520 flashinfer_fused", "1.27x"]
        assert cells[EVEN][-2:] == ["met", "NOT met"]
        assert cells["480p, full"][-2:] == ["met", "NOT met"]  # 0.93 of FA3
        assert cells["480p, density 0.1"][-2:] == ["-", "NOT met"]  # no FlashInfer there
        # Crossing of ours between 0.3 and 1 with dense of 700: linear, both points known.
        ms = {row["density"]: row["ms"] for row in rows if row["implementation"] == "cuda"}
        dense = rows[4]["ms"]
        crossing = 0.3 + 0.7 * (dense - ms[0.3]) / (ms[1.0] - ms[0.3])
        assert crossing > BREAK_EVEN_BAR
        assert f"{crossing:.3f}, must be >= 0.88: met" in text
        assert "R^2" in text
        assert "flashinfer_fused: 2.500 ms beside" in text
        assert "timers differ: 480p, density 0.3, flashinfer_fused" in text
        assert "480p, full, fa4: missing: no cutlass" in text
        assert text.count("ours: ") == 1

    def test_each_of_our_kernels_has_its_table_and_its_bars(self):
        rows = [_row("cuda", EVEN, 600), _row("pallas", EVEN, 585), _row("tokamax", EVEN, 600, density=1.0)]
        _, cuda, pallas = summary.summarise(rows, CASES[:1]).split("ours: ")
        assert cuda.startswith("cuda\n")
        assert pallas.startswith("pallas\n")
        assert re.split(r"  +", cuda.splitlines()[3])[-2:] == ["NOT met", "NOT met"]
        assert re.split(r"  +", pallas.splitlines()[3])[-2:] == ["met", "met"]

    def test_the_readme_shows_the_last_run(self, capsys):
        assert main(["--summary"]) == 0
        printed = [line for line in capsys.readouterr().out.splitlines() if line]
        readme = (Path(__file__).resolve().parents[1] / "benchmarks" / "README.md").read_text()
        shown = readme.split("### The last run")[1].split("```")[1].strip().splitlines()
        notes = [line for line in printed if ": missing: " in line or ": failed: " in line]
        assert shown == [line for line in printed if line not in notes], "paste `python -m benchmarks.gpu --summary`"

    def test_nothing_measured_is_said_and_nothing_invented(self):
        missing = [_row(name, EVEN, 1, ms=None, tflops=None, status="missing", note="none") for name in (*OURS, "fa3")]
        text = summary.summarise(missing, CASES[:1])
        assert "ours: not timed" in text
        assert "met" not in text.splitlines()[3]


def test_dense_results_are_kept_for_cases_of_the_same_arrays(tmp_path, monkeypatch):
    first = inputs.make_files(SMALL, tmp_path, part="0")
    other = inputs.make_files(dataclasses.replace(SMALL, density=0.5), tmp_path, part="1")
    before = inputs.Oracle(SMALL, first)
    dense = before.of("cudnn")
    asked = []
    monkeypatch.setattr(inputs, "expected", lambda case, files, name: asked.append(name))
    oracle = inputs.Oracle(SMALL, other, before)
    assert oracle.of("cudnn") is dense
    oracle.of("xla")
    shape = dataclasses.replace(SMALL, num_queries=200)
    inputs.Oracle(shape, inputs.make_files(shape, tmp_path), before).of("cudnn")
    assert asked == ["xla", "cudnn"]
