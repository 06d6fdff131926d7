// What the roles of the attention kernel share: the order of work, its parameters, the barriers between them. The
// picture and the barrier table stand in attention_kernel.cuh.
#pragma once
#include <cstdint>

#include "config.cuh"
#include "decode.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace fgattn {

// The order of work: heads in sequence, so that K and V of a head stay in L2, and most keys first inside a head. The
// shortest rows of every head come last, all heads together, to fill what the long rows leave idle. With few rows an
// SM, all of it is done in that second way.
struct Schedule {
  int num_heads;  // batch * heads
  int num_rows;
  int rows_by_head;  // rows of each head in the first part

  __device__ __forceinline__ void locate(int item, int& head, int& rank) const {
    const int by_head = num_heads * rows_by_head;
    if (item < by_head) {
      head = item / rows_by_head, rank = item - head * rows_by_head;
    } else {
      const int rest = item - by_head, q = rest / num_heads;
      rank = rows_by_head + q, head = rest - q * num_heads;
    }
  }
  __host__ __device__ __forceinline__ int size() const { return num_heads * num_rows; }
};

// Two counters, then the rows that kPair64 leaves to kRow64, as head * num_rows + row. A row may stand there several
// times: then several blocks write the same numbers to the same places.
struct Workspace {
  int32_t* next_item;
  int32_t* num_left;
  int32_t* left;
  int most_left;

  __device__ __forceinline__ void leave(int row) const {
    const int at = atomicAdd(num_left, 1);
    if (at < most_left) left[at] = row;
  }
};

struct KernelParams {
  AttentionArgs args;
  Schedule schedule;
  Workspace workspace;
  bool only_left;  // kRow64 after kPair64: take rows from the workspace
};

template <class C>
struct Barriers {
  uint32_t query_full, query_empty, voted, tile_full, tile_empty, list_full, list_empty, item_full, item_empty;
  __device__ __forceinline__ explicit Barriers(const SharedMemory<C>& shared)
      : query_full(ptx::shared_address(&shared.query_full)),
        query_empty(ptx::shared_address(&shared.query_empty)),
        voted(ptx::shared_address(shared.voted)),
        tile_full(ptx::shared_address(shared.tile_full)),
        tile_empty(ptx::shared_address(shared.tile_empty)),
        list_full(ptx::shared_address(shared.list_full)),
        list_empty(ptx::shared_address(shared.list_empty)),
        item_full(ptx::shared_address(shared.item_full)),
        item_empty(ptx::shared_address(shared.item_empty)) {}

  __device__ __forceinline__ void init() const {
    constexpr int kConsumerWarps = 4 * C::kConsumers, kGatherWarps = C::kGatherThreads / kWarp;
    auto init = [](uint32_t barrier, int warps) { ptx::barrier_init(barrier, warps * kArrivalsPerWarp); };
    ptx::barrier_init(query_full, C::kGatherThreads);
    init(query_empty, kConsumerWarps);
    for (int i = 0; i < C::kConsumers; ++i) init(voted + 8 * i, 4);
    for (int i = 0; i < C::kStages; ++i) {
      ptx::barrier_init(tile_full + 8 * i, C::kGatherThreads);
      init(tile_empty + 8 * i, kConsumerWarps);
    }
    for (int i = 0; i < C::kKeyLists; ++i) {
      init(list_full + 8 * i, C::kDecodeWarps);
      init(list_empty + 8 * i, kGatherWarps);
    }
    for (int i = 0; i < C::kItems; ++i) {
      ptx::barrier_init(item_full + 8 * i, 1);
      init(item_empty + 8 * i, C::kDecodeWarps - 1 + kGatherWarps + kConsumerWarps);
    }
    ptx::barrier_init_fence();
  }
};

// What every warp but the first decoder does first: read the next item and let go of its place.
template <class C>
__device__ __forceinline__ WorkItem next_item(const SharedMemory<C>& shared, const Barriers<C>& barriers,
                                              Stage<C::kItems>& stage, int lane) {
  ptx::barrier_wait(barriers.item_full + 8 * stage.slot(), stage.phase());
  const int4 raw = ptx::load_shared_int4(ptx::shared_address(&shared.items[stage.slot()]));
  __syncwarp();
  arrive_warp(barriers.item_empty + 8 * stage.slot(), lane);
  stage.advance();
  return WorkItem{raw.x, raw.y, raw.z, raw.w};
}

template <class C>
__device__ __forceinline__ int num_tiles(int count) {
  return (count + C::kTileKeys - 1) / C::kTileKeys;
}

}  // namespace fgattn
