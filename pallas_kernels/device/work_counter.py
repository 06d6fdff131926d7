"""The work counter: one number in global memory, from which every line of every block draws its next row.

Rows differ in length, and so blocks must not be given theirs beforehand. A line's copying warpgroups need the next row
first; they draw, and leave a note for the multiplying ones beside the row's last stage.

In the interpreter, with `interpret=True`, nothing is drawn: there is no order in which blocks would come.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from fgattn_jax.pallas_kernels.device import mlir

_ANY = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT
_ITEM_TYPE = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=_SCALAR)
# Mosaic takes those of the warpgroups, 1 to 4.
_NAMED_BARRIER = 8


def take_ticket(counter, part, *, interpret: bool):
    """Draws the next number from a counter in global memory, without waiting for it: the answer is used later.

    Args:
        counter: A semaphore of the whole grid, 0 when the kernel starts; None in the interpreter.
        part: Which of the line's copying warpgroups this is; part 0 draws.
        interpret: Use the form for the interpreter, which draws nothing.

    Returns:
        int32[128], one entry a thread; the drawing thread's is the number. For `share_item`.
    """
    if interpret:
        return jnp.zeros((mlir.WARPGROUP,), jnp.int32)

    @mlir.inline(_ANY, _SCALAR, returns=mlir.NUMBERS_TYPE)
    def draw(_, counter_ref, part):
        number = mgpu.utils.inline_ptx(
            "{ .reg .pred first; setp.ne.s32 first, $2, 0; mov.s32 $0, 0; @first atom.global.add.u32 $0, [$1], 1; }",
            mlir.global_pointer(counter_ref),
            arith.extui(mlir.i32_type(), _draws(part)),
            result_types=mlir.i32_type(),
            has_side_effects=True,
        )
        return mlir.hold(number)

    return draw(counter, part)


def share_item(ticket, first_item, part, parts: int, mail, place, note, *, interpret: bool):
    """Makes the number that one thread drew known to all copying warpgroups of a line, and leaves it for the others.

    Args:
        ticket: From `take_ticket`; that of part 0 counts.
        first_item: What is added to the number.
        part: Which of the line's copying warpgroups this is.
        parts: How many there are; all of them call this together.
        mail: int32 in shared memory; entry `place` is how the number gets from one warpgroup to the others. Two places
            taken in turns are enough.
        place: See `mail`.
        note: int32[1] in shared memory that gets the number too. Whoever waits for the copies that part 0 starts after
            this call may read it.
        interpret: Use the form for the interpreter.

    Returns:
        The item, an int32 scalar.
    """
    if interpret:
        pl.when(part == 0)(lambda: note.__setitem__(0, first_item))
        return first_item

    @mlir.inline(mlir.NUMBERS, _SCALAR, _SCALAR, _ANY, _SCALAR, _ANY, returns=_ITEM_TYPE)
    def share(_, ticket, first_item, part, mail_ref, place, note_ref):
        item = arith.addi(mlir.held(ticket), first_item.registers.item())
        letter = mgpu.utils.getelementptr(mlir.shared_pointer(mail_ref), [place.registers.item()], mlir.i32_type())
        with mgpu.utils.when(_draws(part)):
            llvm.store(item, letter)
            llvm.store(item, mlir.shared_pointer(note_ref))
            # The arrival of copies waits for copies alone; this store must be seen before it.
            mgpu.utils.inline_ptx("fence.acq_rel.cta;", has_side_effects=True)
        if parts == 1:
            mgpu.warpgroup_barrier()
        else:
            mgpu.utils.inline_ptx(f"bar.sync {_NAMED_BARRIER}, {mlir.WARPGROUP * parts};", has_side_effects=True)
        return mgpu.FragmentedArray.splat(llvm.load(mlir.i32_type(), letter), (), is_signed=True)

    return share(ticket, first_item, part, mail, place, note)


def _draws(part: mgpu.FragmentedArray) -> ir.Value:
    """Whether this is the thread that draws for its line."""
    return arith.andi(mlir.equal(mlir.thread(), mlir.i32(0)), mlir.equal(part.registers.item(), mlir.i32(0)))
