"""This project's own implementations."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import fgattn_jax
from benchmarks.gpu import inputs
from benchmarks.gpu.cases import SPARSE, GpuCase
from benchmarks.gpu.inputs import CaseFiles
from benchmarks.peers.base import Fetched, Program
from benchmarks.peers.jax_side import AbstractJaxPeer, fetch_queries, load
from fgattn_jax.masks import SliceMask
from fgattn_jax.pallas_kernels import attention as pallas_attention
from fgattn_jax.pallas_kernels import support as pallas_support
from fgattn_jax.xla_ffi import attention as cuda_attention
from fgattn_jax.xla_ffi import support as cuda_support


class FgattnPeer(AbstractJaxPeer):
    """`cuda`, `pallas` and `xla`, each with its LSE; `cuda_<density>` is `cuda` with a mask of its own.

    Args:
        allow_unreleased: Let our kernels in this process run although their tests on a GPU are not recorded.
    """

    names = ("cuda", "pallas", "xla", *SPARSE)

    def __init__(self, *, allow_unreleased: bool):
        super().__init__()
        if allow_unreleased:
            pallas_support.RELEASED = cuda_support.RELEASED = True

    def why_not(self, name: str, case: GpuCase) -> str | None:
        """See `AbstractPeer.why_not`."""
        if name == "xla" or name not in self.names:
            return super().why_not(name, case)
        support = pallas_support if name == "pallas" else cuda_support
        device = jax.devices()[0]
        facts: dict[str, Any] = {"head_dim": case.head_dim, "query_block": case.query_block, "dtype": case.dtype}
        facts |= {"platform": device.platform, "compute_capability": getattr(device, "compute_capability", None)}
        return "; ".join(support.unsupported_reasons(**facts)) or None

    def prepare(self, name: str, case: GpuCase, files: CaseFiles) -> Program:
        """See `AbstractPeer.prepare`."""
        bits_name = inputs.bits_name(name)
        if bits_name not in self._arrays:
            self._arrays[bits_name] = load(files, bits_name)[None]  # [1, N, R, W]
            if "query_order" in files.arrays:
                self._arrays["query_order"] = load(files, "query_order")[None, None]  # [1, 1, T]
        bits, order = self._arrays[bits_name], self._arrays.get("query_order")
        qkv = self.qkv(case, files)
        if name != "xla":
            return self._kernel("cuda" if name in SPARSE else name, case, qkv, bits, order)
        mask = SliceMask(
            bits, order, query_block=case.query_block, num_keys=case.num_keys, num_queries=case.num_queries
        )

        def run(query: jax.Array, key: jax.Array, value: jax.Array, mask: SliceMask) -> Any:
            return fgattn_jax.attention_with_lse(query, key, value, mask, scale=case.scale, implementation="xla")

        return Program(self.program((name, case.query_block, case.scale), run, (*qkv, mask)), _fetch)

    def _kernel(
        self, name: str, case: GpuCase, qkv: tuple[jax.Array, ...], bits: jax.Array, order: jax.Array | None
    ) -> Program:
        make_order = self.program(("work order", name, case.num_keys), self._work_order(name, case), (bits,))
        work_order = make_order()
        forward = {"cuda": cuda_attention, "pallas": pallas_attention}[name].forward

        def run(query: jax.Array, key: jax.Array, value: jax.Array, bits: jax.Array, *orders: jax.Array) -> Any:
            return forward(
                query, key, value, bits, orders[1] if len(orders) == 2 else None, orders[0],
                scale=case.scale, query_block=case.query_block,
            )  # fmt: skip

        orders = (work_order,) if order is None else (work_order, order)
        call = self.program((name, case.query_block, case.scale), run, (*qkv, bits, *orders))
        return Program(call, _fetch, plan=lambda: jax.block_until_ready(make_order()))

    @staticmethod
    def _work_order(name: str, case: GpuCase) -> Any:
        """Made once for a mask: `cuda` has a kernel for it, `pallas` takes what `SliceMask.with_work_order` makes."""
        if name == "cuda":
            return lambda bits: cuda_attention.work_order(bits, num_keys=case.num_keys)
        sizes = {"query_block": case.query_block, "num_keys": case.num_keys, "num_queries": case.num_queries}
        return lambda bits: SliceMask(bits, **sizes).with_work_order().work_order


def _fetch(arrays: Any, queries: Any) -> Fetched:
    output, lse = arrays
    return fetch_queries(jnp.asarray(output)[0], jnp.asarray(lse)[0], queries)


def make_peer(options: Mapping[str, Any]) -> FgattnPeer:
    """The peer of this module."""
    return FgattnPeer(allow_unreleased=bool(options.get("allow_unreleased")))
