// Starts the attention kernel: picks the instantiation, sets it up on the current device, and fills its parameters.
#include <algorithm>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "attention_kernel.cuh"
#include "launch.h"

namespace fgattn {
namespace {

template <class C>
cudaError_t launch(const KernelParams& params, int num_sms, cudaStream_t stream) {
  auto* kernel = attention_kernel<C>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SharedMemory<C>));
  if (error != cudaSuccess) return error;
  const int blocks = std::min(num_sms * C::kBlocksPerSm, params.schedule.size());
  kernel<<<blocks, C::kThreads, sizeof(SharedMemory<C>), stream>>>(params);
  return cudaGetLastError();
}

KernelParams make_params(const AttentionArgs& args, int num_sms) {
  const int heads = args.batch * args.num_heads;
  // The tail that all heads share is a row an SM: it balances rows of unequal length nearly as well as a quarter of all
  // rows, and while it runs, K and V of all heads are in use, more than L2 holds.
  const bool few = int64_t{heads} * args.num_rows < 4 * num_sms;
  const int tail = few ? args.num_rows : std::min(args.num_rows, (num_sms + heads - 1) / heads);
  const Workspace workspace{args.workspace, args.workspace + 1, args.workspace + kWorkspaceCounters,
                            4 * heads * args.num_rows};
  return {args, Schedule{heads, args.num_rows, args.num_rows - tail}, workspace, false};
}

template <class Element, int kHeadDim>
cudaError_t launch_forms(const AttentionArgs& args, int num_sms, cudaStream_t stream) {
  KernelParams params = make_params(args, num_sms);
  if (args.query_block == 128) return launch<Config<Element, kHeadDim, Form::kRow128>>(params, num_sms, stream);
  cudaError_t error = launch<Config<Element, kHeadDim, Form::kPair64>>(params, num_sms, stream);
  if (error != cudaSuccess) return error;
  params.only_left = true;
  params.workspace.next_item += 2;
  return launch<Config<Element, kHeadDim, Form::kRow64>>(params, num_sms, stream);
}

template <class Element>
cudaError_t launch_widths(const AttentionArgs& args, int num_sms, cudaStream_t stream) {
  return args.head_dim == 128 ? launch_forms<Element, 128>(args, num_sms, stream)
                              : launch_forms<Element, 64>(args, num_sms, stream);
}

}  // namespace

const char* launch_attention(const AttentionArgs& args, cudaStream_t stream) {
  if (args.head_dim != 64 && args.head_dim != 128) return "the kernel takes head widths 64 and 128";
  if (args.query_block != 64 && args.query_block != 128) return "the kernel takes 64 or 128 queries per slice";
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(args.workspace, 0, kWorkspaceCounters * sizeof(int32_t), stream);
  }
  if (error == cudaSuccess) {
    error = args.dtype == DType::kBFloat16 ? launch_widths<__nv_bfloat16>(args, num_sms, stream)
                                           : launch_widths<__half>(args, num_sms, stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fgattn
