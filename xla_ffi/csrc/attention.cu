// Starts the attention kernel: picks the instantiation, sets it up on the current device, and fills its parameters.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "attention_kernel.cuh"
#include "launch.h"

namespace fgattn {
namespace {

template <class C>
const char* launch(const AttentionArgs& args, cudaStream_t stream) {
  auto* kernel = attention_kernel<C>;
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SharedMemory<C>));
  }
  if (error == cudaSuccess) error = cudaMemsetAsync(args.next_item, 0, sizeof(int32_t), stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int heads = args.batch * args.num_heads, blocks = num_sms * C::kBlocksPerSm;
  const bool few = int64_t{heads} * args.num_rows < 4 * blocks;
  KernelParams params{args, Schedule{heads, args.num_rows, few ? 0 : args.num_rows - args.num_rows / 4}};
  const int items = heads * args.num_rows;
  kernel<<<items < blocks ? items : blocks, C::kThreads, sizeof(SharedMemory<C>), stream>>>(params);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Element, int kHeadDim>
const char* launch_block(const AttentionArgs& args, cudaStream_t stream) {
  if (args.query_block == 128) return launch<Config<Element, kHeadDim, 128>>(args, stream);
  if (args.query_block == 64) return launch<Config<Element, kHeadDim, 64>>(args, stream);
  return "the kernel takes 64 or 128 queries per slice";
}

template <class Element>
const char* launch_head(const AttentionArgs& args, cudaStream_t stream) {
  if (args.head_dim == 128) return launch_block<Element, 128>(args, stream);
  if (args.head_dim == 64) return launch_block<Element, 64>(args, stream);
  return "the kernel takes head widths 64 and 128";
}

}  // namespace

const char* launch_attention(const AttentionArgs& args, cudaStream_t stream) {
  return args.dtype == DType::kBFloat16 ? launch_head<__nv_bfloat16>(args, stream) : launch_head<__half>(args, stream);
}

}  // namespace fgattn
