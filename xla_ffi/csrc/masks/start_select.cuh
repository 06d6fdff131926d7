// How the selection of the best keys is launched.
#pragma once
#include <cuda_runtime.h>

#include "masks/select_kernel.cuh"

namespace fgattn {

// Selects the best keys of `rows` rows.
template <class Scores>
cudaError_t launch_select(const SelectArgs& args, int64_t rows, cudaStream_t stream) {
  const int bytes = static_cast<int>(SelectMemory<Scores>::bytes(args.num_words));
  auto* kernel = select_kernel<Scores>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(rows), kSelectThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

// The same for whole heads, with the floor of each if the rule has one; `floors`: room for a number a head.
template <class Scores>
cudaError_t select_rows(SelectArgs args, int heads, const ScoreArgs& scores, int32_t* floors, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(heads) * args.num_rows;
  if (args.rule.head_floor > 0) {
    SelectArgs counting = args;
    counting.bits = nullptr;
    const cudaError_t error = launch_select<Scores>(counting, rows, stream);
    if (error != cudaSuccess) return error;
    head_floor_kernel<<<heads, kWarp, 0, stream>>>(args.counts, args.num_rows, scores.num_queries, scores.query_block,
                                                   args.rule.head_floor, floors);
    args.floors = floors;
  }
  return launch_select<Scores>(args, rows, stream);
}

}  // namespace fgattn
