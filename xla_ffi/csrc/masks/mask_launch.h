// What the kernels that make masks take and how they are started; axes and strides as in launch.h.
#pragma once
#include <cstdint>

#include "launch.h"

namespace fgattn {

// Queries, keys, and how they are scored.
struct ScoreArgs {
  const void* query;           // [B, T, N, H]
  const void* key;             // [B, S, K, H]
  const float* lse;            // [B, N, T], natural logarithm, of dense attention
  const float* scale;          // [], factor of the scores, finite
  const int32_t* query_order;  // [B|1, N|1, T], or null for raster
  TokenStrides query_strides, key_strides;
  MaskStrides query_order_strides;
  int32_t batch, num_queries, num_keys, num_heads, num_kv_heads, head_dim;
  int32_t query_block, num_rows, num_words;
  DType dtype;
};

struct ExactMaskArgs {
  ScoreArgs scores;
  const float* log_threshold;  // [N], natural logarithm of the largest probability that is not kept
  uint32_t* bits;              // [B, N, R, W], docs/mask_format.md
  int32_t* counts;             // [B, N, R], kept keys
  bool keep_best;              // a row that keeps nothing keeps its best key
};

enum class Rule : int32_t { kThreshold, kTopP, kTopK };

// How many keys a row keeps: `Budget` of fgattn_jax.predictors, without `keep`.
struct SelectRule {
  Rule rule;
  float value;  // threshold, or top-p
  int32_t top_k, min_keys, max_keys;
  float head_floor;
};

struct ExactMassArgs {
  ScoreArgs scores;
  SelectRule rule;
  uint32_t* bits;     // [B, N, R, W]
  int32_t* counts;    // [B, N, R]
  float* workspace;   // mass_workspace_size numbers
  int32_t workspace_heads;
};

// Numbers for the masses of so many heads, and a floor for each.
inline constexpr int64_t mass_workspace_size(int64_t heads, int64_t num_rows, int64_t num_words) {
  return heads * (num_rows * num_words * 32 + 4);
}

// Masks of mean queries. `lse` of the scores is not read.
struct MeanMaskArgs {
  ScoreArgs scores;
  int32_t num_means;           // parts of a row with a mean each, a power of two up to kMostMeans
  bool ranks;                  // by `rule`; otherwise by `log_threshold`
  const float* log_threshold;  // [N], as of ExactMaskArgs
  bool keep_best;              // as of ExactMaskArgs, without `ranks`
  SelectRule rule;
  uint32_t* bits;           // [B, N, R, W]
  int32_t* counts;          // [B, N, R]
  int32_t* workspace;       // mean_workspace_size numbers, at a multiple of 16 bytes
  int32_t workspace_heads;  // whose probabilities it holds, 1 or more; not read without `ranks`
};

inline constexpr int32_t kMostMeans = 8, kMostKeyParts = 16;  // parts that the keys are taken in

// Means of a head, as many as blocks take.
inline constexpr int32_t kMeanLines = 256;
inline constexpr int64_t mean_lines(int64_t num_rows, int64_t num_means) {
  return (num_rows * num_means + kMeanLines - 1) / kMeanLines * kMeanLines;
}

inline constexpr int32_t kSampleWords = 1024;  // of a row, two scores each
inline constexpr int32_t kGuessNumbers = kSampleWords + 3 + 1;  // of a row: sample, band, flag

// Numbers of 32 bits: means of 16 bits, reference and sum of every part of the keys, and where keys are ranked, the
// probabilities of `ranked_heads` heads in 16 bits, a floor for each, and kGuessNumbers a row; 0 heads where they are not.
inline constexpr int64_t mean_workspace_size(int64_t heads, int64_t num_rows, int64_t num_words, int64_t head_dim,
                                             int64_t num_means, int64_t ranked_heads) {
  return heads * mean_lines(num_rows, num_means) * (head_dim / 2 + 2 * kMostKeyParts) +
         ranked_heads * (num_rows * num_words * 32 + 4) + (ranked_heads > 0 ? heads * num_rows * kGuessNumbers : 0);
}

// These enqueue on `stream`, allocate nothing, never wait for the device, and return null or what went wrong.
const char* launch_exact_mask(const ExactMaskArgs& args, cudaStream_t stream);
const char* launch_exact_mass(const ExactMassArgs& args, cudaStream_t stream);
const char* launch_mean_mask(const MeanMaskArgs& args, cudaStream_t stream);

}  // namespace fgattn
