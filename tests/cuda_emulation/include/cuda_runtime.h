#pragma once
#include "builtins.h"
#include "cuda_runtime_api.h"
