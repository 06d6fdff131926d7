// Forward attention over a slice mask on Hopper: the gather-load kernel (FG-Attn, arXiv 2509.16518, section 4).
#pragma once
#include <cstdint>

#include "config.cuh"
#include "decode.cuh"
#include "gather.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

namespace fgattn {

// The order of work: heads in sequence, so that K and V of a head stay in L2, and most keys first inside a head. The
// shortest quarter of every head comes last, all heads together, to fill what the long rows leave idle. With few rows
// an SM, all of it is done in that second way.
struct Schedule {
  int num_heads_total;  // batch * heads
  int num_rows;
  int rows_by_head;  // rows of each head in the first part

  __device__ __forceinline__ void locate(int item, int& head, int& rank) const {
    const int by_head = num_heads_total * rows_by_head;
    if (item < by_head) {
      head = item / rows_by_head, rank = item - head * rows_by_head;
    } else {
      const int rest = item - by_head, q = rest / num_heads_total;
      rank = rows_by_head + q, head = rest - q * num_heads_total;
    }
  }
  __device__ __forceinline__ int size() const { return num_heads_total * num_rows; }
};

struct KernelParams {
  AttentionArgs args;
  Schedule schedule;
};

// A ring of stages whose barriers lie 8 bytes apart: where a role stands in it.
template <int kDepth>
struct Stage {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kDepth) slot = 0, phase ^= 1;
  }
};

template <class C>
struct Barriers {
  uint32_t query_full, query_empty, tile_full, key_empty, value_empty, list_full, list_empty, item_full, item_empty;
  __device__ __forceinline__ explicit Barriers(const SharedMemory<C>& shared)
      : query_full(ptx::shared_address(&shared.query_full)),
        query_empty(ptx::shared_address(&shared.query_empty)),
        tile_full(ptx::shared_address(shared.tile_full)),
        key_empty(ptx::shared_address(shared.key_empty)),
        value_empty(ptx::shared_address(shared.value_empty)),
        list_full(ptx::shared_address(shared.list_full)),
        list_empty(ptx::shared_address(shared.list_empty)),
        item_full(ptx::shared_address(shared.item_full)),
        item_empty(ptx::shared_address(shared.item_empty)) {}

  __device__ __forceinline__ void init() const {
    constexpr int kConsumerWarps = 4 * C::kConsumers;
    ptx::barrier_init(query_full, 32);
    ptx::barrier_init(query_empty, kConsumerWarps);
    for (int i = 0; i < C::kStages; ++i) {
      ptx::barrier_init(tile_full + 8 * i, C::kGatherThreads);
      ptx::barrier_init(key_empty + 8 * i, kConsumerWarps);
      ptx::barrier_init(value_empty + 8 * i, kConsumerWarps);
    }
    for (int i = 0; i < C::kKeyLists; ++i) {
      ptx::barrier_init(list_full + 8 * i, 1);
      ptx::barrier_init(list_empty + 8 * i, C::kGatherThreads / kWarp);
    }
    for (int i = 0; i < C::kItems; ++i) {
      ptx::barrier_init(item_full + 8 * i, 1);
      ptx::barrier_init(item_empty + 8 * i, 1 + C::kGatherThreads / kWarp + kConsumerWarps);
    }
    ptx::barrier_init_fence();
  }
};

// What every role but the decoder does first: read the next item and let go of its place.
template <class C>
__device__ __forceinline__ WorkItem next_item(const SharedMemory<C>& shared, const Barriers<C>& barriers,
                                              Stage<C::kItems>& stage, int lane) {
  ptx::barrier_wait(barriers.item_full + 8 * stage.slot, stage.phase);
  const int4 raw = ptx::load_shared_int4(ptx::shared_address(&shared.items[stage.slot]));
  __syncwarp();
  if (lane == 0) ptx::barrier_arrive(barriers.item_empty + 8 * stage.slot);
  stage.advance();
  return WorkItem{raw.x, raw.y, raw.z, raw.w};
}

template <class C>
__device__ __forceinline__ int num_tiles(int count) {
  return (count + C::kTileKeys - 1) / C::kTileKeys;
}

