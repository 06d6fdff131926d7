// masks/carry.cuh in C++.
#pragma once
#include <cstdint>

namespace fgattn::ptx {

inline uint32_t shift_in_reached(uint32_t bits, uint32_t x, uint32_t negative_bound) {
  return bits * 2 + static_cast<uint32_t>((uint64_t{x} + negative_bound) >> 32);
}

}  // namespace fgattn::ptx
