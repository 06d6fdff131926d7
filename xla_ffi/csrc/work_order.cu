// The order of work of a mask: (row, kept keys) of every row, most keys first, ties by lower row.
#include <cuda_runtime.h>

#include "launch.h"

namespace fgattn {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// One warp a row: population counts of the bits below num_keys, left as (row, count) at the row's own place.
__global__ void __launch_bounds__(kThreads) count_rows(WorkOrderArgs args) {
  const int row = (blockIdx.x * kThreads + threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  if (row >= args.num_masks * args.num_rows) return;
  const uint4* words = reinterpret_cast<const uint4*>(args.bits + static_cast<int64_t>(row) * args.num_words);
  auto kept = [&](uint32_t word, int first_key) {
    const int left = args.num_keys - first_key;
    return left >= 32 ? __popc(word) : left > 0 ? __popc(word & ((1u << left) - 1)) : 0;
  };
  int count = 0;
  for (int i = lane; i < args.num_words / 4; i += kWarp) {
    const uint4 four = __ldg(words + i);
    count +=
        kept(four.x, 128 * i) + kept(four.y, 128 * i + 32) + kept(four.z, 128 * i + 64) + kept(four.w, 128 * i + 96);
  }
  count = __reduce_add_sync(0xFFFFFFFFu, count);
  if (lane == 0) reinterpret_cast<int2*>(args.work_order)[row] = int2{row % args.num_rows, count};
}

// One block a mask: the place of a row is the number of rows before it. Quadratic, and a few microseconds for the
// hundreds of rows that a mask has.
__global__ void __launch_bounds__(kThreads) sort_rows(WorkOrderArgs args) {
  extern __shared__ int counts[];
  int2* order = reinterpret_cast<int2*>(args.work_order) + static_cast<int64_t>(blockIdx.x) * args.num_rows;
  for (int row = threadIdx.x; row < args.num_rows; row += kThreads) counts[row] = order[row].y;
  __syncthreads();
  for (int row = threadIdx.x; row < args.num_rows; row += kThreads) {
    const int count = counts[row];
    int place = 0;
    for (int other = 0; other < args.num_rows; ++other) {
      place += counts[other] > count || (counts[other] == count && other < row);
    }
    order[place] = int2{row, count};
  }
}

constexpr int kMostRows = 48 * 1024 / sizeof(int);  // shared memory that needs no permission

}  // namespace

const char* launch_work_order(const WorkOrderArgs& args, cudaStream_t stream) {
  if (args.num_rows > kMostRows) return "the work order takes at most 12288 rows a head";
  const int64_t threads = int64_t{args.num_masks} * args.num_rows * kWarp;
  if (threads == 0) return nullptr;
  count_rows<<<static_cast<unsigned>((threads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(args);
  const int counts = (args.num_rows + 3) / 4 * 4;  // compiled, the loop over them reads up to four at once
  sort_rows<<<args.num_masks, kThreads, counts * sizeof(int), stream>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fgattn
