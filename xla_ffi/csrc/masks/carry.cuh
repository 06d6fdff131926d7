// The PTX that comparisons of many keys need and C++ does not give.
#pragma once
#include <cstdint>

namespace fgattn::ptx {

// bits * 2, and 1 more if `x` reaches a bound, of which the negative is given: a bound of 2^32, for 0, is never reached.
// Two instructions on two pipes, where a comparison, a selection and an OR are three on one.
__device__ __forceinline__ uint32_t shift_in_reached(uint32_t bits, uint32_t x, uint32_t negative_bound) {
  asm("{\n.reg .u32 sum;\nadd.cc.u32 sum, %1, %2;\naddc.u32 %0, %0, %0;\n}" : "+r"(bits) : "r"(x), "r"(negative_bound));
  return bits;
}

}  // namespace fgattn::ptx
