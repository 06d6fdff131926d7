"""Files of a case: what workers load, and what a few queries must give."""

import dataclasses
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.gpu import fields, mask_checks, masks
from benchmarks.gpu.cases import DENSE, MAKERS, MASKS, ORDER, SPARSE, GpuCase
from fgattn_jax import query_order
from fgattn_jax.evaluation.oracle import attention_oracle

BLOCK_KEYS = {"fa4_128x128": 128, "fa4_128x64": 64}
"""Keys per block of contestants that take whole blocks; their rows have 128 queries."""

_CHECKED_QUERIES = 6
_FIELD_SEED = 7
_ORDER_MASK = next(name for name, share in SPARSE.items() if share == 0.3)
_DENSE_RESULTS = (*DENSE, "one_pass")


@dataclasses.dataclass(frozen=True)
class CaseFiles:
    """Paths of a case's arrays; `folder` also takes what workers return.

    Attributes:
        folder: Where all of them lie.
        arrays: `query`, `key`, `value` (`[T, N, H]`, `[S, K, H]`; bfloat16 as uint16), `bits`, perhaps `query_order`
            (`[T]`), `blocks_<name>` (`[N, T // 128, kept]`), `bits_<name>` of contestants with masks of their own.
        density: Kept share of `bits`.
        queries: Numbers of the queries that are compared.
    """

    folder: Path
    arrays: dict[str, str]
    density: float
    queries: tuple[int, ...]

    def load(self, name: str) -> np.ndarray:
        """An array as the file holds it."""
        return np.load(self.arrays[name], mmap_mode="r")


def _save(path: Path, array: np.ndarray) -> str:
    np.save(path, array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array)
    return str(path)


def _values(case: GpuCase, folder: Path) -> dict[str, str]:
    """Query, key and value; cases of one shape and kind share the files."""
    paths = _normal_arrays(case, folder)
    if case.values == "video":
        assert case.grid is not None, "a case of video fields names its grid"
        sizes = {"query": case.num_heads, "key": case.num_kv_heads}
        chosen = {name: folder / f"video_{Path(paths[name]).name}" for name in sizes}
        if not all(path.exists() for path in chosen.values()):
            arrays = fields.video_fields(case.grid, case.num_heads, case.num_kv_heads, case.head_dim, _FIELD_SEED)
            for path, array in zip(chosen.values(), arrays, strict=True):
                partial = path.with_suffix(".partial.npy")
                _save(partial, array.astype(_dtype(case)))
                partial.replace(path)
        paths |= {name: str(path) for name, path in chosen.items()}
    return paths


def _dtype(case: GpuCase) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)


def _normal_arrays(case: GpuCase, folder: Path) -> dict[str, str]:
    shapes = {
        "query": (case.num_queries, case.num_heads, case.head_dim),
        "key": (case.num_keys, case.num_kv_heads, case.head_dim),
        "value": (case.num_keys, case.num_kv_heads, case.head_dim),
    }
    paths = {}
    for name, shape in shapes.items():
        path = folder / f"{name}_{'x'.join(map(str, shape))}_{case.dtype}.npy"
        if not path.exists():
            array = np.empty(shape, _dtype(case))
            chunks = np.array_split(np.arange(shape[0]), 16)

            def fill(part: int, array: np.ndarray = array, chunks: list[np.ndarray] = chunks, name: str = name) -> None:
                rng = np.random.default_rng([zlib.crc32(name.encode()), part])
                rows = chunks[part]
                array[rows] = rng.standard_normal((len(rows), *array.shape[1:]), np.float32).astype(array.dtype)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(fill, range(len(chunks))))
            partial = path.with_suffix(".partial.npy")
            _save(partial, array)
            partial.replace(path)
        paths[name] = str(path)
    return paths


