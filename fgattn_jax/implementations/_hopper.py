"""What the kernels for Hopper GPUs have in common: the backward pass of `xla`, and two forms of the forward pass.

Two forms, because a name is a promise and a choice is not. A call that names the kernel holds the kernel alone: lowered
for any other platform, it does not compile. A call that leaves the choice open may be traced on a GPU machine and still
run on another platform (arrays placed on the CPU, a program exported for several platforms): it holds `xla` for those.
"""

import functools
from typing import NamedTuple

import jax

from fgattn_jax.implementations import xla
from fgattn_jax.implementations.transforms import Kernel, KernelPair


class HopperPairs(NamedTuple):
    """A kernel with the backward pass of `xla`, which starts from the kernel's LSE.

    Args:
        named: For calls that name the implementation: the kernel runs, or the call fails.
        chosen: For calls that do not: the kernel where the program runs on CUDA, `xla` elsewhere.
    """

    named: KernelPair
    chosen: KernelPair


def pairs_of(kernel: Kernel) -> HopperPairs:
    """Both forms of a forward kernel `(q, k, v, bits, order, work_order, *, scale, query_block)`."""

    def kernel_or_xla(query, key, value, bits, query_order, work_order, *, scale: float, query_block: int):
        def other(query, key, value, bits, query_order, work_order):
            del work_order
            return xla.forward(query, key, value, bits, query_order, scale=scale, query_block=query_block)

        arrays = (query, key, value, bits, query_order, work_order)
        on_cuda = functools.partial(kernel, scale=scale, query_block=query_block)
        return jax.lax.platform_dependent(*arrays, cuda=on_cuda, default=other)

    return HopperPairs(
        KernelPair(kernel, xla.backward, takes_work_order=True),
        KernelPair(kernel_or_xla, xla.backward, takes_work_order=True),
    )
