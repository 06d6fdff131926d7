// How the selection of the best keys is launched.
#pragma once
#include <algorithm>

#include <cuda_runtime.h>

#include "masks/select_kernel.cuh"

namespace fgattn {

// Selects the best keys of `rows` rows. What does not fit in registers goes to shared memory, keys before columns.
template <class Scores>
cudaError_t launch_select(SelectArgs args, int64_t rows, cudaStream_t stream) {
  constexpr int kWords = 227 * 1024 / 4 * Scores::kThreads / kSelectThreads;  // for each of the blocks that a multiprocessor takes
  constexpr int kMostListed = 48;
  const int of_row = sizeof(typename BlockSum<Scores::kThreads>::Parts) / sizeof(int) + 2 * args.num_words + 4;
  const int places = (kWords - of_row) / Scores::kThreads, of_pass = Scores::kOfWord * Scores::kThreads;
  const int held = (args.num_keys + of_pass - 1) / of_pass - Scores::kHeld;
  args.staged = std::min(std::max(held, 0), places - 4);
  args.listed = std::min(places - args.staged, kMostListed);
  const int bytes = 4 * (of_row + (args.staged + args.listed) * Scores::kThreads);
  auto* kernel = select_kernel<Scores>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(rows), Scores::kThreads, bytes, stream>>>(args);
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
