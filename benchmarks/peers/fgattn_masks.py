"""This project's ways to make masks, and the order of work that goes with one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fgattn_jax
from benchmarks.gpu import inputs
from benchmarks.gpu.cases import MAKERS, MASKS, ORDER, ORDER_CALLS, GpuCase
from benchmarks.gpu.inputs import CaseFiles
from benchmarks.peers.base import Fetched, Program
from benchmarks.peers.jax_side import AbstractJaxPeer, fetch_queries, load
from fgattn_jax import predictors
from fgattn_jax.masks import SliceMask
from fgattn_jax.xla_ffi import attention as cuda_attention
from fgattn_jax.xla_ffi import support

_OUR_CALL = 'custom_call_target="fgattn_'


class MaskPeer(AbstractJaxPeer):
    """Predictors under `jit`, bits alone; the LSE of dense attention is there before.

    Args:
        allow_unreleased: Let our kernels in this process run although their tests on a GPU are not recorded.
        without_kernels: Let predictors run where the kernels do not, in XLA's operations.
    """

    names = MAKERS

    def __init__(self, *, allow_unreleased: bool, without_kernels: bool):
        super().__init__()
        self._without_kernels = without_kernels
        if allow_unreleased:
            support.RELEASED = support.MASKS_RELEASED = True

    def why_not(self, name: str, case: GpuCase) -> str | None:
        """See `AbstractPeer.why_not`."""
        if name not in self.names:
            return super().why_not(name, case)
        if name == "one_pass" and not hasattr(predictors, "one_pass_refresh"):
            return "this version has no `fgattn_jax.predictors.one_pass_refresh`"
        if self._without_kernels:
            return None
        device = jax.devices()[0]
        reasons = support.unsupported_reasons(
            head_dim=case.head_dim,
            query_block=case.query_block,
            dtype=case.dtype,
            platform=device.platform,
            compute_capability=getattr(device, "compute_capability", None),
            for_masks=name != ORDER,
        )
        return "; ".join(reasons) or None

    def prepare(self, name: str, case: GpuCase, files: CaseFiles) -> Program:
        """See `AbstractPeer.prepare`."""
        if name == ORDER:
            return self._order(case, files)
        query, key, value = self.qkv(case, files)
        predictor = make_predictor(name, case, files)
        scales = [jnp.float32(case.scale) for _ in range(MASKS[name].calls)]
        if MASKS[name].statistic == "mean":

            def mean_mask(scale: jax.Array, query: jax.Array, key: jax.Array) -> Any:
                return predictor(query, key, scale=scale).bits

            return self._repeated((name, case), mean_mask, scales, (query, key), _fetch_made)
        if "lse" not in self._arrays:
            dense = self.program(("dense", case.scale), _dense(case), (query, key, value))
            self._arrays["lse"] = jax.block_until_ready(dense()[1])
        lse = self._arrays["lse"]
        if name == "one_pass":
            return self._one_pass(case, predictor, (query, key, value, lse))

        def exact_mask(scale: jax.Array, query: jax.Array, key: jax.Array, lse: jax.Array) -> Any:
            return predictor(query, key, lse, scale=scale).bits

        return self._repeated((name, case), exact_mask, scales, (query, key, lse), _fetch_made)

    def _one_pass(self, case: GpuCase, predictor: Any, arrays: tuple[jax.Array, ...]) -> Program:
        def refresh(query: jax.Array, key: jax.Array, value: jax.Array, lse: jax.Array) -> Any:
            # Asked for only where it is there, see `why_not`; its scale is that of all cases, `1 / sqrt(H)`.
            one_pass_refresh = getattr(predictors, "one_pass_refresh")  # noqa: B009, not in every version
            output, new_lse, mask = one_pass_refresh(predictor, query, key, value, lse)
            return output, new_lse, mask.bits

        def fetch(arrays: Any, queries: Any) -> Fetched:
            output, lse, bits = arrays
            return fetch_queries(output[0], lse[0], queries)._replace(made=np.asarray(bits[0]))

        return self._repeated(("one_pass", case), refresh, arrays[:1], arrays[1:], fetch)

    def _order(self, case: GpuCase, files: CaseFiles) -> Program:
        bits = load(files, inputs.bits_name(ORDER))[None]  # [1, N, R, W]

        def order(bits: jax.Array) -> Any:
            if not self._without_kernels:
                return cuda_attention.work_order(bits, num_keys=case.num_keys)
            mask = SliceMask(bits, query_block=case.query_block, num_keys=case.num_keys, num_queries=case.num_queries)
            return mask.with_work_order().work_order

        # Copies: the cache of an H100 would hold the bits of a 480p layer from call to call.
        copies = [bits, *(jnp.array(bits) for _ in range(ORDER_CALLS - 1))]
        return self._repeated((ORDER, case), order, copies, (), _fetch_made)

    def _repeated(
        self,
        key: tuple[str, GpuCase],
        make: Callable[..., Any],
        firsts: Sequence[jax.Array],
        others: tuple[jax.Array, ...],
        fetch: Callable[[Any, Any], Fetched],
    ) -> Program:
        """A program of one call for each of `firsts`, if a kernel of ours does the work; else of one call alone.

        Each call gets a first argument of its own, even if all hold the same: XLA merges calls with equal arguments.
        Calls run one after the other, see the environment in `benchmarks.gpu.run`.

        Raises:
            RuntimeError: Calls were merged nevertheless.
        """
        name, once = str(key), (firsts[0], *others)  # a case holds a dictionary, which hashes only as text
        kernels = self.compiled((name, 1), make, once).as_text().count(_OUR_CALL)
        if kernels == 0 or len(firsts) == 1:
            return Program(self.program((name, 1), make, once), fetch, runs="cuda" if kernels else "xla")

        def make_all(firsts: Sequence[jax.Array], *others: jax.Array) -> list[Any]:
            return [make(first, *others) for first in firsts]

        arrays, expected = (list(firsts), *others), kernels * len(firsts)
        found = self.compiled((name, len(firsts)), make_all, arrays).as_text().count(_OUR_CALL)
        if found != expected:
            raise RuntimeError(f"expected {expected} kernel calls in a program of {len(firsts)} calls, found {found}")
        call = self.program((name, len(firsts)), make_all, arrays)
        return Program(call, lambda results, queries: fetch(results[-1], queries), calls=len(firsts), runs="cuda")


def _fetch_made(made: Any, _: Any) -> Fetched:
    return Fetched(None, None, True, np.asarray(made[0]))


def make_predictor(name: str, case: GpuCase, files: CaseFiles) -> Any:
    """The predictor of a contestant, with the query order of the case."""
    rule = MASKS[name]
    order = files.load("query_order") if "query_order" in files.arrays else None
    budget = predictors.Budget(**rule.budget(case.num_keys))
    if rule.statistic == "mean":
        return predictors.MeanQueryPredictor(case.query_block, order, budget=budget)
    return predictors.ExactPredictor(case.query_block, order, statistic=rule.statistic, budget=budget)


def _dense(case: GpuCase) -> Callable[..., Any]:
    return lambda query, key, value: fgattn_jax.attention_with_lse(query, key, value, scale=case.scale)


def make_peer(options: Mapping[str, Any]) -> MaskPeer:
    """The peer of this module."""
    return MaskPeer(
        allow_unreleased=bool(options.get("allow_unreleased")), without_kernels=bool(options.get("without_kernels"))
    )
