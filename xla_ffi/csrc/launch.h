// What the kernels take and how they are started. Knows no XLA: handlers.cc fills these structs from FFI buffers,
// a benchmark or a test may fill them by hand.
//
// Axes: B batch, T queries, S keys, N query heads, K key/value heads (N is a multiple of K), H head width,
// M queries per slice, R = ceil(T / M) rows, W 32-bit words of a mask row (a multiple of 4).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace fgattn {

enum class DType { kBFloat16, kFloat16 };

// Elements from one index to the next along the axes in front of H; H itself is contiguous. From key to key, and from
// value to value, fewer than 2^31.
struct TokenStrides {
  int64_t batch;
  int64_t token;
  int64_t head;
};

// The same for arrays that belong to a mask. An axis of size 1 that serves all has stride 0.
struct MaskStrides {
  int64_t batch;
  int64_t head;
};

struct AttentionArgs {
  const void* query;           // [B, T, N, H]
  const void* key;             // [B, S, K, H]
  const void* value;           // [B, S, K, H]
  const uint32_t* bits;        // [B|1, N|1, R, W], docs/mask_format.md
  const int32_t* work_order;   // [B|1, N|1, R, 2]: (row, kept keys), most keys first
  const int32_t* query_order;  // [B|1, N|1, T], or null for raster
  void* output;                // [B, T, N, H]
  float* lse;                  // [B, N, T], natural logarithm
  int32_t* workspace;          // workspace_size(B, N, R) numbers; the launch sets what it needs
  TokenStrides query_strides, key_strides, value_strides, output_strides;
  MaskStrides bits_strides, work_order_strides, query_order_strides;
  int32_t batch, num_queries, num_keys, num_heads, num_kv_heads, head_dim;
  int32_t query_block, num_rows, num_words;
  float scale;  // finite, not negative
  DType dtype;
};

// Counters, and a list of rows: `Workspace` in attention_kernel.cuh.
inline constexpr int64_t kWorkspaceCounters = 4;
inline constexpr int64_t workspace_size(int64_t batch, int64_t num_heads, int64_t num_rows) {
  return kWorkspaceCounters + 4 * batch * num_heads * num_rows;
}

struct WorkOrderArgs {
  const uint32_t* bits;  // [batches, heads, R, W], contiguous
  int32_t* work_order;   // [batches, heads, R, 2]
  int32_t num_masks;     // batches * heads
  int32_t num_rows, num_words, num_keys;
};

// Both enqueue on `stream`, allocate nothing, never wait for the device, and return null or what went wrong.
const char* launch_attention(const AttentionArgs& args, cudaStream_t stream);
const char* launch_work_order(const WorkOrderArgs& args, cudaStream_t stream);

}  // namespace fgattn
