"""Builds the CUDA kernels for the CPU and runs them there, thread by thread (docs/notes/cuda_emulation.md)."""

import ctypes
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "xla_ffi" / "csrc"
# Taken from here instead: what stands in for instructions of the device.
REPLACED = ("ptx.cuh", "wgmma.cuh")
DTYPES = {"bfloat16": 0, "float16": 1}


def translate(source: str) -> str:
    """The two spellings that only nvcc reads, in C++: a launch, and shared memory sized by the launch."""
    source = re.sub(r"(\w+)<<<(.*?)>>>\(", r"::emulation::Launch(\2)(\1, ", source, flags=re.DOTALL)
    shared = r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+|alignas\(\d+\)\s+)?(\w+)\s+(\w+)\[\];"
    return re.sub(shared, r"\1* \2 = reinterpret_cast<\1*>(::emulation::dynamic_shared());", source)


def changed(source: str, changes: Sequence[tuple[str, str]]) -> str:
    """`source` with each first text, which must stand there once, replaced by the second."""
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(f"expected once in the kernels' source, found {source.count(old)} times: {old!r}")
        source = source.replace(old, new)
    return source


def build(folder: Path, changes: Mapping[str, Sequence[tuple[str, str]]] | None = None) -> Path:
    """Compiles the kernels in `folder`.

    Args:
        folder: An empty folder.
        changes: By file name, what to replace in the kernels' sources (`changed`).

    Returns:
        The library.

    Raises:
        ValueError: If a text to replace does not stand in the sources exactly once.
        RuntimeError: If g++ is missing or refuses, with its words.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError(
            "the CUDA kernels' emulation needs g++ (Debian, Ubuntu: apt-get install g++); none was found"
        )
    changes = changes or {}
    for path in KERNELS.iterdir():
        if path.suffix in {".h", ".cuh", ".cu"} and path.name not in REPLACED:
            (folder / path.name).write_text(translate(changed(path.read_text(), changes.get(path.name, ()))))
    for name in REPLACED:
        shutil.copy(HERE / name, folder / name)
    library = folder / "libemulation.so"
    sources = [HERE / name for name in ("driver.cc", "threads.cc", "memory.cc", "products.cc")]
    for kernel in ("attention.cu", "work_order.cu"):
        sources.append((folder / kernel).with_suffix(".cc"))
        sources[-1].write_text(f'#include "{kernel}"\n')
    command = [compiler, "-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fPIC"]
    command += ["-shared", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused"]
    command += [f"-I{folder}", f"-I{HERE / 'include'}", f"-I{HERE}", *map(str, sources), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return library


def build_once(folder: Path, *, timeout: float = 240.0) -> Path:
    """`build` in `folder` by the first process that asks; others wait for the library at most `timeout` seconds."""
    library, words = folder / "emulation.so", folder / "refused.txt"
    try:
        folder.mkdir()
    except FileExistsError:
        limit = time.monotonic() + timeout
        while not library.exists():
            if words.exists():
                raise RuntimeError(words.read_text()) from None
            if time.monotonic() > limit:
                raise RuntimeError(f"no library in {folder} within timeout={timeout:g} s: see its builder") from None
            time.sleep(0.2)
        return library
    try:
        build(folder).rename(library)  # at once: nobody loads half of it
    except Exception as error:
        (folder / "words").write_text(str(error))
        (folder / "words").rename(words)
        raise
    return library


class _TokenStrides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "token", "head")]


class _MaskStrides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head")]


class AttentionArgs(ctypes.Structure):
    """`fgattn::AttentionArgs` of launch.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "bits", "work_order", "query_order")),
        *((name, ctypes.c_void_p) for name in ("output", "lse", "workspace")),
        *((f"{name}_strides", _TokenStrides) for name in ("query", "key", "value", "output")),
        *((f"{name}_strides", _MaskStrides) for name in ("bits", "work_order", "query_order")),
        *((name, ctypes.c_int32) for name in ("batch", "num_queries", "num_keys", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int32) for name in ("head_dim", "query_block", "num_rows", "num_words")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    ]


class _WorkOrderArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bits", "work_order")),
        *((name, ctypes.c_int32) for name in ("num_masks", "num_rows", "num_words", "num_keys")),
    ]


class _Region(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("bytes", ctypes.c_int64), ("readable", ctypes.c_void_p)]


class EmulationError(Exception):
    """A rule was broken, or nothing could go on."""


class Forward(NamedTuple):
    """Results of one call.

    Args:
        output: `[B, T, N, H]` in the inputs' dtype.
        lse: Float32 `[B, N, T]`.
        rows_left: How many rows the pairs' kernel left to the one for single rows, repetitions included.
    """

    output: np.ndarray
    lse: np.ndarray
    rows_left: int


GUARD = 4096  # elements in front of and behind every result: nothing may be written there


