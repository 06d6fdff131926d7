// Starts dense attention that finds a mask on its way, and the kernel that counts what each row keeps.
#include <algorithm>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "masks/best_key.cuh"
#include "masks/one_pass_kernel.cuh"
#include "masks/one_pass_launch.h"

namespace fgattn {
namespace {

// One block a row of the mask: its count, and the best key of a row that keeps nothing.
template <class Element>
__global__ void __launch_bounds__(kBestThreads) finish_rows_kernel(const __grid_constant__ OnePassArgs call) {
  const AttentionArgs& args = call.attention;
  extern __shared__ __align__(8) int of_threads[];  // counts or scores, then keys
  const int64_t row = blockIdx.x;
  uint32_t* bits = call.bits + row * args.num_words;
  int count = 0;
  for (int i = threadIdx.x; i < args.num_words; i += kBestThreads) count += __popc(bits[i]);
  count = __reduce_add_sync(kAllLanes, count);
  if (threadIdx.x % kWarp == 0) of_threads[threadIdx.x / kWarp] = count;
  __syncthreads();
  count = __reduce_add_sync(kAllLanes, of_threads[threadIdx.x % (kBestThreads / kWarp)]) / (kWarp * kWarp / kBestThreads);
  if (count != 0 || !call.keep_best) {
    if (threadIdx.x == 0) call.counts[row] = count;
    return;
  }
  const int64_t head = row / args.num_rows;
  const int batch = static_cast<int>(head / args.num_heads), of_batch = static_cast<int>(head % args.num_heads);
  const int first = static_cast<int>(row % args.num_rows) * args.query_block;
  const int last = min(first + args.query_block, args.num_queries);
  const WorkItem work{batch, of_batch, 0, 0};
  const Element* queries = static_cast<const Element*>(args.query) + query_offset(work, args.query_strides);
  const Element* keys = static_cast<const Element*>(args.key) + key_offset(args, work, args.key_strides);
  __syncthreads();  // everybody has added up the counts
  const int best = best_key(args.num_keys, of_threads, [&](int key) {
    float here = 0;  // the probability of no query
    for (int position = first; position < last; ++position) {
      const int token = min(max(query_token(args, work, position), 0), args.num_queries - 1);
      const float lse = call.last_lse[head * args.num_queries + token];
      if (lse == -INFINITY) continue;
      const Element* query = queries + token * args.query_strides.token;
      const float product = dot(query, keys + key * args.key_strides.token, args.head_dim);
      here = fmaxf(here, expf(fmaf(product, args.scale, -lse)));
    }
    return here;
  });
  if (threadIdx.x != 0) return;
  bits[best / 32] = 1u << (best % 32);
  call.counts[row] = 1;
}

template <class C>
cudaError_t launch(const OnePassArgs& args, int num_sms, cudaStream_t stream) {
  auto* kernel = one_pass_kernel<C>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(OnePassMemory<C>));
  if (error != cudaSuccess) return error;
  const int items_of_head = (args.attention.num_queries + C::kQueries - 1) / C::kQueries;
  const int items = args.attention.batch * args.attention.num_heads * items_of_head;
  const Workspace workspace{args.attention.workspace, nullptr, nullptr, 0};
  const OnePassParams params{{args.attention, {}, workspace, false}, args, items_of_head, items};
  kernel<<<std::min(num_sms, items), C::kThreads, sizeof(OnePassMemory<C>), stream>>>(params);
  return cudaGetLastError();
}

template <class Element, int kHeadDim>
cudaError_t launch_blocks(const OnePassArgs& args, int num_sms, cudaStream_t stream) {
  const cudaError_t error = args.attention.query_block == 128
                                ? launch<OnePassConfig<Element, kHeadDim, 128>>(args, num_sms, stream)
                                : launch<OnePassConfig<Element, kHeadDim, 64>>(args, num_sms, stream);
  if (error != cudaSuccess) return error;
  auto* kernel = finish_rows_kernel<Element>;
  const int rows = args.attention.batch * args.attention.num_heads * args.attention.num_rows;
  kernel<<<rows, kBestThreads, kBestBytes, stream>>>(args);
  return cudaGetLastError();
}

template <class Element>
cudaError_t launch_widths(const OnePassArgs& args, int num_sms, cudaStream_t stream) {
  return args.attention.head_dim == 128 ? launch_blocks<Element, 128>(args, num_sms, stream)
                                        : launch_blocks<Element, 64>(args, num_sms, stream);
}

}  // namespace

const char* launch_one_pass(const OnePassArgs& call, cudaStream_t stream) {
  const AttentionArgs& args = call.attention;
  if (args.head_dim != 64 && args.head_dim != 128) return "the kernel takes head widths 64 and 128";
  if (args.query_block != 64 && args.query_block != 128) return "the kernel takes 64 or 128 queries per slice";
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(args.workspace, 0, kWorkspaceCounters * sizeof(int32_t), stream);
  }
  if (error == cudaSuccess) {
    const int64_t words = int64_t{args.batch} * args.num_heads * args.num_rows * args.num_words;
    error = cudaMemsetAsync(call.bits, 0, words * sizeof(uint32_t), stream);
  }
  if (error == cudaSuccess) {
    error = args.dtype == DType::kBFloat16 ? launch_widths<__nv_bfloat16>(call, num_sms, stream)
                                           : launch_widths<__half>(call, num_sms, stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fgattn