def make_bits(case: GpuCase, mask_file: Path | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Bits `[N, R, W]` of a case and its query order `[T]`, if it has one.

    Raises:
        ValueError: The case takes its mask from a file, and there is none or it holds masks of other sizes.
    """
    seed = zlib.crc32(case.name.encode())
    sizes = (case.num_heads, case.num_rows, case.num_keys)
    if case.mask == "file":
        return _file_bits(case, mask_file)
    order = None
    if case.order is not None:
        assert case.grid is not None, "a case with a query order names its grid"
        order = query_order.resolve(case.order, case.grid)
    if case.mask == "video":
        assert case.grid is not None, "a video case names its grid"
        return masks.video_mask(case.grid, case.num_heads, case.query_block, case.density, seed, order), order
    if case.mask == "overlap":
        assert case.overlap is not None, "an overlap case names its overlap"
        return masks.overlap_mask(*sizes, case.density, case.overlap, seed), order
    make = masks.uneven_mask if case.mask == "uneven" else masks.random_mask
    return make(*sizes, 1.0 if case.mask == "full" else case.density, seed), order


def _file_bits(case: GpuCase, mask_file: Path | None) -> tuple[np.ndarray, np.ndarray | None]:
    from safetensors import safe_open

    if mask_file is None:
        raise ValueError("no mask file: make one with `python -m benchmarks.gpu.dit_masks` and pass `--dit-masks FILE`")
    with safe_open(mask_file, framework="np") as file:
        tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        sizes = {name: int(file.metadata()[name]) for name in ("query_block", "num_keys", "num_queries")}
    wanted = {"query_block": case.query_block, "num_keys": case.num_keys, "num_queries": case.num_queries}
    bits = tensors["bits"]
    if sizes != wanted or bits.ndim != 5 or bits.shape[2] != case.num_heads or bits.shape[0] <= case.layer:
        raise ValueError(
            f"expected masks of {wanted}, heads={case.num_heads} and more than {case.layer} layers in `{mask_file}`; "
            f"got {sizes} and bits of shape {bits.shape}"
        )
    order = tensors.get("query_order")
    if order is not None:
        order = np.asarray(order).reshape(-1, case.num_queries)
        order = order[case.layer * len(order) // bits.shape[0]]
    return np.ascontiguousarray(bits[case.layer, 0]), order


def make_files(case: GpuCase, folder: Path, mask_file: Path | None = None, *, part: str = "") -> CaseFiles:
    """Write the arrays of a case.

    Args:
        case: What to make.
        folder: Where to; query, key and value of cases of one shape are the same files.
        mask_file: See `make_bits`.
        part: Folder below for everything else, so that two cases may lie side by side.

    Raises:
        ValueError: See `make_bits`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = _values(case, folder)
    folder = folder / part
    folder.mkdir(exist_ok=True)
    bits, order = make_bits(case, mask_file)
    arrays["bits"] = _save(folder / "bits.npy", bits)
    if order is not None:
        arrays["query_order"] = _save(folder / "query_order.npy", order.astype(np.int32))
    for number, (name, width) in enumerate(BLOCK_KEYS.items()):
        if name in case.contestants:
            rows, blocks = case.num_queries // 128, case.num_keys // width
            kept = masks.block_mask(case.num_heads, rows, blocks, case.density, number)
            arrays[f"blocks_{name}"] = _save(folder / f"blocks_{name}.npy", kept)
    for name, density in SPARSE.items():
        if name in case.contestants or (name == _ORDER_MASK and ORDER in case.contestants):
            seed = zlib.crc32(f"{case.name}, {name}".encode())
            own = masks.random_mask(case.num_heads, case.num_rows, case.num_keys, density, seed)
            arrays[bits_name(name)] = _save(folder / f"{bits_name(name)}.npy", own)
    share = masks.density(bits, case.num_queries, case.num_keys, case.query_block)
    # First, last of the whole rows, very last, and others that fall on no boundary of anything.
    last_whole = max(case.num_queries // 128 * 128, 1) - 1
    queries = sorted({*np.linspace(0, last_whole, _CHECKED_QUERIES).astype(int).tolist(), case.num_queries - 1})
    return CaseFiles(folder, arrays, share, tuple(queries))


def bits_name(contestant: str) -> str:
    """Under which name the files hold the mask of a contestant."""
    own = _ORDER_MASK if contestant == ORDER else contestant
    return f"bits_{own}" if own in SPARSE else "bits"


def lengths(case: GpuCase, contestant: str) -> tuple[int, int]:
    """Queries and keys that a contestant takes: kernels of whole blocks leave out what fills no block."""
    if contestant not in BLOCK_KEYS:
        return case.num_queries, case.num_keys
    width = BLOCK_KEYS[contestant]
    return case.num_queries // 128 * 128, case.num_keys // width * width


def checked_queries(case: GpuCase, files: CaseFiles, contestant: str) -> tuple[int, ...]:
    """Numbers of the queries of a contestant that are compared."""
    return tuple(query for query in files.queries if query < lengths(case, contestant)[0])


def _load_values(files: CaseFiles, name: str) -> np.ndarray:
    array = files.load(name)
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


class Oracle:
    """Expected results of a case; contestants that compute the same share them. May be asked by several threads.

    Args:
        case: The case.
        files: Its arrays.
        before: An earlier oracle: dense results of the same query, key and value are taken from there.
    """

    def __init__(self, case: GpuCase, files: CaseFiles, before: "Oracle | None" = None):
        self._case, self._files = case, files
        self._lock = threading.Lock()
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._scores: mask_checks.RowScores | None = None
        if before is not None and before._inputs == self._inputs and "dense" in before._known:
            self._known["dense"] = before._known["dense"]

    @property
    def _inputs(self) -> tuple[str, ...]:
        return (*(self._files.arrays[name] for name in ("query", "key", "value")), str(self._files.queries))

    def of(self, contestant: str) -> tuple[np.ndarray, np.ndarray]:
        """See `expected`."""
        own = contestant in BLOCK_KEYS or contestant in SPARSE
        kind = "dense" if contestant in _DENSE_RESULTS else contestant if own else "slices"
        with self._lock:
            if kind not in self._known:
                self._known[kind] = expected(self._case, self._files, contestant)
            return self._known[kind]

    def scores(self) -> mask_checks.RowScores:
        """See `mask_checks.row_scores`."""
        with self._lock:
            if self._scores is None:
                query, key = (_load_values(self._files, name) for name in ("query", "key"))
                order = self._files.load("query_order") if "query_order" in self._files.arrays else None
                self._scores = mask_checks.row_scores(
                    query, key, order, query_block=self._case.query_block, scale=self._case.scale
                )
            return self._scores

    def prepare(self, contestant: str) -> None:
        """Compute what a contestant will be compared with."""
        if contestant in MASKS:
            self.scores()
        if contestant not in MAKERS or contestant in _DENSE_RESULTS:
            self.of(contestant)


def expected(case: GpuCase, files: CaseFiles, contestant: str) -> tuple[np.ndarray, np.ndarray]:
    """Float64 output `[queries, N, H]` and LSE `[N, queries]` of the checked queries of a contestant."""
    queries = np.array(checked_queries(case, files, contestant))
    rows = _rows_of(case, files, contestant, queries)  # [N, queries, S]
    query = _load_values(files, "query")[queries].astype(np.float64)
    groups = case.num_heads // case.num_kv_heads

    def one_head(head: int) -> tuple[np.ndarray, np.ndarray]:
        key, value = (_load_values(files, name)[:, head // groups] for name in ("key", "value"))
        output, lse = attention_oracle(
            query[None, :, head : head + 1],
            key[None, :, None].astype(np.float32),
            value[None, :, None].astype(np.float32),
            rows[None, head : head + 1],
            query_block=1,
            scale=case.scale,
        )
        return output[0, :, 0], lse[0, 0]

    with ThreadPoolExecutor(min(case.num_heads, os.cpu_count() or 1)) as pool:
        heads = list(pool.map(one_head, range(case.num_heads)))
    return np.stack([output for output, _ in heads], axis=1), np.stack([lse for _, lse in heads])


def _rows_of(case: GpuCase, files: CaseFiles, contestant: str, queries: np.ndarray) -> np.ndarray:
    """Boolean `[N, len(queries), S]`: what each of the queries attends to."""
    if contestant in _DENSE_RESULTS:
        return np.ones((case.num_heads, len(queries), case.num_keys), bool)
    if contestant in BLOCK_KEYS:
        width = BLOCK_KEYS[contestant]
        kept = files.load(f"blocks_{contestant}")
        rows = np.zeros((case.num_heads, len(queries), case.num_keys), bool)
        for n in range(case.num_heads):
            for i, query in enumerate(queries):
                for block in kept[n, query // 128]:
                    rows[n, i, block * width : (block + 1) * width] = True
        return rows
    position = queries
    if "query_order" in files.arrays:
        position = query_order.inverse(files.load("query_order"))[queries]
    return masks.unpack(files.load(bits_name(contestant))[:, position // case.query_block], case.num_keys)
