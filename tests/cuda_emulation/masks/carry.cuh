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

inline uint32_t floor_of_fma(float x, float a, float b) {
  // The sum is exact in float64 as long as it has some 50 bits; then rounded down.
  const double sum = std::fma(double{x}, double{a}, double{b});
  float y = static_cast<float>(sum);
  if (static_cast<double>(y) > sum) y = std::nextafterf(y, -INFINITY);
  return static_cast<uint32_t>(__float_as_int(y));
}

inline void store_inside(uint32_t& next, uint32_t entry, float x, float limit, EMULATION_SITE) {
  if (!(std::fabs(x) < limit)) return;
  std::memcpy(const_cast<char*>(emulation::shared_pointer(next, 4, site)), &entry, 4);
  next += 4;
}

}  // namespace fgattn::ptx