// One warp: takes work from the counter, announces it, and turns its bits into key lists.
template <class C>
__device__ __forceinline__ void decode(SharedMemory<C>& shared, const Barriers<C>& barriers, const KernelParams& params,
                                       int lane) {
  const AttentionArgs& args = params.args;
  KeyRing<C::kTileKeys, C::kKeyLists> ring{barriers.list_full, barriers.list_empty, &shared.lists[0][0]};
  Stage<C::kItems> stage;
  while (true) {
    int item = 0;
    if (lane == 0) item = atomicAdd(args.next_item, 1);
    item = __shfl_sync(kAllLanes, item, 0);
    WorkItem work{0, 0, -1, 0};
    if (item < params.schedule.size()) {
      int head, rank;
      params.schedule.locate(item, head, rank);
      work.batch = head / args.num_heads;
      work.head = head - work.batch * args.num_heads;
      const int2 entry = __ldg(reinterpret_cast<const int2*>(args.work_order + work.batch * args.work_order_strides.batch +
                                                             work.head * args.work_order_strides.head) + rank);
      work.row = min(max(entry.x, 0), args.num_rows - 1);
      work.count = min(max(entry.y, 0), args.num_keys);
    }
    ptx::barrier_wait(barriers.item_empty + 8 * stage.slot, stage.phase ^ 1);
    if (lane == 0) {
      shared.items[stage.slot] = work;
      ptx::barrier_arrive(barriers.item_full + 8 * stage.slot);
    }
    stage.advance();
    if (work.row < 0) return;
    if (work.count == 0) continue;
    const uint32_t* row = args.bits + work.batch * args.bits_strides.batch + work.head * args.bits_strides.head +
                          static_cast<int64_t>(work.row) * args.num_words;
    if (work.count < args.num_keys / 16) {
      decode_row<4>(ring, row, args.num_words, args.num_keys, work.count, lane);
    } else {
      decode_row<1>(ring, row, args.num_words, args.num_keys, work.count, lane);
    }
  }
}

// The query that stands at place `place` of the row; past the end, the last one.
template <class C>
__device__ __forceinline__ int query_token(const AttentionArgs& args, const WorkItem& work, int place) {
  const int position = min(work.row * C::kQueryBlock + place, args.num_queries - 1);
  if (args.query_order == nullptr) return position;
  return __ldg(args.query_order + work.batch * args.query_order_strides.batch +
               work.head * args.query_order_strides.head + position);
}

// One warp: gathers the queries of every row through `query_order`, once the consumers are done with the last row's.
template <class C>
__device__ __forceinline__ void load_queries(SharedMemory<C>& shared, const Barriers<C>& barriers,
                                             const KernelParams& params, int lane) {
  const AttentionArgs& args = params.args;
  const int line = lane / 8, chunk = lane % 8;
  const uint32_t query = ptx::shared_address(shared.query);
  Stage<C::kItems> stage;
  uint32_t phase = 0;
  while (true) {
    const WorkItem work = next_item(shared, barriers, stage, lane);
    if (work.row < 0) return;
    if (work.count == 0) continue;
    const char* head = static_cast<const char*>(args.query) +
                       2 * (work.batch * args.query_strides.batch + work.head * args.query_strides.head) + chunk * 16;
    ptx::barrier_wait(barriers.query_empty, phase ^ 1);
    phase ^= 1;
#pragma unroll 4
    for (int i = line; i < C::kQueryBlock; i += 4) {
      const int token = min(max(query_token<C>(args, work, i), 0), args.num_queries - 1);
      const char* source = head + 2 * token * args.query_strides.token;
      const uint32_t target = query + i * kPanelLineBytes + ((chunk ^ (i % 8)) * 16);
#pragma unroll
      for (int panel = 0; panel < C::kHeadDim / kPanelColumns; ++panel) {
        ptx::copy_async_16(target + panel * C::kQueryBlock * kPanelLineBytes, source + panel * kPanelLineBytes);
      }
    }
    ptx::copy_async_arrive(barriers.query_full);
  }
}

