"""Which implementation runs a call, and why the others do not."""

import dataclasses
import functools
import logging
from collections.abc import Mapping

from fgattn_jax.errors import UnsupportedError
from fgattn_jax.implementations import dense, reference
from fgattn_jax.implementations.spec import CallSpec
from fgattn_jax.pallas_kernels import support as pallas_support
from fgattn_jax.types import IMPLEMENTATIONS
from fgattn_jax.xla_ffi import support as cuda_support

_logger = logging.getLogger("fgattn_jax")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `attention` would do with a call.

    Args:
        implementation: The name that would run; None if the call would raise `UnsupportedError`.
        kernel: What that is, in words.
        reasons: For every implementation that cannot run the call, why. A slower one that could is not listed.
        spec: The static facts that decided.
    """

    implementation: str | None
    kernel: str
    reasons: Mapping[str, tuple[str, ...]]
    spec: CallSpec

    def __str__(self) -> str:
        lines = [f"runs: {self.implementation or 'nothing'} ({self.kernel})"]
        for name in IMPLEMENTATIONS:
            if name == self.implementation:
                continue
            for reason in self.reasons.get(name, ()) or ("it could run, but is slower or was not asked for",):
                lines.append(f"  not {name}: {reason}")
        facts = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(self.spec).items())
        return "\n".join([*lines, f"  call: {facts}"])


def unsupported_reasons(name: str, spec: CallSpec) -> tuple[str, ...]:
    """Why the named implementation cannot run the call; empty if it can."""
    if name == "reference":
        return reference.unsupported_reasons(spec)
    if name == "xla":
        return ()
    if spec.query_block is None:
        return ("it runs masks only; without a mask attention is dense, and `xla` takes the fastest dense path",)
    support = cuda_support if name == "cuda" else pallas_support
    return support.unsupported_reasons(
        head_dim=spec.head_dim,
        query_block=spec.query_block,
        dtype=spec.dtype,
        platform=spec.platform,
        compute_capability=spec.compute_capability,
    )


def explain_spec(spec: CallSpec, implementation: str | None) -> Explanation:
    """Choose for the given facts; `implementation` None takes the fastest that can."""
    reasons = {name: why for name in IMPLEMENTATIONS if (why := unsupported_reasons(name, spec))}
    # `reference` holds all scores: it runs only when it is asked for.
    automatic = next((name for name in IMPLEMENTATIONS if name not in reasons and name != "reference"), None)
    chosen = automatic if implementation is None else (implementation if implementation not in reasons else None)
    return Explanation(chosen, _describe(chosen, spec), reasons, spec)


def _describe(name: str | None, spec: CallSpec) -> str:
    if name is None:
        return "the named implementation cannot run this call"
    if spec.query_block is not None:
        return {
            "reference": "all scores of each row, skipped keys zeroed",
            "xla": "kept keys gathered in chunks; work follows the kept slices",
        }.get(name, "gather-load kernel")
    if name == "xla":
        return "dense, in query chunks" if dense.cudnn_reasons(spec) else "dense, cuDNN"
    return "dense, all scores at once"


def choose(spec: CallSpec, implementation: str | None) -> str:
    """Name of the implementation that runs the call.

    Raises:
        UnsupportedError: The named implementation cannot; the message lists every reason and what would work.
    """
    explanation = explain_spec(spec, implementation)
    if implementation is not None and explanation.implementation is None:
        why = "; ".join(explanation.reasons[implementation])
        works = [name for name in IMPLEMENTATIONS if name not in explanation.reasons]
        raise UnsupportedError(
            f"implementation={implementation!r} cannot run this call: {why}. What would work: "
            f"{', '.join(f'implementation={n!r}' for n in works)}, or None for the fastest of them. Call: {spec}"
        )
    chosen = explanation.implementation
    assert chosen is not None, "`xla` runs every call"
    _log_once(chosen, explanation.kernel, spec)
    return chosen


@functools.lru_cache(maxsize=1024)
def _log_once(name: str, kernel: str, spec: CallSpec) -> None:
    _logger.info("attention runs as %s (%s) for %s", name, kernel, spec)
