"""Faults put into a copy of the CUDA kernel, each of which the emulation must notice (docs/notes/cuda_emulation.md)."""

import dataclasses
import re

import numpy as np
import pytest
from cuda_emulation.calls import assert_right, make_call, random_rows, run
from cuda_emulation.emulator import KERNELS, EmulationError, Emulator, build_changed, changed

KERNEL, PIPELINE, CONFIG, LAUNCH = "attention_kernel.cuh", "pipeline.cuh", "config.cuh", "attention.cu"
# bfloat16 and heads of 64 alone: a third of the time to compile.
NARROW = [
    ("launch_widths<__nv_bfloat16>(args", "launch_forms<__nv_bfloat16, 64>(args"),
    ("launch_widths<__half>(args, num_sms, stream);", "cudaErrorEmulation;"),
]
WRONG = None  # the fault breaks no rule: a result differs from the oracle's

# Name: file, what stands there, what the copy has instead, and the emulation's words.
FAULTS = {
    "tiles are overwritten while products read them": (
        KERNEL,
        "      ptx::barrier_wait(barriers.tile_empty + 8 * stage.slot(), stage.phase() ^ 1);\n",
        "",
        r"overwrites shared address \d+, which warp|two copies are on their way to shared address \d+",
    ),
    "tiles are let go before the wait for their products": (
        KERNEL,
        "      wgmma_wait<0>();\n      release_tiles(stage.slot());\n",
        "      release_tiles(stage.slot());\n      wgmma_wait<0>();\n",
        r"overwrites shared address \d+, which warp \d+ reads, without knowing that it is over",
    ),
    "queries are overwritten before they are read": (
        KERNEL,
        "    ptx::barrier_wait(barriers.query_empty, query_phase ^ 1);\n",
        "",
        r"overwrites shared address \d+, which|two copies are on their way to shared address \d+",
    ),
    "queries are read before they have landed": (
        KERNEL,
        "      ptx::barrier_wait(barriers.query_full, query_phase);\n",
        "",
        r"a load reads shared address \d+|overwrites shared address \d+, which warp",
    ),
    "a stage is full before its copies have landed": (
        KERNEL,
        "ptx::copy_async_arrive(barriers.tile_full + 8 * stage.slot());",
        "ptx::barrier_arrive(barriers.tile_full + 8 * stage.slot());",
        r"a product reads shared address \d+ (while a copy to it is on its way|without knowing that thread)",
    ),
    "no proxy fence between copies and products": (
        KERNEL,
        "stage.phase());\n    ptx::fence_async_proxy();\n  };\n  auto wait_tiles",
        "stage.phase());\n  };\n  auto wait_tiles",
        "a product without fence.proxy.async since the wait for copies",
    ),
    "the first wait has the wrong parity": (
        KERNEL,
        "ptx::barrier_wait(barriers.tile_empty + 8 * stage.slot(), stage.phase() ^ 1);",
        "ptx::barrier_wait(barriers.tile_empty + 8 * stage.slot(), stage.phase());",
        r"deadlock: block \d cannot go on",
    ),
    "weights are packed while the last product reads them": (
        KERNEL,
        "        wgmma_wait<0>();\n        vote(softmax.add_up(scores));\n",
        "        vote(softmax.add_up(scores));\n",
        "the A operand's registers were written while the product runs",
    ),
    "outputs are rescaled while a product adds to them": (
        KERNEL,
        "        weights_by_value(here);\n        look_ahead();\n",
        "        weights_by_value(here);\n        output[0] *= 0.5f;\n        look_ahead();\n",
        "an accumulator was written while a product runs",
    ),
    "a warp too many is waited for": (
        PIPELINE,
        "init(voted + 8 * i, 4)",
        "init(voted + 8 * i, 5)",
        r"deadlock: block \d cannot go on",
    ),
    "a score far above the reference goes unnoticed": (
        KERNEL,
        "if (!good) shared.too_high",
        "if (false) shared.too_high",
        WRONG,
    ),
    "queries are let go before other lanes have read them": (
        KERNEL,
        "    __syncwarp();\n  };\n  // S = Q K^T",
        "  };\n  // S = Q K^T",
        r"overwrites shared address \d+, which|a load reads shared address \d+",
    ),
    "lane 0 lets an item go before other lanes have looked": (
        PIPELINE,
        "(&shared.items[stage.slot()]));\n  __syncwarp();\n",
        "(&shared.items[stage.slot()]));\n",
        r"deadlock: block \d cannot go on",
    ),
    "lane 0 announces a list before other lanes have filled it": (
        "decode.cuh",
        "      __syncwarp();\n      if constexpr (kPaired) {",
        "      if constexpr (kPaired) {",
        "reads what no row keeps",
    ),
    "a decoder announces a list that the phase before is not over for": (
        "decode.cuh",
        "      open(tile_end_);  // also without a key in it: else this arrival could come in the phase before\n",
        "",
        r"deadlock: block \d cannot go on|reads what no row keeps",
    ),
    "more registers than there are": (
        CONFIG,
        "kPaired ? 208 : 184",
        "kPaired ? 208 : 216",
        "registers that others have to give",
    ),
    "lists are not zeroed, and a work order asks for too many keys": (
        KERNEL,
        "lists[i] = 0;",
        "(void)lists;",
        "outside of every array",
    ),
    "one place too few for kept bits": (CONFIG, "kKeyLists + kStages + 2 : 1", "kKeyLists + kStages - 2 : 1", WRONG),
    "one column of padding too few": (KERNEL, ": column >= padding;", ": column >= padding - 1;", WRONG),
    "the second row of a pair is lost": (
        KERNEL,
        "if (work.row + 1 < args.num_rows) params_.workspace.leave(head * args.num_rows + work.row + 1);",
        "",
        WRONG,
    ),
}


