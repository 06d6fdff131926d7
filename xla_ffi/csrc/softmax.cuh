// Online softmax of the two query rows that one thread holds of a 64-row accumulator, four threads a row.
//
// Scores are kept as powers of two: p = 2^(s * scale_log2 - m * scale_log2). The reference m is only moved when a score
// exceeds it by more than kSlack powers of two: sums and outputs stay below 2^kSlack times what the true maximum
// would give, far from overflow, at the same relative precision, and most tiles need no reduction over threads and no
// rescaling of the output.
#pragma once
#include <cstdint>

#include "ptx.cuh"

namespace fgattn {

constexpr float kSlack = 8.0f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

// kScores: scores of one thread per tile. Rows alternate in pairs: s[4c], s[4c+1] row 0; s[4c+2], s[4c+3] row 1.
template <int kScores>
struct OnlineSoftmax {
  float scale_log2;
  float slack;         // kSlack in units of unscaled scores
  float lowest;        // the reference of a row that has seen no score above -inf
  float reference[2];  // the same in the four threads of a row
  float sum[2];        // of this thread's columns

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2_)
      : scale_log2(scale_log2_), slack(kSlack / scale_log2_), lowest(-3.0e38f / fmaxf(scale_log2_, 1.0f)) {}

  __device__ __forceinline__ static void row_max(const float (&s)[kScores], float (&top)[2]) {
    top[0] = fmaxf(s[0], s[1]), top[1] = fmaxf(s[2], s[3]);
#pragma unroll
    for (int i = 4; i < kScores; i += 4) {
      top[0] = fmaxf(top[0], fmaxf(s[i], s[i + 1]));
      top[1] = fmaxf(top[1], fmaxf(s[i + 2], s[i + 3]));
    }
  }

  __device__ __forceinline__ void exponentials(float (&s)[kScores]) {
    const float offset[2] = {reference[0] * scale_log2, reference[1] * scale_log2};
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
      s[i] = ptx::exp2(fmaf(s[i], scale_log2, -offset[0]));
      s[i + 1] = ptx::exp2(fmaf(s[i + 1], scale_log2, -offset[0]));
      s[i + 2] = ptx::exp2(fmaf(s[i + 2], scale_log2, -offset[1]));
      s[i + 3] = ptx::exp2(fmaf(s[i + 3], scale_log2, -offset[1]));
      sum[0] += s[i] + s[i + 1];
      sum[1] += s[i + 2] + s[i + 3];
    }
  }

  // Scores of the row's first tile -> exponentials, in place.
  __device__ __forceinline__ void first(float (&s)[kScores]) {
    float top[2];
    row_max(s, top);
#pragma unroll
    for (int r = 0; r < 2; ++r) reference[r] = fmaxf(quad_max(top[r]), lowest), sum[r] = 0;  // -inf - -inf would be NaN
    exponentials(s);
  }

  // Scores of a later tile -> exponentials. Returns, the same in the whole warp, whether the output made so far has to
  // be multiplied by `rescale`.
  __device__ __forceinline__ bool next(float (&s)[kScores], float (&rescale)[2]) {
    float top[2];
    row_max(s, top);
    const bool moved = __any_sync(0xFFFFFFFFu, top[0] > reference[0] + slack || top[1] > reference[1] + slack);
    if (moved) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float higher = fmaxf(reference[r], quad_max(top[r]));
        rescale[r] = ptx::exp2((reference[r] - higher) * scale_log2);
        reference[r] = higher;
        sum[r] *= rescale[r];
      }
    }
    exponentials(s);
    return moved;
  }
};

}  // namespace fgattn
