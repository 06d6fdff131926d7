"""What nvcc made: the wheel, the library's needs, the compile log, the machine code. `make test-cuda-build` runs it.

It looks at the installed package and not at the checkout, and needs no GPU.
"""

import ctypes
import importlib.resources
import importlib.util
import os
import re
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import gpu_ledger
import pytest

pytestmark = pytest.mark.cuda_build

PACKAGE = "fgattn_jax.xla_ffi"
LIBRARY = "fgattn_jax/xla_ffi/libfgattn_cuda.so"
NUM_KERNELS = {
    "count_rows": 1,
    "sort_rows": 1,
    # Two dtypes x two head widths x three forms (config.cuh)
    "attention_kernel": 12,
    # Two dtypes x two head widths x rows of 64 or 128 queries
    "one_pass_kernel": 8,
    "exact_mask_kernel": 8,
    "exact_mass_kernel": 8,
    # Two dtypes x two head widths
    "mean_queries_kernel": 4,
    "mean_sums_kernel": 8,  # with samples or without
    "mean_probabilities_kernel": 4,
    "mean_bits_kernel": 8,  # one mean a row, or several
    "mean_candidates_kernel": 8,  # with masses or without
    # Two dtypes
    "finish_rows_kernel": 2,
    "keep_best_kernel": 2,
    "keep_best_of_mean_kernel": 2,
    "rank_kernel": 1,
    "bands_kernel": 1,
    # float32 scores, and probabilities in 16 bits by blocks of 256 and 512 threads
    "select_kernel": 3,
    "head_floor_kernel": 1,  # of two files, each with its own under this name
}
REGISTERS_OF_AN_SM = 65536
EXPORTS = {
    "FgattnAttention",
    "FgattnWorkOrder",
    "FgattnExactMask",
    "FgattnExactMass",
    "FgattnMeanMask",
    "FgattnOnePass",
    "FgattnCheckAttention",
    "FgattnCheckWorkOrder",
    "FgattnCheckExactMask",
    "FgattnCheckExactMass",
    "FgattnCheckMeanMask",
    "FgattnCheckOnePass",
    "fgattn_abi_version",
    "fgattn_ffi_api_minor",
    "fgattn_source_hash",
    "fgattn_mask_hash",
}


def tool(name: str) -> Path:
    spec = importlib.util.find_spec("nvidia.cu13")
    folders = [Path(folder) / "bin" for folder in spec.submodule_search_locations or []] if spec else []
    found = [folder / name for folder in folders if (folder / name).is_file()]
    assert found, f"{name} is not installed: run these tests with `make test-cuda-build`"
    return found[0]


def run(*command: str | Path) -> str:
    path = f"{Path(command[0]).parent}:{os.environ['PATH']}"  # cuobjdump looks for nvdisasm
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library() -> Path:
    found = Path(str(importlib.resources.files(PACKAGE) / "libfgattn_cuda.so"))
    assert found.is_file(), f"no library at {found}: run these tests with `make test-cuda-build`"
    return found


@pytest.fixture(scope="module")
def note() -> str:
    return (importlib.resources.files(PACKAGE) / "cuda_build.txt").read_text()


@pytest.fixture(scope="module")
def wheel() -> Path:
    named = os.environ.get("FGATTN_CUDA_WHEEL")
    assert named, "FGATTN_CUDA_WHEEL names no wheel: run these tests with `make test-cuda-build`"
    return Path(named)


def functions(text: str, start: str) -> dict[str, str]:
    """Parts of a report, by the name of the kernel that stands behind `start`."""
    pieces = re.split(start + r"'?(\w+)'?", text)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


@pytest.fixture(scope="module")
def compiled(note) -> dict[str, str]:
    """ptxas's words about every kernel."""
    return functions(note, "Compiling entry function ")


@pytest.fixture(scope="module")
def attention_kernels(compiled) -> list[str]:
    return [name for name in compiled if "attention_kernel" in name or "one_pass_kernel" in name]


@pytest.fixture(scope="module")
def machine_code(library) -> dict[str, str]:
    return functions(run(tool("cuobjdump"), "-sass", library), "Function : ")


@pytest.fixture(scope="module")
def max_threads(library) -> dict[str, int]:
    """Threads per block that every kernel was compiled for."""
    sections = functions(run(tool("cuobjdump"), "-elf", library), r"\.nv\.info\.")
    found = {
        name: re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(\w+)", text) for name, text in sections.items()
    }
    return {name: int(match[1], 16) for name, match in found.items() if match}


def test_the_package_under_test_is_the_wheel_that_was_built(wheel, library):
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(LIBRARY) == library.read_bytes()


def test_the_library_adds_less_than_2_mb_to_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.getinfo(LIBRARY).compress_size < 2e6


def test_the_note_says_what_was_built_from_which_sources(note):
    first, *others = note.splitlines()
    assert first == "built"
    assert f"sources: {gpu_ledger.source_hash()}" in others
    assert any(line.startswith("nvcc: V13.0.88, sm_90a") for line in others)


def test_the_library_loads_without_a_driver_and_says_what_it_is(library):
    loaded = ctypes.CDLL(str(library))
    assert (loaded.fgattn_abi_version(), loaded.fgattn_ffi_api_minor()) == (5, 1)
    loaded.fgattn_source_hash.restype = loaded.fgattn_mask_hash.restype = ctypes.c_char_p
    assert loaded.fgattn_source_hash().decode() == gpu_ledger.source_hash()
    assert loaded.fgattn_mask_hash().decode() == gpu_ledger.mask_hash()


def test_the_library_registers_with_the_installed_jaxlib(library):
    from fgattn_jax.xla_ffi import library as adapter

    assert adapter.find_library() == library
    assert adapter.unusable_reasons() == ()
    adapter.register()


