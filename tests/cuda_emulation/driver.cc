// The kernels and their launch code behind functions that ctypes can call.
#include <string>

#include "emulation.h"
#include "launch.h"

namespace {

std::string last;

template <class Args>
const char* run(const char* (*launch)(const Args&, cudaStream_t), const Args& args, const emulation::Region* regions,
                int num_regions, uint64_t seed, int num_sms) {
  emulation::num_sms = num_sms;
  emulation::begin(regions, num_regions, seed);
  const char* refused = launch(args, nullptr);
  if (refused == nullptr) refused = emulation::error();
  if (refused == nullptr) return nullptr;
  last = refused;
  return last.c_str();
}

}  // namespace

extern "C" {

int emulation_attention_args_bytes() { return sizeof(fgattn::AttentionArgs); }

// Null, or what went wrong (valid until the next call).
const char* emulation_attention(const fgattn::AttentionArgs* args, const emulation::Region* regions, int num_regions,
                                uint64_t seed, int num_sms) {
  return run(fgattn::launch_attention, *args, regions, num_regions, seed, num_sms);
}

const char* emulation_work_order(const fgattn::WorkOrderArgs* args, const emulation::Region* regions, int num_regions,
                                 uint64_t seed) {
  return run(fgattn::launch_work_order, *args, regions, num_regions, seed, 1);
}
}