def run_calls(emulator: Emulator) -> None:
    """Calls in which every fault above shows itself."""
    for query_block in (128, 64):
        rows = np.concatenate(
            [random_rows(6, 900, 0.6, overlap=0.8), random_rows(8, 900, 0.02), random_rows(2, 900, 0.5)]
        )
        rows[:, :50] = False
        call = make_call(rows, query_block, missing=9)
        for seed in range(6):
            assert_right(call, run(emulator, call, seed=seed, num_sms=1 + seed % 2))
        rising = dataclasses.replace(call, query=np.ones_like(call.query))
        rising.key[:] = np.linspace(-8, 8, 900)[None, :, None, None].astype(call.key.dtype)
        assert_right(rising, run(emulator, rising), loose=2e-3)
    many_tiles = make_call(random_rows(6, 2400, 0.7, overlap=0.8), 64)
    for seed in range(12):
        assert_right(many_tiles, run(emulator, many_tiles, seed=seed, num_sms=1 + seed % 2))
    few = make_call(random_rows(1, 300, 0.01), 128)
    run(emulator, few, strict=False, work_order=np.array([[[[0, 300]]]], np.int32))


def build_narrow(folder, emulation_library, **changes) -> Emulator:
    return Emulator(build_changed(folder, {LAUNCH: NARROW} | changes, emulation_library.parent))


def test_the_texts_that_faults_replace_stand_in_the_sources():
    for file, *texts in [*(fault[:3] for fault in FAULTS.values()), *((LAUNCH, *texts) for texts in NARROW)]:
        changed((KERNELS / file).read_text(), [tuple(texts)])


@pytest.mark.slow
def test_no_fault(tmp_path, emulation_library):
    run_calls(build_narrow(tmp_path, emulation_library))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_noticed(tmp_path, emulation_library, name):
    file, right, wrong, words = FAULTS[name]
    emulator = build_narrow(tmp_path, emulation_library, **{file: [(right, wrong)]})
    with pytest.raises(AssertionError if words is WRONG else EmulationError) as noticed:
        run_calls(emulator)
    assert words is WRONG or re.search(words, str(noticed.value))
