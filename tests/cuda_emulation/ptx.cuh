// The same names as xla_ffi/csrc/ptx.cuh, emulated. Takes its place when the kernels are compiled for the CPU.
#pragma once
#include <cmath>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fgattn::ptx {

inline uint32_t shared_address(const void* pointer, EMULATION_SITE) { return emulation::shared_address(pointer, site); }

inline void barrier_init(uint32_t barrier, int count, EMULATION_SITE) { emulation::barrier_init(barrier, count, site); }
inline void barrier_init_fence() {}
inline void barrier_wait(uint32_t barrier, uint32_t parity, EMULATION_SITE) {
  emulation::barrier_wait(barrier, parity, site);
}
inline bool barrier_test(uint32_t barrier, uint32_t parity, EMULATION_SITE) {
  return emulation::barrier_test(barrier, parity, site);
}
inline void barrier_arrive(uint32_t barrier, EMULATION_SITE) { emulation::barrier_arrive(barrier, site); }

template <int kLineBytes>
inline void copy_async_16(uint32_t shared, const void* global, EMULATION_SITE) {
  emulation::copy_async_16(shared, global, site);
}
inline void store_shared_zeros_16(uint32_t shared, EMULATION_SITE) {
  std::memset(const_cast<char*>(emulation::shared_pointer(shared, 16, site)), 0, 16);
}
inline void fence_shared_stores() {}
inline void copy_async_arrive(uint32_t barrier, EMULATION_SITE) { emulation::copy_async_arrive(barrier, site); }
inline void fence_async_proxy() { emulation::fence_async_proxy(); }

template <int kRegisters>
inline void give_registers(EMULATION_SITE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulation::set_registers(kRegisters, false, site);
}
template <int kRegisters>
inline void take_registers(EMULATION_SITE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulation::set_registers(kRegisters, true, site);
}

inline float exp2(float x) {
  if (x != x) return emulation::bits_as<float>(0x7FFFFFFFu);  // the NaN that a GPU gives
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // ftz
}

inline float log2(float x) { return log2f(x); }
inline float reciprocal(float x) { return 1.0f / x; }

template <class Element>
inline uint32_t pack(float low, float high);
template <>
inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  return emulation::float_as_bfloat16(low) | uint32_t{emulation::float_as_bfloat16(high)} << 16;
}
template <>
inline uint32_t pack<__half>(float low, float high) {
  return emulation::float_as_half(low) | uint32_t{emulation::float_as_half(high)} << 16;
}

template <class Element>
inline float unpack(uint32_t pair, int high);
template <>
inline float unpack<__nv_bfloat16>(uint32_t pair, int high) {
  return emulation::bits_as<float>(high ? pair & 0xFFFF0000u : pair << 16);
}
template <>
inline float unpack<__half>(uint32_t pair, int high) {
  return emulation::half_as_float(static_cast<uint16_t>(high ? pair >> 16 : pair));
}

inline void wait_for_kernels_before() {}

inline uint32_t highest_bit(uint32_t x) { return x == 0 ? 0xFFFFFFFFu : 31 - __builtin_clz(x); }

inline uint32_t low_half(uint32_t x) { return x & 0xFFFFu; }
inline uint32_t high_half(uint32_t x) { return x >> 16; }

inline const char* opaque(const char* pointer) { return pointer; }

inline uint32_t load_shared(uint32_t shared, EMULATION_SITE) {
  emulation::maybe_yield();
  return *reinterpret_cast<const volatile uint32_t*>(emulation::shared_pointer(shared, 4, site));
}
inline int4 load_shared_int4(uint32_t shared, EMULATION_SITE) {
  emulation::maybe_yield();
  int4 x;
  std::memcpy(&x, emulation::shared_pointer(shared, 16, site), 16);
  return x;
}
inline void load_matrices(uint32_t (&x)[4], uint32_t shared, EMULATION_SITE) {
  emulation::load_matrices(x, shared, site);
}
inline uint32_t uniform(uint32_t x, EMULATION_SITE) { return __reduce_or_sync(0xFFFFFFFFu, x, site); }

}  // namespace fgattn::ptx
