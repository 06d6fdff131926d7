// What is done to many keys in few instructions, by PTX that C++ does not give.
#pragma once
#include <cstdint>

namespace fgattn::ptx {

// bits * 2, and 1 more if `x` reaches a bound, of which the negative is given: a bound of 2^32, for 0, is never reached.
// Two instructions on two pipes, where a comparison, a selection and an OR are three on one.
__device__ __forceinline__ uint32_t shift_in_reached(uint32_t bits, uint32_t x, uint32_t negative_bound) {
  asm("{\n.reg .u32 sum;\nadd.cc.u32 sum, %1, %2;\naddc.u32 %0, %0, %0;\n}" : "+r"(bits) : "r"(x), "r"(negative_bound));
  return bits;
}

// bits * 2, and 1 more if `x` is negative; NaN, whatever it was made of, comes out of arithmetic without a sign.
__device__ __forceinline__ uint32_t shift_in_sign(uint32_t bits, float x) {
  return __funnelshift_l(__float_as_uint(x), bits, 1);
}

// x a + b, but 0 where that is negative or NaN, and 1 where it is more.
__device__ __forceinline__ float saturating_fma(float x, float a, float b) {
  float y;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(x), "f"(a), "f"(b));
  return y;
}

// The bits of x a + b, rounded down: for sums of 2^23 to 2^24 the integer below, and the exponent above its 23 bits.
__device__ __forceinline__ uint32_t floor_of_fma(float x, float a, float b) {
  return __float_as_uint(__fmaf_rd(x, a, b));
}

// Where |x| < limit: stores `entry` to shared memory and moves on. Conditions of instructions, not a branch around them.
__device__ __forceinline__ void store_inside(uint32_t& next, uint32_t entry, float x, float limit) {
  asm volatile(
      "{\n.reg .pred inside;\n.reg .f32 size;\nabs.f32 size, %2;\nsetp.lt.f32 inside, size, %3;\n"
      "@inside st.shared.u32 [%0], %1;\n@inside add.u32 %0, %0, 4;\n}"
      : "+r"(next)
      : "r"(entry), "f"(x), "f"(limit)
      : "memory");
}

}  // namespace fgattn::ptx
