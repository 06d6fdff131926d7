"""tokamax's `mosaic_gpu` attention, dense: the fastest dense kernel written in JAX."""

import functools
import sys
import types
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.inputs import CaseFiles
from benchmarks.peers.base import Program
from benchmarks.peers.jax_side import AbstractJaxPeer, fetch_queries


def _import_tokamax() -> Any:
    # It imports a profile viewer of 100 MB that attention does not use.
    try:
        import xprof  # noqa: F401
    except ModuleNotFoundError:
        for name in ("xprof", "xprof.cli", "xprof.cli.tools", "xprof.cli.tools.get_kernel_stats_tool"):
            stand_in = types.ModuleType(name)
            stand_in.__path__ = []
            sys.modules[name] = stand_in
        sys.modules["xprof.cli.tools"].get_kernel_stats_tool = stand_in  # type: ignore[attr-defined]
    import tokamax

    return tokamax


class TokamaxPeer(AbstractJaxPeer):
    """`tokamax.dot_product_attention(implementation="mosaic_gpu")`."""

    names = ("tokamax",)

    def __init__(self) -> None:
        super().__init__()
        self._tokamax = _import_tokamax()

    def describe(self) -> dict[str, Any]:
        """See `AbstractPeer.describe`."""
        facts = super().describe()
        return facts | {"versions": facts["versions"] | {"tokamax": getattr(self._tokamax, "__version__", "unknown")}}

    def prepare(self, name: str, case: GpuCase, files: CaseFiles) -> Program:
        """See `AbstractPeer.prepare`."""
        attention = self._tokamax.dot_product_attention
        function = functools.partial(attention, scale=case.scale, implementation="mosaic_gpu")
        call = self.program(name, function, self.qkv(case, files))
        return Program(call, lambda output, queries: fetch_queries(output[0], None, queries))


def make_peer(_: Mapping[str, Any]) -> TokamaxPeer:
    """The peer of this module; it has no options."""
    return TokamaxPeer()
