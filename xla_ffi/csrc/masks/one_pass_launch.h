// Dense attention that finds the mask of the next steps on its way: what it takes; axes and strides as in launch.h.
#pragma once
#include <cstdint>

#include "launch.h"

namespace fgattn {

struct OnePassArgs {
  AttentionArgs attention;     // dense: `bits` and `work_order` are not read; the workspace has kWorkspaceCounters numbers
  const float* last_lse;       // [B, N, T], natural logarithm, of the step before
  const float* log_threshold;  // [N], natural logarithm of the largest probability that is not kept
  uint32_t* bits;              // [B, N, R, W], docs/mask_format.md
  int32_t* counts;             // [B, N, R], kept keys
  bool keep_best;              // a row that keeps nothing keeps its best key
};

// Enqueues on `stream`, allocates nothing, never waits for the device, and returns null or what went wrong.
const char* launch_one_pass(const OnePassArgs& args, cudaStream_t stream);

}  // namespace fgattn
