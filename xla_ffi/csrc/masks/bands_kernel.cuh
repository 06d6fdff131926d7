// Between which scores the last key that a row keeps must lie: its band (rank_kernel.cuh), from a sample of its scores.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

#include "masks/mean_kernel.cuh"

namespace fgattn {

constexpr int kBandThreads = 128, kBandBins = 512;  // bins of a warp
constexpr int kBandBytes = kBandThreads / kWarp * kBandBins * sizeof(int);

// A warp a row: the band, from the row's sample.
static __global__ void __launch_bounds__(kBandThreads) bands_kernel(const __grid_constant__ MeanWork work) {
  extern __shared__ __align__(16) int band_bins[];
  const MeanMaskArgs& args = work.args;
  const int lane = threadIdx.x % kWarp, num_words = work.sample_words(), num_keys = args.scores.num_keys;
  const int64_t row = int64_t{blockIdx.x} * (kBandThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= work.rows()) return;
  constexpr int kWords = kSampleWords / kWarp, kOfLane = kBandBins / kWarp;
  int* bins = band_bins + threadIdx.x / kWarp * kBandBins + lane;  // of this lane: bins[kWarp * i]
  uint32_t sample[kWords];
  float least = INFINITY, most = -INFINITY;
#pragma unroll
  for (int i = 0; i < kWords; ++i) sample[i] = __ldg(work.samples(row) + min(i * kWarp + lane, num_words - 1));
#pragma unroll
  for (int i = 0; i < 2 * kWords; ++i) {
    const float here = ptx::unpack<__half>(sample[i / 2], i % 2);
    least = fminf(least, here), most = fmaxf(most, here);
  }
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    least = fminf(least, __shfl_xor_sync(kAllLanes, least, distance));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, distance));
  }
  const float2* parts =
      work.partial(static_cast<int>(row / args.scores.num_rows), static_cast<int>(row % args.scores.num_rows), 0);
  const float2 part = lane < work.summed_parts ? parts[lane] : float2{-INFINITY, 0};
  float reference = part.x, total = part.y;
#pragma unroll
  for (int distance = 1; distance < kMostKeyParts; distance *= 2) {
    reference = fmaxf(reference, __shfl_xor_sync(kAllLanes, reference, distance));
  }
  reference = MeanWork::finite_or_zero(__shfl_sync(kAllLanes, reference, 0));
  total *= ptx::exp2(part.x - reference);
#pragma unroll
  for (int distance = 1; distance < kMostKeyParts; distance *= 2) total += __shfl_xor_sync(kAllLanes, total, distance);
  const float lse = reference + ptx::log2(__shfl_sync(kAllLanes, total, 0));
  const float bin_of_unit = kBandBins / fmaxf(most - least, 0x1p-10f), width = 1 / bin_of_unit;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) bins[kWarp * i] = 0;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2 * kWords; ++i) {
    const float place = (ptx::unpack<__half>(sample[i / 2], i % 2) - least) * bin_of_unit;
    const int bin = static_cast<int>(fminf(fmaxf(place, 0), kBandBins - 1));  // NaN has the first one
    if (i / 2 * kWarp + lane < num_words) atomicAdd(bins - lane + bin % kOfLane * kWarp + bin / kOfLane, 1);
  }
  __syncwarp();

  struct Interval {
    float lower, upper;
  };
  const float of_sample = 0.5f / num_words;  // 1 over the sampled keys
  // Where the cut lies if keys below it make up `light` of the row, in number or in mass. An edge of a bin bounds it if
  // five standard deviations and eight sampled keys are to spare.
  const auto find = [&](bool by_mass, float light) -> Interval {
    const auto weight = [&](int bin) {
      return by_mass ? ptx::exp2(least + (bin + 0.5f) * width - lse) * num_keys * of_sample : of_sample;
    };
    float sums[2] = {0, 0};  // of weights, and of their squares
#pragma unroll 1
    for (int i = 0; i < kOfLane; ++i) {
      const float here = weight(lane * kOfLane + i), number = static_cast<float>(bins[kWarp * i]);
      sums[0] = fmaf(number, here, sums[0]), sums[1] = fmaf(number * here, here, sums[1]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float up_to = sums[i];
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const float theirs = __shfl_up_sync(kAllLanes, up_to, distance);
        if (lane >= distance) up_to += theirs;
      }
      up_to = __shfl_up_sync(kAllLanes, up_to, 1);
      sums[i] = lane == 0 ? 0.0f : up_to;
    }
    int lower = -1, upper = kBandBins + 1;  // edges
#pragma unroll 1
    for (int i = 0; i <= kOfLane; ++i) {
      const int bin = lane * kOfLane + i;
      const float here = weight(bin), gap = fabsf(light - sums[0]) - 8 * here;
      const float variance = fmaxf(sums[1] - sums[0] * sums[0] * of_sample, 0.0f);
      if (gap > 0 && gap * gap > 25 * variance) {
        if (sums[0] < light) {
          lower = max(lower, bin);
        } else {
          upper = min(upper, bin);
        }
      }
      if (i == kOfLane) break;  // the edge behind is the next lane's first, and the last lane's last
      const float number = static_cast<float>(bins[kWarp * i]);
      sums[0] = fmaf(number, here, sums[0]), sums[1] = fmaf(number * here, here, sums[1]);
    }
    lower = __reduce_max_sync(kAllLanes, lower), upper = __reduce_min_sync(kAllLanes, upper);
    // Beyond the sample: heavy keys may be in none, up to a probability of 1.
    const float beyond = (most - least) / 2, highest = by_mass ? fmaxf(lse, most) + 1 : most + beyond;
    return {lower < 0 ? least - beyond : least + lower * width, upper > kBandBins ? highest : least + upper * width};
  };
  const auto of_count = [&](int count) { return 1 - static_cast<float>(count) / num_keys; };
  const SelectRule& rule = args.rule;
  const int most_keys = min(rule.max_keys, num_keys);
  Interval cut = rule.rule == Rule::kTopP ? find(true, 1 - rule.value) : find(false, of_count(work.top_k()));
  if (rule.rule == Rule::kTopP && rule.min_keys > 1) {
    const Interval fewest = find(false, of_count(min(rule.min_keys, num_keys)));
    cut = {fminf(cut.lower, fewest.lower), fminf(cut.upper, fewest.upper)};
  }
  if (rule.rule == Rule::kTopP && most_keys < num_keys) {
    const Interval largest = find(false, of_count(most_keys));
    cut = {fmaxf(cut.lower, largest.lower), fmaxf(cut.upper, largest.upper)};
  }
  cut.lower -= fabsf(cut.lower) * 0x1p-10f, cut.upper += fabsf(cut.upper) * 0x1p-10f;  // samples have 16 bits
  if (lane != 0) return;
  // A score that is no number, or infinite, shows in the sum of all.
  *work.band(row) = {fabsf(lse) < INFINITY ? cut.lower : NAN, fmaxf(cut.upper - cut.lower, 0x1p-10f), lse};
}

}  // namespace fgattn
