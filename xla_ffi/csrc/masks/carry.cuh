// Comparisons of many keys in few instructions, by PTX that C++ does not give.
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

// The integer below x a, of [0, 128), plus 128; in the lowest byte.
__device__ __forceinline__ uint32_t floor_to_byte(float x, float a) {
  return __float_as_uint(__fmaf_rd(x, a, 0x1p23f + 128));
}

}  // namespace fgattn::ptx
