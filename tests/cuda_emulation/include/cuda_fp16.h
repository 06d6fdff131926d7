#pragma once
#include "builtins.h"
struct __half {
  unsigned short bits;
};
inline float __half2float(__half x) { return emulation::half_as_float(x.bits); }
