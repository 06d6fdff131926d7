// Online softmax of the two query rows that one thread holds of a 64-row accumulator, four threads a row.
//
// Scores become powers of two: p = 2^(s * scale_log2 - m * scale_log2). The reference m of a row is the maximum of its
// first tile. Any other reference gives the same output, since numerator and denominator carry the same factor, as long
// as weights and sums stay finite: later tiles are not searched for their maximum at all. What a thread's weights of a
// tile sum up to shows afterwards, for nothing, whether a score stood too far above the reference; then the tile is
// computed once more with a reference raised to its maximum.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

#include "ptx.cuh"

namespace fgattn {

// The most that a weight may be: float16 ends at 65504; bfloat16 leaves room for sums and outputs in float32.
template <class Element>
constexpr float kMostWeight = 0x1p32f;
template <>
constexpr float kMostWeight<__half> = 0x1p15f;

// The reference of a row that has seen no score above -inf: so far below any that comes that `add_up` sees it, whatever
// the scale.
constexpr float kLowest = -1e30f;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

// kScores: scores of one thread per tile. Rows alternate in pairs: s[4c], s[4c+1] row 0; s[4c+2], s[4c+3] row 1.
template <class Element, int kScores>
struct OnlineSoftmax {
  float scale_log2;
  float reference[2];  // the same in the four threads of a row
  float sum[2];        // of this thread's columns

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2_) : scale_log2(scale_log2_) {}

  // Before the row's first tile becomes weights: its maximum is the reference.
  __device__ __forceinline__ void refer(const float (&s)[kScores]) {
    float top[2];
    row_max(s, top);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      reference[r] = top[r] == -INFINITY ? kLowest : top[r];  // -inf - -inf would be NaN
      sum[r] = 0;
    }
  }

  // Scores -> weights, in place.
  __device__ __forceinline__ void next(float (&s)[kScores]) const {
    const float offset[2] = {reference[0] * scale_log2, reference[1] * scale_log2};
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
      s[i] = ptx::exp2(fmaf(s[i], scale_log2, -offset[0]));
      s[i + 1] = ptx::exp2(fmaf(s[i + 1], scale_log2, -offset[0]));
      s[i + 2] = ptx::exp2(fmaf(s[i + 2], scale_log2, -offset[1]));
      s[i + 3] = ptx::exp2(fmaf(s[i + 3], scale_log2, -offset[1]));
    }
  }

  // Adds up the weights of a tile. Returns whether they are good: if not, give the scores to `raise`. Not a part of
  // `next`: beside them, the compiler lets every sum wait for the exponentials just begun.
  __device__ __forceinline__ bool add_up(const float (&s)[kScores]) {
    float more[2] = {s[1], s[3]};
    tile_sum_[0] = s[0], tile_sum_[1] = s[2];
#pragma unroll
    for (int i = 4; i < kScores; i += 4) {
      tile_sum_[0] += s[i], more[0] += s[i + 1];
      tile_sum_[1] += s[i + 2], more[1] += s[i + 3];
    }
    tile_sum_[0] += more[0], tile_sum_[1] += more[1];
    return !(tile_sum_[0] > kMostWeight<Element> || tile_sum_[1] > kMostWeight<Element>);
  }

  // The tile's scores once more -> weights, in place. The output made so far has to be multiplied by `rescale`.
  __device__ __forceinline__ void raise(float (&s)[kScores], float (&rescale)[2]) {
    float top[2];
    row_max(s, top);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float higher = fmaxf(reference[r], top[r]);
      rescale[r] = ptx::exp2((reference[r] - higher) * scale_log2);
      reference[r] = higher;
      sum[r] *= rescale[r];
    }
    next(s);
    add_up(s);
  }

  // After `add_up` or `raise`.
  __device__ __forceinline__ void add_tile() { sum[0] += tile_sum_[0], sum[1] += tile_sum_[1]; }

 private:
  float tile_sum_[2];

  __device__ __forceinline__ static void row_max(const float (&s)[kScores], float (&top)[2]) {
    top[0] = fmaxf(s[0], s[1]), top[1] = fmaxf(s[2], s[3]);
#pragma unroll
    for (int i = 4; i < kScores; i += 4) {
      top[0] = fmaxf(top[0], fmaxf(s[i], s[i + 1]));
      top[1] = fmaxf(top[1], fmaxf(s[i + 2], s[i + 3]));
    }
    top[0] = quad_max(top[0]), top[1] = quad_max(top[1]);
  }
};

}  // namespace fgattn
