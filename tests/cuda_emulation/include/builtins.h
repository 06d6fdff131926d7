// CUDA's keywords and built-in functions, for one thread that runs as a fiber of the emulation.
#pragma once
#include <cmath>
#include <cstdint>

#include "emulation.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx (::emulation::view.thread)
#define blockIdx (::emulation::view.block)
#define blockDim (::emulation::view.block_dim)
#define gridDim (::emulation::view.grid_dim)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using std::isfinite;
using std::isinf;
using std::isnan;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> (4 * i) & 7, byte = (from < 4 ? x >> (8 * from) : y >> (8 * (from - 4))) & 255;
    result |= byte << (8 * i);
  }
  return result;
}
inline int __float_as_int(float x) { return emulation::bits_as<int>(x); }
inline float __int_as_float(int x) { return emulation::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return emulation::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits_as<float>(x); }

template <class T>
inline T __ldg(const T* pointer, EMULATION_SITE) {
  emulation::check_global(pointer, sizeof(T), alignof(T), site);
  return *pointer;
}

inline int atomicAdd(int* pointer, int value, EMULATION_SITE) {
  emulation::check_atomic(pointer, 4, 4, site);
  emulation::maybe_yield();
  const int old = *pointer;
  *pointer = old + value;
  return old;
}

inline unsigned atomicOr(unsigned* pointer, unsigned value, EMULATION_SITE) {
  emulation::check_atomic(pointer, 4, 4, site);
  emulation::maybe_yield();
  const unsigned old = *pointer;
  *pointer = old | value;
  return old;
}

inline void __syncthreads(EMULATION_SITE) { emulation::block_barrier(site); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMULATION_SITE) {
  emulation::collective(emulation::kSyncWarp, mask, 0, site);
}

// Values go through the collective as 32 bits.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, EMULATION_SITE) {
  static_assert(sizeof(T) == 4);
  const uint32_t* all = emulation::collective(emulation::kShuffle, mask, emulation::bits_as<uint32_t>(value), site);
  return emulation::bits_as<T>(all[source % 32]);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, EMULATION_SITE) {
  static_assert(sizeof(T) == 4);
  const unsigned lane = emulation::view.thread.x % 32;
  const uint32_t* all = emulation::collective(emulation::kShuffleUp, mask, emulation::bits_as<uint32_t>(value), site);
  return emulation::bits_as<T>(all[lane >= distance ? lane - distance : lane]);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, EMULATION_SITE) {
  static_assert(sizeof(T) == 4);
  const unsigned lane = emulation::view.thread.x % 32;
  const uint32_t* all = emulation::collective(emulation::kShuffleDown, mask, emulation::bits_as<uint32_t>(value), site);
  return emulation::bits_as<T>(all[lane + distance < 32 ? lane + distance : lane]);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance, EMULATION_SITE) {
  static_assert(sizeof(T) == 4);
  const unsigned lane = emulation::view.thread.x % 32;
  const uint32_t* all = emulation::collective(emulation::kShuffleXor, mask, emulation::bits_as<uint32_t>(value), site);
  return emulation::bits_as<T>(all[(lane ^ distance) % 32]);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_SITE) {
  const uint32_t* all = emulation::collective(emulation::kVote, mask, predicate != 0, site);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= all[i] << i;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_SITE) { return __ballot_sync(mask, predicate, site) != 0; }
inline int __all_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return __ballot_sync(mask, predicate, site) == 0xFFFFFFFFu;
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, EMULATION_SITE) {
  const uint32_t* all = emulation::collective(emulation::kReduce, mask, value, site);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= all[i];
  return result;
}
inline int __reduce_max_sync(unsigned mask, int value, EMULATION_SITE) {
  const uint32_t* all = emulation::collective(emulation::kReduce, mask, static_cast<uint32_t>(value), site);
  int result = value;
  for (int i = 0; i < 32; ++i) result = std::max(result, static_cast<int>(all[i]));
  return result;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, EMULATION_SITE) {
  const uint32_t* all = emulation::collective(emulation::kReduce, mask, value, site);
  return *std::min_element(all, all + 32);
}
template <class T>
inline T __reduce_add_sync(unsigned mask, T value, EMULATION_SITE) {
  const uint32_t* all = emulation::collective(emulation::kReduce, mask, static_cast<uint32_t>(value), site);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result += all[i];
  return static_cast<T>(result);
}
