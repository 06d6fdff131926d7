// Starts the exact mask kernel, and the one that gives empty rows their best key.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "masks/best_key.cuh"
#include "masks/exact_kernel.cuh"
#include "masks/mask_launch.h"
#include "masks/start.cuh"

namespace fgattn {
namespace {

// One block a row of the mask.
template <class Element>
__global__ void __launch_bounds__(kBestThreads) keep_best_kernel(const __grid_constant__ ExactMaskArgs call) {
  const ScoreArgs& args = call.scores;
  extern __shared__ __align__(8) int best_of_threads[];
  const int64_t row = blockIdx.x;
  if (call.counts[row] != 0) return;
  const int64_t head = row / args.num_rows;
  const int batch = static_cast<int>(head / args.num_heads), of_batch = static_cast<int>(head % args.num_heads);
  const int first = static_cast<int>(row % args.num_rows) * args.query_block;
  const int last = min(first + args.query_block, args.num_queries);
  const Element* queries = static_cast<const Element*>(args.query) + batch * args.query_strides.batch +
                           of_batch * args.query_strides.head;
  const Element* keys = static_cast<const Element*>(args.key) + batch * args.key_strides.batch +
                        of_batch / (args.num_heads / args.num_kv_heads) * args.key_strides.head;
  const int32_t* order = args.query_order == nullptr ? nullptr
                                                     : args.query_order + batch * args.query_order_strides.batch +
                                                           of_batch * args.query_order_strides.head;
  const int best = best_key(args.num_keys, best_of_threads, [&](int key) {
    float here = 0;  // the probability of no query
    for (int position = first; position < last; ++position) {
      const int token = min(max(order == nullptr ? position : order[position], 0), args.num_queries - 1);
      const float lse = args.lse[head * args.num_queries + token];
      if (lse == -INFINITY) continue;
      const Element* query = queries + token * args.query_strides.token;
      const float product = dot(query, keys + key * args.key_strides.token, args.head_dim);
      here = fmaxf(here, expf(fmaf(product, *args.scale, -lse)));
    }
    return here;
  });
  if (threadIdx.x != 0) return;
  call.bits[row * args.num_words + best / 32] = 1u << (best % 32);
  call.counts[row] = 1;
}

template <class C>
cudaError_t launch(const ExactMaskArgs& args, int num_sms, cudaStream_t stream) {
  const int heads = args.scores.batch * args.scores.num_heads;
  const cudaError_t error = cudaMemsetAsync(args.counts, 0, sizeof(int32_t) * heads * args.scores.num_rows, stream);
  if (error != cudaSuccess) return error;
  const ScoreItems items = all_items<C>(args.scores, 0, heads);
  return launch_scores<C>(exact_mask_kernel<C>, items, num_sms, stream, args);
}

template <class Element, int kHeadDim>
cudaError_t launch_blocks(const ExactMaskArgs& args, int num_sms, cudaStream_t stream) {
  const cudaError_t error = args.scores.query_block == 128
                                ? launch<ScoreConfig<Element, kHeadDim, 128>>(args, num_sms, stream)
                                : launch<ScoreConfig<Element, kHeadDim, 64>>(args, num_sms, stream);
  if (error != cudaSuccess || !args.keep_best) return error;
  auto* kernel = keep_best_kernel<Element>;
  const int rows = args.scores.batch * args.scores.num_heads * args.scores.num_rows;
  kernel<<<rows, kBestThreads, kBestBytes, stream>>>(args);
  return cudaGetLastError();
}

template <class Element>
cudaError_t launch_widths(const ExactMaskArgs& args, int num_sms, cudaStream_t stream) {
  return args.scores.head_dim == 128 ? launch_blocks<Element, 128>(args, num_sms, stream)
                                     : launch_blocks<Element, 64>(args, num_sms, stream);
}

}  // namespace

const char* launch_exact_mask(const ExactMaskArgs& args, cudaStream_t stream) {
  int num_sms = 0;
  if (const char* refused = check_scores(args.scores, num_sms)) return refused;
  const cudaError_t error = args.scores.dtype == DType::kBFloat16 ? launch_widths<__nv_bfloat16>(args, num_sms, stream)
                                                                  : launch_widths<__half>(args, num_sms, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fgattn
