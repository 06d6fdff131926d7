// What all launches of kernels that score whole rows have in common.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "masks/scores.cuh"

namespace fgattn {

// Null and the device's multiprocessors, or what is wrong.
inline const char* check_scores(const ScoreArgs& args, int& num_sms) {
  if (args.head_dim != 64 && args.head_dim != 128) return "the kernel takes head widths 64 and 128";
  if (args.query_block != 64 && args.query_block != 128) return "the kernel takes 64 or 128 queries per slice";
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Starts a kernel; if `early`, its blocks come as those of the kernel before leave, and not when all of it has ended:
// then it has to call `wait_for_kernels_before`.
template <class Args>
cudaError_t launch(void (*kernel)(Args), int64_t blocks, int threads, size_t bytes, cudaStream_t stream, bool early,
                   const Args& args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{
      dim3(static_cast<unsigned>(blocks)), dim3(threads), bytes, stream, &attribute, early ? 1u : 0u};
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <class C>
ScoreItems all_items(const ScoreArgs& args, int first_head, int num_heads) {
  return {first_head, num_heads, (args.num_queries + C::kQueries - 1) / C::kQueries,
          (args.num_keys + C::kTileKeys - 1) / C::kTileKeys};
}

// Starts `kernel(args, items)` with the shared memory of its config.
template <class C, class Args>
cudaError_t launch_scores(void (*kernel)(Args, ScoreItems), const ScoreItems& items, int num_sms, cudaStream_t stream,
                          const Args& args) {
  static_assert(sizeof(ScoreMemory<C>) <= 227 * 1024);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(ScoreMemory<C>));
  if (error != cudaSuccess) return error;
  const int blocks = static_cast<int>(std::min(int64_t{num_sms}, int64_t{items.size()} * items.num_tiles));
  kernel<<<blocks, C::kThreads, sizeof(ScoreMemory<C>), stream>>>(args, items);
  return cudaGetLastError();
}

}  // namespace fgattn