// Some warps: key lists -> tiles. Stage j of a row holds the keys of tile j and the values of tile j - 1: what the
// consumers' step j reads.
template <class C>
__device__ __forceinline__ void gather(SharedMemory<C>& shared, const Barriers<C>& barriers, const KernelParams& params,
                                       int thread) {
  const AttentionArgs& args = params.args;
  const int lane = thread % kWarp;
  const Gather<C::kTileKeys, C::kHeadDim, C::kGatherThreads> tile(thread, static_cast<uint32_t>(2 * args.key_strides.token));
  const int group = args.num_heads / args.num_kv_heads;
  KeyRing<C::kTileKeys, C::kKeyLists> ring{barriers.list_full, barriers.list_empty, &shared.lists[0][0]};
  const uint32_t tiles = ptx::shared_address(shared.tiles);
  Stage<C::kItems> item_stage;
  Stage<C::kStages> stage;
  while (true) {
    const WorkItem work = next_item(shared, barriers, item_stage, lane);
    if (work.row < 0) return;
    if (work.count == 0) continue;
    const int64_t kv_head = work.head / group;
    const char* key = static_cast<const char*>(args.key) +
                      2 * (work.batch * args.key_strides.batch + kv_head * args.key_strides.head);
    const char* value = static_cast<const char*>(args.value) +
                        2 * (work.batch * args.value_strides.batch + kv_head * args.value_strides.head);
    const int last = num_tiles<C>(work.count);
    auto behind = ring;  // values follow one tile behind the keys
#pragma unroll 1
    for (int step = 0; step <= last; ++step) {
      const uint32_t here = tiles + stage.slot * 2 * C::kTileBytes;
      if (step < last) {
        ring.wait_full();
        ptx::barrier_wait(barriers.key_empty + 8 * stage.slot, stage.phase ^ 1);
        tile.start(ptx::shared_address(ring.list()), key, here);
        ring.advance();
      } 
      if (step > 0) {
        ptx::barrier_wait(barriers.value_empty + 8 * stage.slot, stage.phase ^ 1);
        tile.start(ptx::shared_address(behind.list()), value, here + C::kTileBytes);
        __syncwarp();
        if (lane == 0) behind.arrive_empty();
        behind.advance();
      }
      ptx::copy_async_arrive(barriers.tile_full + 8 * stage.slot);
      stage.advance();
    }
  }
}

// One warpgroup of 64 queries: scores, softmax, output. Two of them take turns at the tensor cores.
template <class C>
__device__ __forceinline__ void consume(SharedMemory<C>& shared, const Barriers<C>& barriers, const KernelParams& params,
                                        int consumer, int thread) {
  using Element = typename C::Element;
  constexpr int kScores = C::kTileKeys / 2, kOutputs = C::kHeadDim / 2;
  const AttentionArgs& args = params.args;
  const int lane = thread % kWarp;
  const Descriptor queries(ptx::uniform(ptx::shared_address(shared.query) + consumer * 64 * kPanelLineBytes), 16);
  const uint32_t tiles = ptx::shared_address(shared.tiles);
  const float scale_log2 = args.scale * 1.4426950408889634f;
  Stage<C::kItems> item_stage;
  Stage<C::kStages> stage;
  uint32_t query_phase = 0;

  float scores[kScores], output[kOutputs];
  uint32_t weights[kScores / 2];

  // Waits for the stage's tiles and returns where they are.
  auto wait_tiles = [&] {
    ptx::barrier_wait(barriers.tile_full + 8 * stage.slot, stage.phase);
    ptx::fence_async_proxy();  // cp.async wrote the tile through the generic proxy, wgmma reads through the async one
    return ptx::uniform(tiles + stage.slot * 2 * C::kTileBytes);
  };
  auto release = [&](uint32_t barrier) {
    if (lane == 0) ptx::barrier_arrive(barrier);
  };
  auto query_by_key = [&](uint32_t tile) {
    const Descriptor keys(tile, 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::kHeadDim / 16; ++k) {
      const int panel = k / 4, column = k % 4 * 32;
      Wgmma<Element, C::kTileKeys>::shared_by_shared(scores, queries.at(panel * C::kQueryBlock * kPanelLineBytes + column),
                                                     keys.at(panel * C::kTileKeys * kPanelLineBytes + column), k > 0);
    }
    wgmma_commit();
  };
  auto weights_by_value = [&](uint32_t tile) {
    const Descriptor values(tile + C::kTileBytes, C::kTileKeys * kPanelLineBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::kTileKeys / 16; ++k) {
      Wgmma<Element, C::kHeadDim>::registers_by_shared(output, weights + 4 * k, values.at(k * 16 * kPanelLineBytes));
    }
    wgmma_commit();
  };
  auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) weights[i] = ptx::pack<Element>(scores[2 * i], scores[2 * i + 1]);
  };

  if (C::kConsumers == 2 && consumer == 1) ptx::named_barrier_arrive(1, 256);  // the first one begins
  while (true) {
    const WorkItem work = next_item(shared, barriers, item_stage, lane);
    if (work.row < 0) return;
    OnlineSoftmax<kScores> softmax(scale_log2);
    const int tiles_of_row = num_tiles<C>(work.count);
    if (tiles_of_row > 0) {
      const int padding = tiles_of_row * C::kTileKeys - work.count;
      ptx::barrier_wait(barriers.query_full, query_phase);
      query_phase ^= 1;
      query_by_key(wait_tiles());
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) output[i] = 0;
      wgmma_wait<0>();
      release(barriers.key_empty + 8 * stage.slot);
      release(barriers.value_empty + 8 * stage.slot);
      stage.advance();
      if (tiles_of_row == 1) release(barriers.query_empty);
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (column < padding) scores[i] = -INFINITY;
      }
      softmax.first(scores);
      pack_weights();
