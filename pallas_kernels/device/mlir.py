"""Short names for the MLIR operations that the inline code of this folder is made of."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

WARPGROUP = 128
LANES = 32
WARPS = 4
NUMBERS = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)
"""Layout of int32[128]: entry i is in thread i of the warpgroup."""
NUMBERS_TYPE = plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.dtype(jnp.int32), layout=NUMBERS)


def inline(*arg_types: Any, returns: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turns a function that writes MLIR for one warpgroup into one that a Pallas kernel can call.

    Args:
        arg_types: `plgpu.RefType` of each reference and layout of each array; a context comes before them.
        returns: `plgpu.ShapeDtypeStruct` of what comes back, if anything.
    """
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=returns)


def i32_type() -> ir.Type:
    """Signless 32-bit integers."""
    return ir.IntegerType.get_signless(32)


def i64_type() -> ir.Type:
    """Signless 64-bit integers."""
    return ir.IntegerType.get_signless(64)


def i32(value: int) -> ir.Value:
    """A 32-bit constant."""
    return arith.constant(i32_type(), value)


def hold(value: ir.Value) -> mgpu.FragmentedArray:
    """The array of `NUMBERS_TYPE` whose entries are the threads' values."""
    register = vector.broadcast(ir.VectorType.get((1,), i32_type()), value)
    layout = mgpu.WGStridedFragLayout((WARPGROUP,), vec_size=1)
    return mgpu.FragmentedArray(_registers=np.array([register], dtype=object), _layout=layout, _is_signed=True)


def held(numbers: mgpu.FragmentedArray) -> ir.Value:
    """This thread's entry of an array of `NUMBERS_TYPE`."""
    return element(numbers.registers.item(), 0)


def equal(a: ir.Value, b: ir.Value) -> ir.Value:
    """Whether `a == b`."""
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def below(a: ir.Value, b: ir.Value) -> ir.Value:
    """Whether `a < b`, signed."""
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def at_least(a: ir.Value, b: ir.Value) -> ir.Value:
    """Whether `a >= b`, signed."""
    return arith.cmpi(arith.CmpIPredicate.sge, a, b)


def clamp(value: ir.Value, most: ir.Value) -> ir.Value:
    """The value, at least 0 and at most `most`."""
    return arith.maxsi(arith.minsi(value, most), i32(0))


def wide_product(value: ir.Value, factor: int) -> ir.Value:
    """64-bit product of a row and the distance of rows: long sequences reach past 4 GB."""
    return arith.muli(arith.extsi(i64_type(), value), arith.constant(i64_type(), factor))


def thread() -> ir.Value:
    """Thread of the warpgroup, 0 to 127."""
    return arith.remui(mgpu.utils.thread_idx(), i32(WARPGROUP))


def lane() -> ir.Value:
    """Lane of the warp, 0 to 31."""
    return arith.remui(mgpu.utils.thread_idx(), i32(LANES))


def warp() -> ir.Value:
    """Warp of the warpgroup, 0 to 3."""
    return arith.divui(thread(), i32(LANES))


def from_lane(value: ir.Value, source: ir.Value) -> ir.Value:
    """The 32-bit value that lane `source` of this warp holds."""
    return nvvm.shfl_sync(i32(0xFFFFFFFF), value, source, i32(LANES - 1), nvvm.ShflKind.idx)


def global_pointer(ref: ir.Value) -> ir.Value:
    """Where a reference to global memory begins."""
    # Without the cast ptxas does not know which memory it is and takes slower, generic loads.
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.memref_ptr(ref))


def shared_pointer(ref: ir.Value) -> ir.Value:
    """Where a reference to shared memory begins."""
    return mgpu.utils.memref_ptr(ref)


def byte(pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
    """The pointer moved by a number of bytes."""
    return mgpu.utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def load(kind: ir.Type, pointer: ir.Value, index: ir.Value) -> ir.Value:
    """Element `index` of an array of `kind`."""
    return llvm.load(kind, mgpu.utils.getelementptr(pointer, [index], kind))


def element(value: ir.Value, index: int) -> ir.Value:
    """One element of a vector."""
    return vector.extract(value, dynamic_position=[], static_position=[index])


def row_bytes(ref: ir.Value) -> int:
    """Distance of two rows of a `[rows, H]` reference of 16-bit values; it is known when a kernel is lowered."""
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    return 2 * strides[0]


def fence_async_proxy() -> None:
    """Orders what this thread sees of shared memory before its later `wgmma`."""
    nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
