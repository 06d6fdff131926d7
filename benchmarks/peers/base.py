"""What a worker asks of a peer, whatever framework it runs on."""

import abc
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.inputs import CaseFiles


class Fetched(NamedTuple):
    """Part of a result on the host.

    Attributes:
        output: `[queries, N, H]` float32 of the asked queries; None where no attention was computed.
        lse: `[N, queries]` float32, natural logarithm; None where the peer has none.
        finite: Whether the whole output is finite.
        made: Of contestants that make masks: all bits `uint32[N, R, W]`, or the work order `int32[N, R, 2]`.
    """

    output: np.ndarray | None
    lse: np.ndarray | None
    finite: bool
    made: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """A contestant, ready for a case.

    Attributes:
        call: Enqueues one whole attention call and returns its arrays without waiting.
        fetch: What the arrays of a call hold for some queries.
        plan: Does again what the peer must do once per mask before calls, and waits; None if that is nothing.
        calls: What counts as one call and is done so often by one `call`, one after the other.
        runs: What does the work, where a contestant leaves that open: "cuda" or "xla".
    """

    call: Callable[[], Any]
    fetch: Callable[[Any, Sequence[int]], Fetched]
    plan: Callable[[], None] | None = None
    calls: int = 1
    runs: str | None = None


class AbstractPeer(abc.ABC):
    """One library with its contestants. Making one imports the library and touches the GPU."""

    names: tuple[str, ...] = ()
    """Contestants that this peer knows."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """`device`, and `versions`: names of packages to versions."""

    def why_not(self, name: str, case: GpuCase) -> str | None:
        """Why a contestant cannot run a case; None if it can."""
        return None if name in self.names else f"no contestant {name!r} here, but {', '.join(self.names)}"

    @abc.abstractmethod
    def prepare(self, name: str, case: GpuCase, files: CaseFiles) -> Program:
        """Load the arrays and compile. Called once per case and contestant, with others of the case still loaded."""

    @abc.abstractmethod
    def sync(self) -> None:
        """Wait until everything that was enqueued is done."""

    @abc.abstractmethod
    def release(self) -> None:
        """Forget all arrays of the case."""

    @abc.abstractmethod
    def device_ms(self, program: Program, calls: int) -> float | None:
        """Milliseconds of a call by the device's own clock, over some calls; None if the device gives none."""


def time_calls(call: Callable[[], Any], sync: Callable[[], None], target_ms: float) -> tuple[float, int]:
    """Milliseconds of one call among many enqueued back to back, and how many they were.

    The device never runs dry between the calls of a batch, and what starting and waiting cost is the same for a batch
    of one call and is taken off. So the same few lines serve every framework, and helper kernels count as well.

    Args:
        call: Enqueues one call.
        sync: Waits for all of them.
        target_ms: How long the batch should take.
    """

    def batch(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = call()  # noqa: F841, kept until the next one is enqueued, as a caller would
        sync()
        return 1e3 * (time.perf_counter() - start)

    batch(1)  # wakes up clocks and caches after another process had the device
    single = batch(1)
    more = max(2, math.ceil(target_ms / max(single, 1e-3)))
    many = batch(1 + more)
    return (many - single) / more, more
