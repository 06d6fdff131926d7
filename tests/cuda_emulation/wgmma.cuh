// The same names as xla_ffi/csrc/wgmma.cuh, emulated. Takes its place when the kernels are compiled for the CPU.
#pragma once
#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fgattn {

struct Descriptor {
  static constexpr uint32_t kHigh = (1u << 30) | (1024 >> 4);
  uint32_t low;
  Descriptor(uint32_t shared, uint32_t leading) : low((leading >> 4 << 16) | (shared >> 4)) {}
  uint64_t at(uint32_t bytes) const { return uint64_t{kHigh} << 32 | (low + (bytes >> 4)); }
};

inline void wgmma_fence() { emulation::product_fence(); }
inline void wgmma_commit(EMULATION_SITE) { emulation::product_commit(site); }
template <int kPending>
inline void wgmma_wait(EMULATION_SITE) {
  emulation::product_wait(kPending, site);
}

template <class Element, int kColumns>
struct Wgmma {
  static_assert(kColumns % 8 == 0 && kColumns <= 256);
  static constexpr bool kHalf = std::is_same_v<Element, __half>;
  static void times_transposed(float (&d)[kColumns / 2], const uint32_t* a, uint64_t b, bool accumulate, EMULATION_SITE) {
    emulation::product(d, kColumns, kHalf, a, 0, b, true, accumulate, site);
  }
  static void times_transposed(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate, EMULATION_SITE) {
    emulation::product(d, kColumns, kHalf, nullptr, a, b, true, accumulate, site);
  }
  static void times(float (&d)[kColumns / 2], const uint32_t* a, uint64_t b, EMULATION_SITE) {
    emulation::product(d, kColumns, kHalf, a, 0, b, false, true, site);
  }
};

}  // namespace fgattn
