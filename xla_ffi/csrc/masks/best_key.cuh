// The best key of a row: for rows that keep nothing, which are rare, so plain loops will do.
#pragma once
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fgattn {

constexpr int kBestThreads = 256;
constexpr int kBestBytes = 2 * kBestThreads * sizeof(int);  // of shared memory

__device__ __forceinline__ float number(const __nv_bfloat16* x) { return __bfloat162float(*x); }
__device__ __forceinline__ float number(const __half* x) { return __half2float(*x); }

// q k as float32, in one order.
template <class Element>
__device__ __forceinline__ float dot(const Element* query, const Element* key, int head_dim) {
  float product = 0;
  for (int i = 0; i < head_dim; ++i) product = fmaf(number(query + i), number(key + i), product);
  return product;
}

// The key with the largest score(key), the lowest one among equals, for thread 0; NaN is never the best. All kBestThreads
// threads of the block call it; `shared` has kBestBytes.
template <class Score>
__device__ __forceinline__ int best_key(int num_keys, int* shared, Score score) {
  float* best_score = reinterpret_cast<float*>(shared);
  int* best_of = shared + kBestThreads;
  float most = -1;
  int best = 0;
  for (int key = threadIdx.x; key < num_keys; key += kBestThreads) {
    const float here = score(key);
    if (here > most) most = here, best = key;
  }
  best_score[threadIdx.x] = most, best_of[threadIdx.x] = best;
  __syncthreads();
  if (threadIdx.x != 0) return best;
  for (int i = 1; i < kBestThreads; ++i) {
    const bool better = best_score[i] > most || (best_score[i] == most && best_of[i] < best);
    if (better) most = best_score[i], best = best_of[i];
  }
  return best;
}

}  // namespace fgattn
