"""FlashInfer: dense, and sparse with blocks of M queries x 1 key and a mask per head.

It knows one mask for all heads, so that heads must become sequences: with a launch a head (K and V of one head stay in
the L2 cache), or with all heads behind each other in one launch (no gaps). Both are timed; the better one counts.
Copying to head-major layout is not part of its time. `plan()` is not either and stands beside it.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

# Before the import below, which reads it.
os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")

import flashinfer
import flashinfer.jit.core as jit_core
import torch

from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.inputs import CaseFiles
from benchmarks.peers.base import Fetched, Program
from benchmarks.peers.torch_side import DTYPES, AbstractTorchPeer, fetch_queries, load

_WORKSPACE_BYTES = 256 << 20
_SMALL_WORKSPACE_BYTES = 16 << 20


def _use_carried_library() -> None:
    """Take a library that is there as it is: ninja would build it again where paths or times differ."""
    build = jit_core.JitSpecNvcc.build

    def build_if_absent(spec: Any, *args: Any, **options: Any) -> None:
        if not spec.jit_library_path.exists():
            if os.environ.get("FGATTN_BENCH_MAY_BUILD") != "1":
                raise RuntimeError(f"no library {spec.name}: building takes minutes; set FGATTN_BENCH_MAY_BUILD=1")
            build(spec, *args, **options)

    jit_core.JitSpecNvcc.build = build_if_absent


def key_lists(bits: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept keys of one head's bits `[R, W]`: row starts `[R + 1]` and key numbers, both int32."""
    rows = []
    shifts = torch.arange(32, device=bits.device, dtype=torch.int32)
    for part in bits.split(64):
        kept = (part[..., None] >> shifts & 1).reshape(len(part), -1)[:, :num_keys]
        rows.append((kept.sum(1), kept.nonzero()[:, 1].int()))
    counts = torch.cat([count for count, _ in rows])
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=bits.device)
    starts[1:] = counts.cumsum(0)
    return starts, torch.cat([keys for _, keys in rows])


class FlashInferPeer(AbstractTorchPeer):
    """`BlockSparseAttentionWrapper` with `C=1`, and dense prefill."""

    names = ("flashinfer", "flashinfer_fused", "flashinfer_launches")
    packages = ("flashinfer-python", "apache-tvm-ffi")

    def __init__(self) -> None:
        super().__init__()
        _use_carried_library()
        self._lists: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def prepare(self, name: str, case: GpuCase, files: CaseFiles) -> Program:
        """See `AbstractPeer.prepare`."""
        if name == "flashinfer":
            return self._dense(case, files)
        if not self._lists:
            bits = load(files, "bits")
            self._lists = [key_lists(head, case.num_keys) for head in bits]
        return (self._fused if name == "flashinfer_fused" else self._launches)(case, files)

    def release(self) -> None:
        """See `AbstractPeer.release`."""
        self._lists = []
        super().release()

    def _dense(self, case: GpuCase, files: CaseFiles) -> Program:
        # The same module as the sparse form: one sequence, every key.
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(self._workspace, backend="fa3")
        starts = [torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (case.num_queries, case.num_keys)]
        dtype = DTYPES[case.dtype]
        query, key, value = self.qkv(case, files)

        def plan() -> None:
            wrapper.plan(
                *starts, case.num_heads, case.num_kv_heads, case.head_dim, sm_scale=case.scale, q_data_type=dtype,
                kv_data_type=dtype,
            )  # fmt: skip

        plan()

        def call() -> Any:
            return wrapper.run(query, key, value, return_lse=True)

        return Program(call, lambda a, queries: fetch_queries(a[0], a[1].T * math.log(2), queries), plan)

    def _plan(
        self, wrapper: Any, case: GpuCase, starts: torch.Tensor, keys: torch.Tensor, rows: int, all_: int
    ) -> None:
        dtype = DTYPES[case.dtype]
        wrapper.plan(
            starts, keys, rows, all_, case.query_block, 1, 1, 1, case.head_dim, sm_scale=case.scale,
            q_data_type=dtype, kv_data_type=dtype, o_data_type=dtype,
        )  # fmt: skip

    def _fused(self, case: GpuCase, files: CaseFiles) -> Program:
        query, key, value = self.qkv(case, files)
        # Heads stand behind each other; the last row of each is filled up with queries that nobody looks at.
        padded = case.num_rows * case.query_block
        flat = torch.zeros(case.num_heads, padded, case.head_dim, dtype=query.dtype, device="cuda")
        flat[:, : case.num_queries] = query.transpose(0, 1)
        flat = flat.reshape(-1, 1, case.head_dim)
        key, value = (x.transpose(0, 1).reshape(-1, 1, case.head_dim).contiguous() for x in (key, value))
        groups = case.num_heads // case.num_kv_heads
        keys = torch.cat([keys + n // groups * case.num_keys for n, (_, keys) in enumerate(self._lists)])
        counts = torch.cat([starts[1:] - starts[:-1] for starts, _ in self._lists])
        starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device="cuda")
        starts[1:] = counts.cumsum(0)
        wrapper = flashinfer.BlockSparseAttentionWrapper(self._workspace, backend="fa3")

        def plan() -> None:
            self._plan(wrapper, case, starts, keys, len(flat), len(key))

        plan()

        def fetch(arrays: Any, queries: Any) -> Fetched:
            output = arrays[0].reshape(case.num_heads, padded, case.head_dim).transpose(0, 1)
            lse = arrays[1].reshape(case.num_heads, padded) * math.log(2)
            return fetch_queries(output, lse, queries, case.num_queries)

        return Program(lambda: wrapper.run(flat, key, value, return_lse=True), fetch, plan)

    def _launches(self, case: GpuCase, files: CaseFiles) -> Program:
        query, key, value = (x.transpose(0, 1).contiguous()[:, :, None] for x in self.qkv(case, files))
        groups = case.num_heads // case.num_kv_heads
        wrappers = [
            flashinfer.BlockSparseAttentionWrapper(
                torch.empty(_SMALL_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"), backend="fa3"
            )
            for _ in range(case.num_heads)
        ]

        def plan() -> None:
            for wrapper, (starts, keys) in zip(wrappers, self._lists, strict=True):
                self._plan(wrapper, case, starts, keys, case.num_queries, case.num_keys)

        plan()

        def call() -> Any:
            return [
                wrapper.run(query[n], key[n // groups], value[n // groups], return_lse=True)
                for n, wrapper in enumerate(wrappers)
            ]

        def fetch(arrays: Any, queries: Any) -> Fetched:
            output = torch.cat([output for output, _ in arrays], dim=1)
            lse = torch.cat([lse.T for _, lse in arrays]) * math.log(2)
            return fetch_queries(output, lse, queries)

        return Program(call, fetch, plan)


def make_peer(_: Mapping[str, Any]) -> FlashInferPeer:
    """The peer of this module; it has no options."""
    return FlashInferPeer()
