// masks/carry.cuh in C++.
#pragma once
#include <cmath>
#include <cstdint>

namespace fgattn::ptx {

inline uint32_t shift_in_reached(uint32_t bits, uint32_t x, uint32_t negative_bound) {
  return bits * 2 + static_cast<uint32_t>((uint64_t{x} + negative_bound) >> 32);
}

inline uint32_t shift_in_sign(uint32_t bits, float x) { return bits * 2 + (x < 0 ? 1 : 0); }

inline float saturating_fma(float x, float a, float b) {
  const float y = std::fma(x, a, b);
  return y >= 0 ? std::fmin(y, 1.0f) : 0.0f;
}

inline uint32_t floor_to_byte(float x, float a) { return static_cast<uint32_t>(std::floor(double{x} * a)) + 128; }

}  // namespace fgattn::ptx
