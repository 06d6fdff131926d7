"""Loading, waiting and the device's timer for peers on PyTorch."""

import itertools
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.inputs import CaseFiles
from benchmarks.peers.base import AbstractPeer, Fetched, Program

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages; those that were only unpacked name none and are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def load(files: CaseFiles, name: str) -> torch.Tensor:
    """An array on the GPU."""
    array = np.ascontiguousarray(files.load(name))
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array).cuda()


def fetch_queries(
    output: torch.Tensor, lse: torch.Tensor | None, queries: Sequence[int], num_queries: int | None = None
) -> Fetched:
    """Part of output `[T, N, H]` and LSE `[N, T]`; the first `num_queries` must be finite."""
    chosen = torch.tensor(list(queries), device=output.device)
    return Fetched(
        output[chosen].float().cpu().numpy(),
        None if lse is None else lse[:, chosen].float().cpu().numpy(),
        bool(torch.isfinite(output[:num_queries]).all()),
    )


class AbstractTorchPeer(AbstractPeer):
    """A peer whose calls go to the current stream of PyTorch."""

    packages: tuple[str, ...] = ()
    """Whose versions rows name, beside torch."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        self._arrays: dict[str, torch.Tensor] = {}

    def describe(self) -> dict[str, Any]:
        """See `AbstractPeer.describe`."""
        known = {"torch": torch.__version__, "cuda": str(torch.version.cuda), **versions(*self.packages)}
        return {"device": torch.cuda.get_device_name(), "versions": known}

    def qkv(self, case: GpuCase, files: CaseFiles) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query `[T, N, H]`, key and value `[S, K, H]`, loaded once per case."""
        for name in ("query", "key", "value"):
            if name not in self._arrays:
                self._arrays[name] = load(files, name)
        query, key, value = (self._arrays[name] for name in ("query", "key", "value"))
        assert query.shape == (case.num_queries, case.num_heads, case.head_dim), query.shape
        return query, key, value

    def sync(self) -> None:
        """See `AbstractPeer.sync`."""
        torch.cuda.synchronize()

    def release(self) -> None:
        """See `AbstractPeer.release`."""
        self._arrays.clear()
        torch.cuda.empty_cache()

    def device_ms(self, program: Program, calls: int) -> float | None:
        """CUDA events around every call of a batch; the median."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        program.call()
        for event in events[:-1]:
            event.record()
            program.call()
        events[-1].record()
        self.sync()
        return float(np.median([a.elapsed_time(b) for a, b in itertools.pairwise(events)]))
