// One-line names for the PTX instructions of Hopper that the kernels use (PTX ISA 8.0 and later, sm_90a).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fgattn::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Barriers in shared memory (mbarrier). A phase ends when `count` arrivals came; `wait` returns when the phase of that
// parity has ended, so that waiting for parity 1 on a fresh barrier returns at once.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity), "r"(10000000)  // ns that the hardware may let the thread sleep: with less it looks again and again
      : "memory");
}

// Whether the phase has ended; does not wait.
__device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// 16 bytes from global to shared memory in the background, past L1, asking L2 to fetch the kLineBytes around them.
template <int kLineBytes>
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global) {
  static_assert(kLineBytes == 128 || kLineBytes == 256);
  if constexpr (kLineBytes == 256) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
  }
}

__device__ __forceinline__ void store_shared_zeros_16(uint32_t shared) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(shared), "r"(0) : "memory");
}

// What this thread stored in shared memory goes before its later arrivals, those of copies too, and can be read by
// wgmma: an arrival of copies waits for copies alone.
__device__ __forceinline__ void fence_shared_stores() {
  asm volatile("fence.acq_rel.cta;\nfence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives when all earlier copies of this thread have landed. `noinc`: counts as one of the barrier's own arrivals.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Orders this thread's view of shared memory, written by ordinary or cp.async stores, before its later wgmma reads.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// In a kernel that `launch` of masks/start.cuh starts early: waits for the kernels before it, and lets the next one
// come. Until then nothing may be read or written that they touch.
__device__ __forceinline__ void wait_for_kernels_before() {
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Number of the highest bit that is set; any number if none is.
__device__ __forceinline__ uint32_t highest_bit(uint32_t x) {
  uint32_t bit;
  asm("bfind.u32 %0, %1;" : "=r"(bit) : "r"(x));
  return bit;
}

// Two float32 numbers -> a pair of 16 bits, the first in the low half.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// One of the two numbers of such a pair.
template <class Element>
__device__ __forceinline__ float unpack(uint32_t pair, int high);
template <>
__device__ __forceinline__ float unpack<__nv_bfloat16>(uint32_t pair, int high) {
  return __uint_as_float(high ? pair & 0xFFFF0000u : pair << 16);
}
template <>
__device__ __forceinline__ float unpack<__half>(uint32_t pair, int high) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(high ? pair >> 16 : pair)));
}

// Halves of a word, taken anew in every loop: the compiler would keep them all in registers beside the words.
__device__ __forceinline__ uint32_t low_half(uint32_t x) {
  uint32_t half;
  asm volatile("and.b32 %0, %1, 0xFFFF;" : "=r"(half) : "r"(x));
  return half;
}
__device__ __forceinline__ uint32_t high_half(uint32_t x) {
  uint32_t half;
  asm volatile("shr.u32 %0, %1, 16;" : "=r"(half) : "r"(x));
  return half;
}

// Hides where a pointer came from, so that sums with it are not taken apart into more instructions.
__device__ __forceinline__ const char* opaque(const char* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

__device__ __forceinline__ uint32_t load_shared(uint32_t shared) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(shared) : "memory");
  return x;
}

// Four 8 x 8 matrices of 16 bits; lane i gives the address of line i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared)
               : "memory");
}

// The same value in all lanes, in a register that the compiler knows to be uniform.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __reduce_or_sync(0xFFFFFFFFu, x); }

__device__ __forceinline__ int4 load_shared_int4(uint32_t shared) {
  int4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}

}  // namespace fgattn::ptx
