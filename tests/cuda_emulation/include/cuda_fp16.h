#pragma once
#include "builtins.h"
struct __half {
  unsigned short bits;
};