def test_the_library_needs_nothing_but_the_c_library(library):
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", run("/usr/bin/readelf", "-d", library)))
    assert needed <= {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}
    symbols = run("/usr/bin/readelf", "-W", "--dyn-syms", library)
    assert "GLIBCXX" not in symbols
    glibc = {tuple(map(int, number.split("."))) for number in re.findall(r"GLIBC_([\d.]+)", symbols)}
    assert max(glibc) <= (2, 35), "a library built on Debian 12 no longer runs on Ubuntu 22.04"


def test_the_library_shows_its_entry_points_only(library):
    rows = [line.split() for line in run("/usr/bin/readelf", "-W", "--dyn-syms", library).splitlines()]
    shown = {row[7] for row in rows if len(row) == 8 and row[4] in ("GLOBAL", "WEAK") and row[6] not in ("UND", "Ndx")}
    assert shown == EXPORTS


def test_the_library_is_for_hopper_only(library):
    assert set(re.findall(r"sm_\w+", run(tool("cuobjdump"), "--list-elf", library))) == {"sm_90a"}
    assert "ptx" not in run(tool("cuobjdump"), "--list-ptx", library).lower().replace("cuobjdump", "")


def test_every_kernel_was_compiled(compiled):
    names = {mangled: [name for name in NUM_KERNELS if f"{len(name)}{name}" in mangled] for mangled in compiled}
    assert {mangled for mangled, found in names.items() if len(found) != 1} == set()
    assert Counter(found[0] for found in names.values()) == NUM_KERNELS


def test_no_kernel_spills(compiled):
    words = {
        name: re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said)
        for name, said in compiled.items()
    }
    assert all(len(numbers) == 3 for numbers in words.values())
    assert {name: numbers for name, numbers in words.items() if set(numbers) != {"0"}} == {}


def test_ptxas_does_not_warn(note):
    # C7510 and its neighbours: wgmma instructions that were put one after the other, at half the speed and less.
    assert re.findall(r".*(?:\(C7\d+\)|[Ww]arning|Potential Performance Loss).*", note) == []


def test_attention_kernels_have_every_register_their_launch_leaves_them(compiled, attention_kernels, max_threads):
    for name in attention_kernels:
        threads = max_threads[name]
        blocks = 2 if threads <= 256 else 1
        used = int(re.search(r"Used (\d+) registers", compiled[name])[1])
        assert used == REGISTERS_OF_AN_SM // (threads * blocks) // 8 * 8, name


def test_warpgroups_share_out_no_more_registers_than_the_block_has(
    compiled, attention_kernels, machine_code, max_threads
):
    for name in attention_kernels:
        less, more = (
            {
                int(number, 16)
                for number in re.findall(rf"USETMAXREG\.{kind}\S*\s.*?(0x[0-9a-f]+)\s*;", machine_code[name])
            }
            for kind in ("DEALLOC", "TRY_ALLOC")
        )
        assert (len(less), len(more)) in ((1, 1), (2, 1)), (name, less, more)
        used = int(re.search(r"Used (\d+) registers", compiled[name])[1])
        warpgroups = max_threads[name] // 128
        # One or two warpgroups produce, the others consume. More than there is, and the launch hangs.
        assert sum(less) + (warpgroups - len(less)) * more.pop() <= warpgroups * used, name


def test_attention_kernels_multiply_and_gather_as_meant(attention_kernels, machine_code):
    for name in attention_kernels:
        code = machine_code[name]
        assert "HGMMA" in code, f"{name}: no tensor core instructions"
        copies = re.findall(r"LDGSTS\.\S+", code)
        assert any(copy.endswith(".128") for copy in copies), f"{name}: no copies of 16 bytes"
        assert "HMMA" not in code


def test_attention_kernels_touch_no_local_memory(attention_kernels, machine_code):
    found = {name: re.findall(r"\b(?:LDL|STL)\b", machine_code[name]) for name in attention_kernels}
    assert {name: len(hits) for name, hits in found.items() if hits} == {}


CHECK = """
import ctypes, sys
import jax, jax.numpy as jnp, numpy as np

library = ctypes.CDLL(sys.argv[1])
jax.ffi.register_ffi_target("check_attention", jax.ffi.pycapsule(library.FgattnCheckAttention), platform="cpu")

B, T, S, N, H, M, R, W = 2, 150, 70, 4, 64, 64, 3, 4
results = [((B, T, N, H), jnp.bfloat16), ((B, N, T), jnp.float32), ((4 + 4 * B * N * R,), jnp.int32)]
results = [jax.ShapeDtypeStruct(*result) for result in results]
query, key = jnp.zeros((B, T, N, H), jnp.bfloat16), jnp.zeros((B, S, N, H), jnp.bfloat16)
work_order = jnp.zeros((B, N, R, 2), jnp.int32)

def check(words):
    run = jax.ffi.ffi_call("check_attention", results)
    bits = jnp.zeros((B, N, R, words), jnp.uint32)
    jax.block_until_ready(run(query, key, key, bits, work_order, scale=np.float32(0.125), query_block=np.int32(M)))

check(W)
print("accepted")
try:
    check(W + 4)
except Exception as error:
    print("refused:", error)
"""


def test_the_handler_in_the_library_checks_its_arguments(library, run_python):
    # A process of its own: XLA takes a platform's targets once.
    said = run_python(CHECK.replace("sys.argv[1]", repr(str(library))))
    assert said.startswith("accepted\nrefused: ")
    assert re.search(r"`bits` U32\[.*W=4\], got U32\[2, 4, 3, 8\]", said), said
