"""The CUDA gather-load kernel with the backward pass of `xla`, which starts from this kernel's LSE.

Two forms, because a name is a promise and a choice is not. A call that names "cuda" holds the kernel alone: lowered for
any other platform, it does not compile. A call that leaves the choice open may be traced on a GPU machine and still run
on another platform (arrays placed on the CPU, a program exported for several platforms): it holds `xla` for those.
"""

import functools

import jax
from jaxtyping import Array, Float, Int32, UInt32

from fgattn_jax.implementations import xla
from fgattn_jax.implementations.transforms import KernelPair
from fgattn_jax.xla_ffi import attention


def _kernel_or_xla(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    bits: UInt32[Array, "b n R W"],
    query_order: Int32[Array, "b n T"] | None,
    work_order: Int32[Array, "b n R 2"] | None,
    *,
    scale: float,
    query_block: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    def other(query, key, value, bits, query_order, work_order):
        del work_order
        return xla.forward(query, key, value, bits, query_order, scale=scale, query_block=query_block)

    kernel = functools.partial(attention.forward, scale=scale, query_block=query_block)
    arrays = (query, key, value, bits, query_order, work_order)
    return jax.lax.platform_dependent(*arrays, cuda=kernel, default=other)


NAMED = KernelPair(attention.forward, xla.backward, takes_work_order=True)
"""For calls that name the implementation: the kernel runs, or the call fails."""

CHOSEN = KernelPair(_kernel_or_xla, xla.backward, takes_work_order=True)
"""For calls that do not: the kernel where the program runs on CUDA, `xla` elsewhere."""
