"""Builds the CUDA kernels for the CPU and runs them there, thread by thread (docs/notes/cuda_emulation.md)."""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "xla_ffi" / "csrc"
# Taken from here instead: what stands in for instructions of the device.
REPLACED = ("ptx.cuh", "wgmma.cuh", "masks/carry.cuh")
OWN = tuple(HERE / name for name in ("driver.cc", "threads.cc", "memory.cc", "products.cc"))
MASK_FILES = tuple(f"masks/{name}.cu" for name in ("exact_mask", "exact_mass", "mean_mask", "one_pass"))
# Those that take longest come first.
KERNEL_FILES = ("attention.cu", *MASK_FILES, "work_order.cu")
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
    """Compiles the kernels in `folder`, as many files at a time as there are cores.

    Args:
        folder: An empty folder.
        changes: By file name, what to replace in the kernels' sources (`changed`).

    Returns:
        The library.

    Raises:
        ValueError: If a text to replace does not stand in the sources exactly once.
        RuntimeError: If g++ is missing or refuses, with its words.
    """
    _write_sources(folder, changes or {})
    sources = [*OWN, *(folder / f"{Path(kernel).stem}.cc" for kernel in KERNEL_FILES)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, folder), sources))
    return _link(objects, folder)


def build_changed(folder: Path, changes: Mapping[str, Sequence[tuple[str, str]]], unchanged: Path) -> Path:
    """`build` of a library whose attention kernel alone has `changes`.

    Args:
        folder: An empty folder.
        changes: See `build`.
        unchanged: Where `build` has compiled the kernels as they are: all other objects are taken from there.

    Returns:
        The library.

    Raises:
        ValueError: See `build`.
        RuntimeError: See `build`.
    """
    _write_sources(folder, changes)
    # First: of functions that several objects hold, the linker takes the first.
    attention = _compile(folder / "attention.cc", folder)
    others = sorted(path for path in unchanged.glob("*.o") if path.name != attention.name)
    return _link([attention, *others], folder)