def _guarded(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """A result full of NaN (or -1) between guards, and all of that memory."""
    size = int(np.prod(shape))
    whole = np.full((size + 2 * GUARD) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype)
    return whole[GUARD : GUARD + size].reshape(shape), whole


def _check_guards(name: str, whole: np.ndarray) -> None:
    raw, edge = whole.view(np.uint8), GUARD * whole.dtype.itemsize
    if (raw[:edge] != 0xFF).any() or (raw[-edge:] != 0xFF).any():
        raise EmulationError(f"the kernel wrote outside of `{name}`")


def _strides(array: np.ndarray, axes: Sequence[int]) -> list[int]:
    steps = [array.strides[axis] // array.itemsize for axis in axes]
    return [0 if array.shape[axis] == 1 else step for axis, step in zip(axes, steps, strict=True)]


def _extent(array: np.ndarray) -> int:
    """Bytes from the first element to behind the last one, gaps included."""
    return array.itemsize + sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True))


class Emulator:
    """The compiled kernels.

    Args:
        library: What `build` returned.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_attention.restype = ctypes.c_char_p
        self._library.emulation_work_order.restype = ctypes.c_char_p
        theirs, ours = self._library.emulation_attention_args_bytes(), ctypes.sizeof(AttentionArgs)
        if theirs != ours:
            raise RuntimeError(f"`AttentionArgs` here does not follow launch.h: {ours} bytes, expected {theirs}")

    def _call(self, function: Any, args: ctypes.Structure, regions: Mapping[str, Any], seed: int, *rest: Any) -> None:
        table = (_Region * len(regions))()
        for region, (array, readable) in zip(table, regions.values(), strict=True):
            region.base, region.bytes = array.ctypes.data, _extent(array)
            region.readable = None if readable is None else readable.ctypes.data
        refused = function(ctypes.byref(args), table, len(regions), ctypes.c_uint64(seed), *rest)
        if refused is not None:
            raise EmulationError(refused.decode())

    def work_order(self, bits: np.ndarray, *, num_keys: int, seed: int = 0) -> np.ndarray:
        """Int32 `[B, N, R, 2]` of `bits` `[B, N, R, W]`, as the kernels of work_order.cu make it."""
        bits = np.ascontiguousarray(bits)
        order, whole = _guarded((*bits.shape[:3], 2), np.int32)
        args = _WorkOrderArgs(
            bits.ctypes.data, order.ctypes.data, bits.shape[0] * bits.shape[1], bits.shape[2], bits.shape[3], num_keys
        )
        self._call(self._library.emulation_work_order, args, {"bits": (bits, None)}, seed)
        _check_guards("work_order", whole)
        return order

    def forward(
        self,
        query: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        bits: np.ndarray,
        query_order: np.ndarray | None,
        work_order: np.ndarray,
        *,
        scale: float,
        query_block: int,
        num_sms: int = 1,
        seed: int = 0,
        readable: np.ndarray | None = None,
    ) -> Forward:
        """Runs the attention kernel.

        Args:
            query: `[B, T, N, H]`, bfloat16 or float16, any strides with H contiguous.
            key: `[B, S, K, H]`.
            value: `[B, S, K, H]`.
            bits: uint32 `[B|1, N|1, R, W]`.
            query_order: int32 `[B|1, N|1, T]` or None.
            work_order: int32 `[B|1, N|1, R, 2]`.
            scale: Factor of the scores.
            query_block: 64 or 128.
            num_sms: Of the emulated device; at most three blocks run at the same time.
            seed: Order in which everything happens.
            readable: Boolean `[B, S, K]`: which lines of `key` and `value` may be read (contiguous arrays only).

        Raises:
            EmulationError: If the kernel broke a rule, cannot go on, or wrote outside of its results.
        """
        batch, num_queries, num_heads, head_dim = query.shape
        output, whole_output = _guarded(query.shape, query.dtype)
        lse, whole_lse = _guarded((batch, num_heads, num_queries), np.float32)
        workspace, whole_workspace = _guarded((4 + 4 * batch * num_heads * bits.shape[2],), np.int32)
        args = AttentionArgs(
            *(array.ctypes.data for array in (query, key, value, bits, work_order)),
            None if query_order is None else query_order.ctypes.data,
            *(array.ctypes.data for array in (output, lse, workspace)),
            *(_TokenStrides(*(step // array.itemsize for step in array.strides[:3]))
              for array in (query, key, value, output)),
            *(_MaskStrides(*([0, 0] if array is None else _strides(array, (0, 1))))
              for array in (bits, work_order, query_order)),
            batch, num_queries, key.shape[1], num_heads, key.shape[2], head_dim,
            query_block, bits.shape[2], bits.shape[3], scale, DTYPES[str(query.dtype)],
        )  # fmt: skip
        lines = None
        if readable is not None:
            lines = np.ascontiguousarray(np.repeat(readable, head_dim * 2 // 16, axis=-1)).astype(np.uint8)
        regions = {"query": (query, None), "key": (key, lines), "value": (value, lines)}
        regions |= {"bits": (bits, None), "work_order": (work_order, None), "workspace": (workspace, None)}
        if query_order is not None:
            regions["query_order"] = (query_order, None)
        self._call(self._library.emulation_attention, args, regions, seed, num_sms)
        for name, whole in (("output", whole_output), ("lse", whole_lse), ("workspace", whole_workspace)):
            _check_guards(name, whole)
        return Forward(output, lse, int(workspace[1]))