#pragma unroll 1
      for (int left = tiles_of_row - 1; left > 0; --left) {
        const uint32_t here = wait_tiles();
        if (C::kConsumers == 2) ptx::named_barrier_sync(1 + consumer, 256);
        query_by_key(here);
        weights_by_value(here);
        if (C::kConsumers == 2) ptx::named_barrier_arrive(2 - consumer, 256);
        wgmma_wait<1>();
        release(barriers.key_empty + 8 * stage.slot);
        if (left == 1) release(barriers.query_empty);
        float rescale[2];
        const bool moved = softmax.next(scores, rescale);
        wgmma_wait<0>();
        release(barriers.value_empty + 8 * stage.slot);
        stage.advance();
        pack_weights();
        if (moved) {
#pragma unroll
          for (int i = 0; i < kOutputs; i += 4) {
            output[i] *= rescale[0], output[i + 1] *= rescale[0];
            output[i + 2] *= rescale[1], output[i + 3] *= rescale[1];
          }
        }
      }
      weights_by_value(wait_tiles());
      wgmma_wait<0>();
      release(barriers.key_empty + 8 * stage.slot);
      release(barriers.value_empty + 8 * stage.slot);
      stage.advance();
    }
    const bool empty = tiles_of_row == 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int place = consumer * 64 + thread / kWarp * 16 + lane / 4 + 8 * r;
      const bool inside = work.row * C::kQueryBlock + place < args.num_queries;
      const int token = query_token<C>(args, work, place);
      const float total = empty ? 0.0f : quad_sum(softmax.sum[r]);
      const float inverse = empty ? 0.0f : 1.0f / total;
      if (!inside || static_cast<uint32_t>(token) >= static_cast<uint32_t>(args.num_queries)) continue;
      char* line = static_cast<char*>(args.output) + 2 * (work.batch * args.output_strides.batch +
          work.head * args.output_strides.head + token * args.output_strides.token);
#pragma unroll
      for (int i = 2 * r; i < kOutputs; i += 4) {
        const uint32_t pair = empty ? 0 : ptx::pack<Element>(output[i] * inverse, output[i + 1] * inverse);
        *reinterpret_cast<uint32_t*>(line + 2 * (i / 4 * 8 + lane % 4 * 2)) = pair;
      }
      if (lane % 4 == 0) {
        const float lse = empty ? -INFINITY : softmax.reference[r] * args.scale + logf(total);
        args.lse[(static_cast<int64_t>(work.batch) * args.num_heads + work.head) * args.num_queries + token] = lse;
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) attention_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ __align__(1024) char raw[];
  SharedMemory<C>& shared = *reinterpret_cast<SharedMemory<C>*>(raw);
  const Barriers<C> barriers(shared);
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
  const int thread = threadIdx.x % 128, lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) barriers.init();
  for (int i = threadIdx.x; i < C::kKeyLists * C::kTileKeys; i += C::kThreads) shared.lists[0][i] = 0;
  __syncthreads();
  if (warpgroup < C::kProducers) {
    ptx::give_registers<C::kProducerRegisters>();
    const int warp = threadIdx.x / kWarp;
    if (warp == 0) {
      decode<C>(shared, barriers, params, lane);
    } else if (warp == 1) {
      load_queries<C>(shared, barriers, params, lane);
    } else if (warp >= C::kFirstGatherWarp) {
      gather<C>(shared, barriers, params, threadIdx.x - C::kFirstGatherWarp * kWarp);
    }
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    consume<C>(shared, barriers, params, warpgroup - C::kProducers, thread);
  }
}

}  // namespace fgattn
