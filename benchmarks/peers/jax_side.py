"""Loading, waiting and the device's timer for peers on JAX."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Several processes share the GPU: none may take its memory in advance.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.inputs import CaseFiles
from benchmarks.peers.base import AbstractPeer, Fetched, Program


def load(files: CaseFiles, name: str) -> jax.Array:
    """An array on the device."""
    array = files.load(name)
    return jnp.asarray(array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array)


def fetch_queries(output: jax.Array, lse: jax.Array | None, queries: Sequence[int]) -> Fetched:
    """Part of output `[T, N, H]` and LSE `[N, T]`."""
    chosen = np.array(queries)
    return Fetched(
        np.asarray(output[chosen].astype(jnp.float32)),
        None if lse is None else np.asarray(lse[:, chosen].astype(jnp.float32)),
        bool(jnp.isfinite(output).all()),
    )


class AbstractJaxPeer(AbstractPeer):
    """A peer whose calls are jitted functions."""

    def __init__(self) -> None:
        self._arrays: dict[str, jax.Array] = {}
        self._compiled: dict[Any, Any] = {}
        self._last: Any = None

    def describe(self) -> dict[str, Any]:
        """See `AbstractPeer.describe`."""
        device = jax.devices()[0]
        return {"device": device.device_kind, "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__}}

    def qkv(self, case: GpuCase, files: CaseFiles) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query `[1, T, N, H]`, key and value `[1, S, K, H]`, loaded once per case."""
        for name in ("query", "key", "value"):
            if name not in self._arrays:
                self._arrays[name] = load(files, name)[None]
        query, key, value = (self._arrays[name] for name in ("query", "key", "value"))
        assert query.shape == (1, case.num_queries, case.num_heads, case.head_dim), query.shape
        return query, key, value

    def program(self, key: Any, function: Callable[..., Any], arrays: Sequence[Any]) -> Callable[[], Any]:
        """The function compiled for these arrays, as a call without arguments; compiled once per key and shapes."""
        compiled = self.compiled(key, function, arrays)

        def call() -> Any:
            self._last = compiled(*arrays)
            return self._last

        return call

    def compiled(self, key: Any, function: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        """What `program` calls."""
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(tuple(arrays)))
        if (key, shapes) not in self._compiled:
            self._compiled[key, shapes] = jax.jit(function).lower(*arrays).compile()
        return self._compiled[key, shapes]

    def sync(self) -> None:
        """Wait for the last call: a device runs its programs in the order in which they were enqueued."""
        jax.block_until_ready(self._last)

    def release(self) -> None:
        """See `AbstractPeer.release`."""
        self._arrays.clear()
        self._last = None

    def device_ms(self, program: Program, calls: int) -> float | None:
        """Sum of the kernels' times in a profile, over the calls."""
        program.call()
        self.sync()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(calls):
                    program.call()
                self.sync()
            profiles = list(Path(folder).rglob("*.xplane.pb"))
            if not profiles:
                return None
            total_ns = stream_ns(jax.profiler.ProfileData.from_file(str(profiles[0])))
        return total_ns / calls / 1e6 if total_ns else None


def stream_ns(profile: Any) -> float:
    """Nanoseconds of everything that ran on streams of GPUs; other lines of a profile repeat the same times."""
    return sum(
        event.duration_ns
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )
