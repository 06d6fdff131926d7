// The kernels and their launch code behind functions that ctypes can call.
#include <string>

#include "emulation.h"
#include "launch.h"
#include "masks/mask_launch.h"
#include "masks/one_pass_launch.h"

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

int emulation_exact_mask_args_bytes() { return sizeof(fgattn::ExactMaskArgs); }

const char* emulation_exact_mask(const fgattn::ExactMaskArgs* args, const emulation::Region* regions, int num_regions,
                                 uint64_t seed, int num_sms) {
  return run(fgattn::launch_exact_mask, *args, regions, num_regions, seed, num_sms);
}

int emulation_exact_mass_args_bytes() { return sizeof(fgattn::ExactMassArgs); }

const char* emulation_exact_mass(const fgattn::ExactMassArgs* args, const emulation::Region* regions, int num_regions,
                                 uint64_t seed, int num_sms) {
  return run(fgattn::launch_exact_mass, *args, regions, num_regions, seed, num_sms);
}

int emulation_mean_mask_args_bytes() { return sizeof(fgattn::MeanMaskArgs); }

const char* emulation_mean_mask(const fgattn::MeanMaskArgs* args, const emulation::Region* regions, int num_regions,
                                uint64_t seed, int num_sms) {
  return run(fgattn::launch_mean_mask, *args, regions, num_regions, seed, num_sms);
}

int emulation_one_pass_args_bytes() { return sizeof(fgattn::OnePassArgs); }

const char* emulation_one_pass(const fgattn::OnePassArgs* args, const emulation::Region* regions, int num_regions,
                               uint64_t seed, int num_sms) {
  return run(fgattn::launch_one_pass, *args, regions, num_regions, seed, num_sms);
}

const char* emulation_work_order(const fgattn::WorkOrderArgs* args, const emulation::Region* regions, int num_regions,
                                 uint64_t seed) {
  return run(fgattn::launch_work_order, *args, regions, num_regions, seed, 1);
}
}
