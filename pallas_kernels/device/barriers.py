"""Barriers on which asynchronous copies can arrive, and warps instead of threads.

Pallas has barriers, but does not hand them to inline code, and gather copies are inline code; and every thread of a
warpgroup arrives at them, 128 arrivals where 4 would do. So these barriers (`mbarrier` objects) are plain words of
shared memory. Phases are counted by who waits: a barrier's phases are 0, 1, 0, 1 and so on.

The interpreter has no inline code: there, with `interpret=True`, the same calls use barriers of Pallas.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, nvvm

from fgattn_jax.pallas_kernels.device import mlir

_WORDS = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT


@dataclasses.dataclass(frozen=True)
class Barriers:
    """Two kinds of barriers, `num_barriers` of each: `landed` for copies, `freed` for what they overwrite.

    Args:
        num_barriers: Barriers of each kind.
        copiers: Warpgroups whose threads all arrive at each `landed` barrier.
        readers: Warpgroups whose warps all arrive at each `freed` barrier.
        interpret: Use barriers of Pallas, for the interpreter.
    """

    num_barriers: int
    copiers: int
    readers: int
    interpret: bool

    def scratch(self) -> list[Any]:
        """Scratch types of the kernel; what Pallas makes of them is the `refs` of the other methods."""
        if self.interpret:
            return [
                plgpu.Barrier(num_arrivals=self.copiers, num_barriers=self.num_barriers),
                plgpu.Barrier(num_arrivals=self.readers, num_barriers=self.num_barriers),
            ]
        # One array for both kinds, `freed` behind `landed`: each array of scratch begins at a multiple of 1024 bytes.
        return [plgpu.SMEM((4 * self.num_barriers,), jnp.int32)]

    def init(self, refs) -> None:
        """Makes the barriers. All threads of a block call it first of all; it ends with a barrier for the block."""
        if self.interpret:
            return

        @mlir.inline(_WORDS)
        def make(_, words):
            with mgpu.utils.when(mlir.equal(mgpu.utils.thread_idx(), mlir.i32(0))):
                for i in range(self.num_barriers):
                    slot = mlir.i32(i)
                    nvvm.mbarrier_init(self._landed(words, slot), mlir.i32(mlir.WARPGROUP * self.copiers))
                    nvvm.mbarrier_init(self._freed(words, slot), mlir.i32(mlir.WARPS * self.readers))
                mgpu.utils.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)
            gpu.barrier()

        make(*refs)

    def arrive_landed(self, refs, slot) -> None:
        """Lets every thread arrive as soon as all copies that it has started so far have landed. Does not wait."""
        if self.interpret:
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs[0].at[slot])
            return

        @mlir.inline(_WORDS, _SCALAR)
        def arrive(_, words, slot):
            # noinc: one of the arrivals that the barrier was made for.
            barrier = self._landed(words, slot.registers.item())
            mgpu.utils.inline_ptx("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", barrier, has_side_effects=True)

        arrive(refs[0], slot)

    def await_landed(self, refs, slot, phase) -> None:
        """Waits until the copies of this phase have landed, and shows them to `wgmma`."""
        if self.interpret:
            plgpu.barrier_wait(refs[0].at[slot])
            return

        @mlir.inline(_WORDS, _SCALAR, _SCALAR)
        def wait(_, words, slot, phase):
            _wait(self._landed(words, slot.registers.item()), phase)
            # Copies were made as ordinary stores are; `wgmma` reads past them without this.
            mlir.fence_async_proxy()

        wait(refs[0], slot, phase)

    def arrive_freed(self, refs, slot) -> None:
        """Tells that this warpgroup's warps have read a slot; each warp arrives for itself."""
        if self.interpret:
            plgpu.barrier_arrive(refs[1].at[slot])
            return

        @mlir.inline(_WORDS, _SCALAR)
        def arrive(_, words, slot):
            mgpu.utils.warp_barrier()
            barrier = self._freed(words, slot.registers.item())
            mgpu.utils.inline_ptx(
                "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0], 1;",
                barrier,
                predicate=mlir.equal(mlir.lane(), mlir.i32(0)),
                has_side_effects=True,
            )

        arrive(refs[0], slot)

    def await_freed(self, refs, slot, phase) -> None:
        """Waits until all readers have arrived in this phase."""
        if self.interpret:
            plgpu.barrier_wait(refs[1].at[slot])
            return

        @mlir.inline(_WORDS, _SCALAR, _SCALAR)
        def wait(_, words, slot, phase):
            _wait(self._freed(words, slot.registers.item()), phase)

        wait(refs[0], slot, phase)

    def _landed(self, words: ir.Value, slot: ir.Value) -> ir.Value:
        return mgpu.utils.getelementptr(mlir.shared_pointer(words), [slot], mlir.i64_type())

    def _freed(self, words: ir.Value, slot: ir.Value) -> ir.Value:
        return self._landed(words, arith.addi(slot, mlir.i32(self.num_barriers)))


def _wait(barrier: ir.Value, phase: mgpu.FragmentedArray) -> None:
    # The instruction gives up after so many nanoseconds at most; Mosaic's lowering asks again.
    nvvm.mbarrier_try_wait_parity(barrier, phase.registers.item(), mlir.i32(10_000_000))