def _write_sources(folder: Path, changes: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    (folder / "masks").mkdir()
    for path in (*KERNELS.iterdir(), *(KERNELS / "masks").iterdir()):
        if path.suffix in {".h", ".cuh", ".cu"} and path.name not in REPLACED:
            text = translate(changed(path.read_text(), changes.get(path.name, ())))
            (folder / path.relative_to(KERNELS)).write_text(text)
    for name in REPLACED:
        shutil.copy(HERE / name, folder / name)
    for kernel in KERNEL_FILES:
        (folder / f"{Path(kernel).stem}.cc").write_text(f'#include "{kernel}"\n')


def _compile(source: Path, folder: Path) -> Path:
    made = folder / f"{source.stem}.o"
    flags = ["-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fPIC"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused", f"-I{folder}", f"-I{HERE / 'include'}", f"-I{HERE}"]
    _run_compiler(*flags, "-c", str(source), "-o", str(made))
    return made


def _link(objects: Sequence[Path], folder: Path) -> Path:
    library = folder / "libemulation.so"
    _run_compiler("-shared", *map(str, objects), "-o", str(library))
    return library


def _run_compiler(*arguments: str) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError(
            "the CUDA kernels' emulation needs g++ (Debian, Ubuntu: apt-get install g++); none was found"
        )
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join([compiler, *arguments])}\n{done.stderr}")


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


class ScoreArgs(ctypes.Structure):
    """`fgattn::ScoreArgs` of masks/mask_launch.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "lse", "scale", "query_order")),
        *((f"{name}_strides", _TokenStrides) for name in ("query", "key")),
        ("query_order_strides", _MaskStrides),
        *((name, ctypes.c_int32) for name in ("batch", "num_queries", "num_keys", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int32) for name in ("head_dim", "query_block", "num_rows", "num_words")),
        ("dtype", ctypes.c_int32),
    ]


class ExactMaskArgs(ctypes.Structure):
    """`fgattn::ExactMaskArgs`."""

    _fields_ = [
        ("scores", ScoreArgs),
        *((name, ctypes.c_void_p) for name in ("log_threshold", "bits", "counts")),
        ("keep_best", ctypes.c_bool),
    ]


class SelectRule(ctypes.Structure):
    """`fgattn::SelectRule`."""

    _fields_ = [
        ("rule", ctypes.c_int32),
        ("value", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("top_k", "min_keys", "max_keys")),
        ("head_floor", ctypes.c_float),
    ]


class ExactMassArgs(ctypes.Structure):
    """`fgattn::ExactMassArgs`."""

    _fields_ = [
        ("scores", ScoreArgs),
        ("rule", SelectRule),
        *((name, ctypes.c_void_p) for name in ("bits", "counts", "workspace")),
        ("workspace_heads", ctypes.c_int32),
    ]


class MeanMaskArgs(ctypes.Structure):
    """`fgattn::MeanMaskArgs`."""

    _fields_ = [
        ("scores", ScoreArgs),
        ("num_means", ctypes.c_int32),
        ("ranks", ctypes.c_bool),
        ("log_threshold", ctypes.c_void_p),
        ("keep_best", ctypes.c_bool),
        ("rule", SelectRule),
        *((name, ctypes.c_void_p) for name in ("bits", "counts", "workspace")),
        ("workspace_heads", ctypes.c_int32),
    ]


class OnePassArgs(ctypes.Structure):
    """`fgattn::OnePassArgs` of masks/one_pass_launch.h."""

    _fields_ = [
        ("attention", AttentionArgs),
        *((name, ctypes.c_void_p) for name in ("last_lse", "log_threshold", "bits", "counts")),
        ("keep_best", ctypes.c_bool),
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


class OnePass(NamedTuple):
    """Results of dense attention that finds a mask.

    Args:
        bits: uint32 `[B, N, R, W]`.
        counts: int32 `[B, N, R]`.
        output: `[B, T, N, H]` in the inputs' dtype.
        lse: Float32 `[B, N, T]`.
    """

    bits: np.ndarray
    counts: np.ndarray
    output: np.ndarray
    lse: np.ndarray


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


class _Scores:
    """What calls of kernels that score whole rows have in common; it keeps the arrays alive."""

    def __init__(self, query, key, lse, query_order, scale: float, query_block: int) -> None:
        batch, num_queries, num_heads, head_dim = query.shape
        num_keys, num_rows = key.shape[1], -(-num_queries // query_block)
        num_words = 4 * -(-num_keys // 128)
        self._kept = lse, factor = np.ascontiguousarray(lse), np.array([scale], np.float32)
        self._shape = (batch, num_heads, num_rows, num_words)
        self.args = ScoreArgs(
            *(array.ctypes.data for array in (query, key, lse, factor)),
            None if query_order is None else query_order.ctypes.data,
            *(_TokenStrides(*(step // array.itemsize for step in array.strides[:3])) for array in (query, key)),
            _MaskStrides(*([0, 0] if query_order is None else _strides(query_order, (0, 1)))),
            *(batch, num_queries, num_keys, num_heads, key.shape[2], head_dim, query_block, num_rows, num_words),
            DTYPES[str(query.dtype)],
        )  # fmt: skip
        self.regions = {"query": (query, None), "key": (key, None), "lse": (lse, None), "scale": (factor, None)}
        if query_order is not None:
            self.regions["query_order"] = (query_order, None)

    def results(self) -> tuple[np.ndarray, np.ndarray, Callable[[], None]]:
        bits, whole_bits = _guarded(self._shape, np.uint32)
        counts, whole_counts = _guarded(self._shape[:3], np.int32)

        def check() -> None:
            _check_guards("bits", whole_bits)
            _check_guards("counts", whole_counts)

        return bits, counts, check


class Emulator:
    """The compiled kernels.

    Args:
        library: What `build` returned.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_attention.restype = ctypes.c_char_p
        self._library.emulation_work_order.restype = ctypes.c_char_p
        self._library.emulation_exact_mask.restype = ctypes.c_char_p
        self._library.emulation_exact_mass.restype = ctypes.c_char_p
        self._library.emulation_mean_mask.restype = ctypes.c_char_p
        self._library.emulation_one_pass.restype = ctypes.c_char_p
        kinds = {"attention": AttentionArgs, "exact_mask": ExactMaskArgs, "exact_mass": ExactMassArgs}
        kinds |= {"mean_mask": MeanMaskArgs, "one_pass": OnePassArgs}
        for name, kind in kinds.items():
            theirs, ours = getattr(self._library, f"emulation_{name}_args_bytes")(), ctypes.sizeof(kind)
            if theirs != ours:
                raise RuntimeError(
                    f"`{kind.__name__}` here does not follow the header: {ours} bytes, expected {theirs}"
                )

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

    def exact_mask(
        self,
        query: np.ndarray,
        key: np.ndarray,
        lse: np.ndarray,
        log_threshold: np.ndarray,
        query_order: np.ndarray | None,
        *,
        scale: float,
        query_block: int,
        keep_best: bool = False,
        num_sms: int = 1,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bits uint32 `[B, N, R, W]` and counts int32 `[B, N, R]`, as the kernels of masks/exact_mask.cu make them.

        Args:
            query: `[B, T, N, H]`, bfloat16 or float16, any strides with H contiguous.
            key: `[B, S, K, H]`.
            lse: float32 `[B, N, T]`.
            log_threshold: float32 `[N]`.
            query_order: int32 `[B|1, N|1, T]` or None.
            scale: Factor of the scores.
            query_block: 64 or 128.
            keep_best: Rows that keep nothing keep their best key.
            num_sms: Of the emulated device.
            seed: Order in which everything happens.

        Raises:
            EmulationError: If a kernel broke a rule, cannot go on, or wrote outside of its results.
        """
        scores = _Scores(query, key, lse, query_order, scale, query_block)
        bits, counts, check = scores.results()
        args = ExactMaskArgs(scores.args, log_threshold.ctypes.data, bits.ctypes.data, counts.ctypes.data, keep_best)
        regions = scores.regions | {"log_threshold": (log_threshold, None), "counts": (counts, None)}
        self._call(self._library.emulation_exact_mask, args, regions, seed, num_sms)
        check()
        return bits, counts

    def exact_mass(
        self,
        query: np.ndarray,
        key: np.ndarray,
        lse: np.ndarray,
        query_order: np.ndarray | None,
        rule: SelectRule,
        *,
        scale: float,
        query_block: int,
        workspace_heads: int,
        num_sms: int = 1,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bits and counts as of `exact_mask`, and the masses `[workspace_heads, R, W * 32]` of the last heads.

        Raises:
            EmulationError: If a kernel broke a rule, cannot go on, or wrote outside of its results.
        """
        scores = _Scores(query, key, lse, query_order, scale, query_block)
        bits, counts, check = scores.results()
        shape = (workspace_heads, bits.shape[2], bits.shape[3] * 32)
        workspace, whole = _guarded((int(np.prod(shape)) + 4 * workspace_heads,), np.float32)
        data = [array.ctypes.data for array in (bits, counts, workspace)]
        args = ExactMassArgs(scores.args, rule, *data, workspace_heads)
        regions = scores.regions | {"workspace": (workspace, None), "counts": (counts, None)}
        self._call(self._library.emulation_exact_mass, args, regions, seed, num_sms)
        check()
        _check_guards("workspace", whole)
        return bits, counts, workspace[: int(np.prod(shape))].reshape(shape)

    def mean_mask(
        self,
        query: np.ndarray,
        key: np.ndarray,
        keep: np.ndarray | SelectRule,
        query_order: np.ndarray | None,
        *,
        scale: float,
        query_block: int,
        num_means: int = 1,
        keep_best: bool = False,
        workspace_heads: int = 1,
        num_sms: int = 1,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bits and counts as of `exact_mask`, as the kernels of masks/mean_mask.cu make them, and their workspace.

        Args:
            query: See `exact_mask`.
            key: See `exact_mask`.
            keep: Logarithms of thresholds, float32 `[N]`, or how many keys a row keeps.
            query_order: See `exact_mask`.
            scale: See `exact_mask`.
            query_block: See `exact_mask`.
            num_means: 1, 2, 4 or 8.
            keep_best: See `exact_mask`.
            workspace_heads: Whose probabilities the workspace holds, where keys are ranked.
            num_sms: See `exact_mask`.
            seed: See `exact_mask`.

        Raises:
            EmulationError: If a kernel broke a rule, cannot go on, or wrote outside of its results.
        """
        batch, num_queries, num_heads, head_dim = query.shape
        scores = _Scores(
            query, key, np.zeros((batch, num_heads, num_queries), np.float32), query_order, scale, query_block
        )
        bits, counts, check = scores.results()
        num_rows, num_words = bits.shape[2:]
        lines, ranks = -(-num_rows * num_means // 256) * 256, isinstance(keep, SelectRule)
        numbers = batch * num_heads * lines * (head_dim // 2 + 2 * 16)
        numbers += ranks * (workspace_heads * (num_rows * num_words * 32 + 4) + batch * num_heads * num_rows * 1028)
        workspace, whole = _guarded((numbers,), np.int32)
        limits = np.zeros(num_heads, np.float32) if isinstance(keep, SelectRule) else keep
        rule = keep if isinstance(keep, SelectRule) else SelectRule()
        data = [array.ctypes.data for array in (bits, counts, workspace)]
        args = MeanMaskArgs(scores.args, num_means, ranks, limits.ctypes.data, keep_best, rule, *data, workspace_heads)
        regions = scores.regions | {"workspace": (workspace, None), "counts": (counts, None), "bits": (bits, None)}
        regions["log_threshold"] = (limits, None)
        self._call(self._library.emulation_mean_mask, args, regions, seed, num_sms)
        check()
        _check_guards("workspace", whole)
        return bits, counts, workspace

    def one_pass(
        self,
        query: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        last_lse: np.ndarray,
        log_threshold: np.ndarray,
        query_order: np.ndarray | None,
        *,
        scale: float,
        query_block: int,
        keep_best: bool = False,
        num_sms: int = 1,
        seed: int = 0,
    ) -> OnePass:
        """Dense attention and the mask that it finds, as the kernels of masks/one_pass.cu make them.

        Args:
            query: `[B, T, N, H]`, bfloat16 or float16, any strides with H contiguous.
            key: `[B, S, K, H]`.
            value: `[B, S, K, H]`.
            last_lse: float32 `[B, N, T]`.
            log_threshold: float32 `[N]`.
            query_order: int32 `[B|1, N|1, T]` or None.
            scale: Factor of the scores, not negative.
            query_block: 64 or 128.
            keep_best: Rows that keep nothing keep their best key.
            num_sms: Of the emulated device.
            seed: Order in which everything happens.

        Raises:
            EmulationError: If a kernel broke a rule, cannot go on, or wrote outside of its results.
        """
        batch, num_queries, num_heads, head_dim = query.shape
        num_rows, num_words = -(-num_queries // query_block), 4 * -(-key.shape[1] // 128)
        shapes = {
            "bits": ((batch, num_heads, num_rows, num_words), np.uint32),
            "counts": ((batch, num_heads, num_rows), np.int32),
            "output": (query.shape, query.dtype),
            "lse": ((batch, num_heads, num_queries), np.float32),
            "workspace": ((4,), np.int32),
        }
        results = {name: _guarded(*shape) for name, shape in shapes.items()}
        data = {name: array.ctypes.data for name, (array, _) in results.items()}
        attention = AttentionArgs(
            *(array.ctypes.data for array in (query, key, value)), None, None,
            None if query_order is None else query_order.ctypes.data,
            *(data[name] for name in ("output", "lse", "workspace")),
            *(_TokenStrides(*(step // array.itemsize for step in array.strides[:3]))
              for array in (query, key, value, results["output"][0])),
            _MaskStrides(0, 0), _MaskStrides(0, 0),
            _MaskStrides(*([0, 0] if query_order is None else _strides(query_order, (0, 1)))),
            batch, num_queries, key.shape[1], num_heads, key.shape[2], head_dim,
            query_block, num_rows, num_words, scale, DTYPES[str(query.dtype)],
        )  # fmt: skip
        pointers = last_lse.ctypes.data, log_threshold.ctypes.data, data["bits"], data["counts"]
        args = OnePassArgs(attention, *pointers, keep_best)
        given = {"query": query, "key": key, "value": value, "last_lse": last_lse, "log_threshold": log_threshold}
        given |= {"bits": results["bits"][0], "workspace": results["workspace"][0]}
        given |= {} if query_order is None else {"query_order": query_order}
        regions = {name: (array, None) for name, array in given.items()}
        self._call(self._library.emulation_one_pass, args, regions, seed, num_sms)
        for name, (_, whole) in results.items():
            _check_guards(name, whole)
        return OnePass(*(results[name][0] for name in ("bits", "counts", "output", "lse")))

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
