#pragma once
#include "builtins.h"
struct __nv_bfloat16 {
  unsigned short bits;
};
