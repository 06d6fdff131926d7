"""`jax.nn.dot_product_attention`, dense: cuDNN on a GPU, XLA's own operations elsewhere."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.inputs import CaseFiles
from benchmarks.peers.base import Program
from benchmarks.peers.jax_side import AbstractJaxPeer, fetch_queries


class JaxNnPeer(AbstractJaxPeer):
    """What a JAX user gets without any other package."""

    names = ("cudnn",)

    def prepare(self, name: str, case: GpuCase, files: CaseFiles) -> Program:
        """See `AbstractPeer.prepare`."""
        implementation = "xla" if jax.default_backend() == "cpu" else "cudnn"
        function = functools.partial(jax.nn.dot_product_attention, scale=case.scale, implementation=implementation)
        call = self.program(name, function, self.qkv(case, files))
        return Program(call, lambda output, queries: fetch_queries(output[0], None, queries))


def make_peer(_: Mapping[str, Any]) -> JaxNnPeer:
    """The peer of this module; it has no options."""
    return JaxNnPeer()
