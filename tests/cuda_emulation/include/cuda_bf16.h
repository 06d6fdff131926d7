#pragma once
#include "builtins.h"
struct __nv_bfloat16 {
  unsigned short bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return emulation::bits_as<float>(uint32_t{x.bits} << 16); }
