"""FlashAttention-3, dense: the wheel `fa3-fwd`."""

from collections.abc import Mapping
from typing import Any

from fa3_fwd_interface import flash_attn_func

from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.inputs import CaseFiles
from benchmarks.peers.base import Program
from benchmarks.peers.torch_side import AbstractTorchPeer, fetch_queries


class Fa3Peer(AbstractTorchPeer):
    """`flash_attn_func` without a mask."""

    names = ("fa3",)
    packages = ("fa3-fwd",)

    def prepare(self, name: str, case: GpuCase, files: CaseFiles) -> Program:
        """See `AbstractPeer.prepare`."""
        query, key, value = (x[None] for x in self.qkv(case, files))

        def call() -> Any:
            return flash_attn_func(query, key, value, softmax_scale=case.scale, return_attn_probs=True)

        # Its second result is the LSE, [B, N, T].
        return Program(call, lambda arrays, queries: fetch_queries(arrays[0][0], arrays[1][0], queries))


def make_peer(_: Mapping[str, Any]) -> Fa3Peer:
    """The peer of this module; it has no options."""
    return Fa3Peer()
