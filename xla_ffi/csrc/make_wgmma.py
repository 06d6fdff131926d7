"""Writes wgmma.cuh: one wrapper per tile width and dtype around the warpgroup matrix product of Hopper.

The instruction takes every accumulator register as an operand of its own, which no template can spell.
Run after a change here:  python xla_ffi/csrc/make_wgmma.py > xla_ffi/csrc/wgmma.cuh
"""

WIDTHS = (64, 96, 128, 144)
DTYPES = {"__nv_bfloat16": "bf16", "__half": "f16"}

HEAD = """\
// Warpgroup matrix products: 64 rows x N columns += 64 x 16 times 16 x N, float32 sums in registers.
// Made by make_wgmma.py.
//
// Thread t of a warpgroup holds, of column block c (8 columns), d[4c], d[4c+1]: row 16 (t/32) + (t%32)/4, columns
// 8c + 2 (t%4) and the next; d[4c+2], d[4c+3]: the same 8 rows below. The A operand in registers has the same layout
// over 16 columns, packed in pairs.
// clang-format off
#pragma once
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fgattn {

// Shared-memory operand in the 128-byte swizzle: lines of 64 columns of 16 bits, 8 lines an atom of 1024 bytes.
// `leading`: bytes between panels of 64 columns (read only where the operand is summed across lines). Adding n to the
// low word moves the operand by 16 n bytes.
struct Descriptor {
  static constexpr uint32_t kHigh = (1u << 30) | (1024 >> 4);
  uint32_t low;
  __device__ __forceinline__ Descriptor(uint32_t shared, uint32_t leading)
      : low((leading >> 4 << 16) | (shared >> 4)) {}
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const {
    uint64_t whole;
    asm("mov.b64 %0, {%1, %2};" : "=l"(whole) : "r"(low + (bytes >> 4)), "r"(kHigh));
    return whole;
  }
};

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <class Element, int kColumns>
struct Wgmma;
"""

BODY = """
template <>
struct Wgmma<{element}, {n}> {{
  // d = (accumulate ? d : 0) + A B^T, A from registers, B from shared memory with lines along the summed axis.
  __device__ __forceinline__ static void times_transposed(float (&d)[{count}], const uint32_t* a, uint64_t b,
                                                          bool accumulate) {{
    asm volatile(
        "{{\\n"
        ".reg .pred p;\\n"
        "setp.ne.b32 p, %{p}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx}.{ptx} {{{regs}}}, "
        "{{{a}}}, %{b}, p, 1, 1, 0;\\n"
        "}}\\n"
        : {outputs}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
  }}
  // The same with both operands from shared memory.
  __device__ __forceinline__ static void times_transposed(float (&d)[{count}], uint64_t a, uint64_t b,
                                                          bool accumulate) {{
    asm volatile(
        "{{\\n"
        ".reg .pred p;\\n"
        "setp.ne.b32 p, %{ss_p}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx}.{ptx} {{{regs}}}, "
        "%{count}, %{ss_b}, p, 1, 1, 0, 0;\\n"
        "}}\\n"
        : {outputs}
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  }}
  // d += A B, A from registers, B from shared memory with lines along the columns of d.
  __device__ __forceinline__ static void times(float (&d)[{count}], const uint32_t* a, uint64_t b) {{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx}.{ptx} {{{regs}}}, "
        "{{{a}}}, %{b}, 1, 1, 1, 1;\\n"
        : {outputs}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }}
}};
"""


def wrapper(element: str, ptx: str, n: int) -> str:
    """The wrapper of one dtype and `n` columns."""
    count = n // 2
    return BODY.format(
        element=element, ptx=ptx, n=n, count=count,
        regs=", ".join(f"%{i}" for i in range(count)),
        outputs=", ".join(f'"+f"(d[{i}])' for i in range(count)),
a=", ".join(f"%{count + i}" for i in range(4)), b=count + 4, p=count + 5,
        ss_b=count + 1, ss_p=count + 2,
    )  # fmt: skip


def header(widths: tuple[int, ...] = WIDTHS) -> str:
    """The text of wgmma.cuh."""
    bodies = "".join(wrapper(element, ptx, n) for element, ptx in DTYPES.items() for n in widths)
    return f"{HEAD}{bodies}\n}}  // namespace fgattn\n"


if __name__ == "__main__":
    print(header(), end="")
