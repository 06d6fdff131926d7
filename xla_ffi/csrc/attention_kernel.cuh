// Forward attention over a slice mask on Hopper: the gather-load kernel (FG-Attn, arXiv 2509.16518, section 4).
//
//   work counter, work order, mask bits          K, V                        Q (through query_order)
//          |                                      |                           |
//     [decode] 1 warp --key lists--> [gather] 2 warps --tiles--> [consume] 1-2 warpgroups --> O, LSE
//          |                                                     ^  64 queries each
//          +--items (head, row, count), read by all roles        |
//                                    [load_queries] 1 warp --Q---+
//
// The grid is persistent: a block takes rows from one counter until none is left. All roles walk through the same
// items. A row of n keys has t = ceil(n / kTileKeys) tiles and t + 1 stages; stage j holds the keys of tile j and the
// values of tile j - 1, which is what step j of the consumers reads: S(j) = Q K(j)^T is issued together with O +=
// P(j-1) V(j-1), and the softmax of S(j) runs while the tensor cores finish that and serve the other consumer, with
// which it takes turns.
//
// barrier        arrivals                       who waits, for what
// item_full      1 decoder                      all other roles: the next item stands in its place
// item_empty     1 a warp of those roles        decoder: everybody has read the item that stood there
// list_full      1 decoder                      gather: the key numbers of a tile are written
// list_empty     1 a gather warp                decoder: its keys' and values' copies have been started
// tile_full      1 a gather thread, when its    consumers: a stage has landed
//                copies have landed
// key_empty      1 a consumer warp              gather: S has been computed from the keys
// value_empty    1 a consumer warp              gather: O has been computed from the values
// query_full     1 a lane of the query loader   consumers: Q has landed
// query_empty    1 a consumer warp              query loader: the row's last S has been computed
// named 1, 2     128 + 128                      consumer 0, 1: the other one has issued its products
//
// The caller guarantees the shapes of launch.h. Whatever stands in mask, work order and query order, nothing is read or
// written out of bounds: rows, counts and queries are clamped, and bits past the last key are cleared.
#pragma once
#include <cstdint>

#include "config.cuh"
#include "decode.cuh"
#include "gather.cuh"
#include "launch.h"
#include "pipeline.cuh"
#include "ptx.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

namespace fgattn {

// Rows of the mask that an item stands for; a pair may lack its second row.
template <class C>
__device__ __forceinline__ MaskRows mask_rows(const AttentionArgs& args, int head, int row) {
  const int batch = head / args.num_heads;
  const uint32_t* first = args.bits + batch * args.bits_strides.batch +
                          (head - batch * args.num_heads) * args.bits_strides.head +
                          static_cast<int64_t>(row) * args.num_words;
  const bool has_second = C::kPaired && row + 1 < args.num_rows;
  return {first, first + args.num_words, args.num_words, has_second ? args.num_words : 0, args.num_keys};
}

// One warp: takes work from the counter, announces it, and turns its bits into key lists.
template <class C>
__device__ __forceinline__ void decode(SharedMemory<C>& shared, const Barriers<C>& barriers, const KernelParams& params,
                                       int lane) {
  const AttentionArgs& args = params.args;
  KeyRing<C::kTileKeys, C::kKeyLists> ring{barriers.list_full, barriers.list_empty, &shared.lists[0][0]};
  KeptRing kept{&shared.kept[0][0][0], C::kKeptTiles};
  Stage<C::kItems> stage;
  const int num_items =
      params.only_left ? min(*params.workspace.num_left, params.workspace.most_left) : params.schedule.size();
  while (true) {
    int item = 0;
    if (lane == 0) item = atomicAdd(params.workspace.next_item, 1);
    item = __shfl_sync(kAllLanes, item, 0);
    WorkItem work{0, WorkItem::kNoMore, 0, 0};
    if (item < num_items) {
      if (params.only_left) {
        const int left = params.workspace.left[item];
        work.head = left / args.num_rows, work.row = left - work.head * args.num_rows;
        work.count = count_keys(mask_rows<C>(args, work.head, work.row), lane).first;
      } else {
        int rank;
        params.schedule.locate(item, work.head, rank);
        const int batch = work.head / args.num_heads;
        const int2 entry =
            __ldg(reinterpret_cast<const int2*>(args.work_order + batch * args.work_order_strides.batch +
                                                (work.head - batch * args.num_heads) * args.work_order_strides.head) +
                  rank);
        work.row = min(max(entry.x, 0), args.num_rows - 1);
        work.count = min(max(entry.y, 0), args.num_keys);
        if constexpr (C::kPaired) {
          if (work.row % 2 != 0) continue;  // comes with the row before it
          const RowCounts counts = count_keys(mask_rows<C>(args, work.head, work.row), lane);
          work.count = counts.either;
          if (counts.either > C::kPairPays * (counts.first + counts.second)) {
            if (lane == 0) {
              params.workspace.leave(work.head * args.num_rows + work.row);
              if (work.row + 1 < args.num_rows) params.workspace.leave(work.head * args.num_rows + work.row + 1);
            }
            continue;
          }
        }
      }
    }
    ptx::barrier_wait(barriers.item_empty + 8 * stage.slot, stage.phase ^ 1);
    __syncwarp();  // else the place could be filled, read and let go again before the last lane has looked
    if (lane == 0) {
      shared.items[stage.slot] = work;
      ptx::barrier_arrive(barriers.item_full + 8 * stage.slot);
    }
    stage.advance();
    if (work.row == WorkItem::kNoMore) return;
    if (work.count == 0) continue;
    const MaskRows rows = mask_rows<C>(args, work.head, work.row);
    if (work.count < args.num_keys / 16) {
      decode_rows<C::kPaired ? 2 : 4, C::kPaired>(ring, kept, rows, work.count, lane);
    } else {
      decode_rows<1, C::kPaired>(ring, kept, rows, work.count, lane);
    }
  }
}

// Where an array of a head begins. `head`: batch * heads + head of the query.
__device__ __forceinline__ int64_t query_offset(const AttentionArgs& args, const TokenStrides& strides, int head) {
  const int batch = head / args.num_heads;
  return batch * strides.batch + (head - batch * args.num_heads) * strides.head;
}

__device__ __forceinline__ int64_t key_offset(const AttentionArgs& args, const TokenStrides& strides, int head) {
  const int batch = head / args.num_heads, group = args.num_heads / args.num_kv_heads;
  return batch * strides.batch + (head - batch * args.num_heads) / group * strides.head;
}

// The query that stands at a position; behind the last one, the last.
__device__ __forceinline__ int query_token(const AttentionArgs& args, int head, int position) {
  position = min(position, args.num_queries - 1);
  if (args.query_order == nullptr) return position;
  const int batch = head / args.num_heads;
  return __ldg(args.query_order + batch * args.query_order_strides.batch +
               (head - batch * args.num_heads) * args.query_order_strides.head + position);
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
    if (work.row == WorkItem::kNoMore) return;
    if (work.count == 0) continue;
    const char* head =
        static_cast<const char*>(args.query) + 2 * query_offset(args, args.query_strides, work.head) + chunk * 16;
    ptx::barrier_wait(barriers.query_empty, phase ^ 1);
    phase ^= 1;
#pragma unroll 4
    for (int i = line; i < C::kQueries; i += 4) {
      const int token = query_token(args, work.head, work.row * C::kQueryBlock + i);
      const int inside = min(max(token, 0), args.num_queries - 1);
      const char* source = head + 2 * inside * args.query_strides.token;
      const uint32_t target = query + i * kPanelLineBytes + ((chunk ^ (i % 8)) * 16);
#pragma unroll
      for (int panel = 0; panel < C::kHeadDim / kPanelColumns; ++panel) {
        ptx::copy_async_16<2 * C::kHeadDim>(target + panel * C::kQueries * kPanelLineBytes,
                                            source + panel * kPanelLineBytes);
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
  const Gather<C::kTileKeys, C::kHeadDim, C::kGatherThreads> tile(thread);
  const uint32_t key_bytes = static_cast<uint32_t>(2 * args.key_strides.token);
  const uint32_t value_bytes = static_cast<uint32_t>(2 * args.value_strides.token);
  KeyRing<C::kTileKeys, C::kKeyLists> ring{barriers.list_full, barriers.list_empty, &shared.lists[0][0]};
  const uint32_t tiles = ptx::shared_address(shared.tiles);
  Stage<C::kItems> item_stage;
  Stage<C::kStages> stage;
  while (true) {
    const WorkItem work = next_item(shared, barriers, item_stage, lane);
    if (work.row == WorkItem::kNoMore) return;
    if (work.count == 0) continue;
    const char* key = static_cast<const char*>(args.key) + 2 * key_offset(args, args.key_strides, work.head);
    const char* value = static_cast<const char*>(args.value) + 2 * key_offset(args, args.value_strides, work.head);
    const int last = num_tiles<C>(work.count);
    auto behind = ring;  // values follow one tile behind the keys
#pragma unroll 1
    for (int step = 0; step <= last; ++step) {
      const uint32_t here = tiles + stage.slot * 2 * C::kTileBytes;
      if (step < last) {
        ring.wait_full();
        ptx::barrier_wait(barriers.key_empty + 8 * stage.slot, stage.phase ^ 1);
        tile.start(ptx::shared_address(ring.list()), key, key_bytes, here);
        ring.advance();
      }
      if (step > 0) {
        ptx::barrier_wait(barriers.value_empty + 8 * stage.slot, stage.phase ^ 1);
        tile.start(ptx::shared_address(behind.list()), value, value_bytes, here + C::kTileBytes);
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
__device__ __forceinline__ void consume(SharedMemory<C>& shared, const Barriers<C>& barriers,
                                        const KernelParams& params, int consumer, int thread) {
  using Element = typename C::Element;
  constexpr int kScores = C::kTileKeys / 2, kOutputs = C::kHeadDim / 2;
  const AttentionArgs& args = params.args;
  const int lane = thread % kWarp;
  const Descriptor queries(ptx::uniform(ptx::shared_address(shared.query) + consumer * 64 * kPanelLineBytes), 16);
  const uint32_t tiles = ptx::shared_address(shared.tiles);
  const float scale_log2 = fmaxf(args.scale * 1.4426950408889634f, 1e-30f);  // 0 times a skipped -inf would be NaN
  OnlineSoftmax<kScores> softmax(scale_log2);
  Stage<C::kItems> item_stage;
  Stage<C::kStages> stage;
  uint32_t query_phase = 0;
  int kept_slot = 0;

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
      Wgmma<Element, C::kTileKeys>::shared_by_shared(scores, queries.at(panel * C::kQueries * kPanelLineBytes + column),
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
  // A pair: scores of the keys that this consumer's row skips become -inf.
  auto skip_other_row = [&] {
    const uint32_t* words = shared.kept[kept_slot][consumer % (C::kPaired ? 2 : 1)];
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
      if (i % 16 == 0) mine = ptx::load_shared(ptx::shared_address(words + i / 16)) >> (lane % 4 * 2);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if ((mine >> (i / 4 % 4 * 8 + j) & 1) == 0) scores[i + j] = scores[i + 2 + j] = -INFINITY;
      }
    }
    if (++kept_slot == C::kKeptTiles) kept_slot = 0;
  };
  auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) weights[i] = ptx::pack<Element>(scores[2 * i], scores[2 * i + 1]);
  };

  if (C::kConsumers == 2 && consumer == 1) ptx::named_barrier_arrive(1, 256);  // the first one begins
  while (true) {
    const WorkItem work = next_item(shared, barriers, item_stage, lane);
    if (work.row == WorkItem::kNoMore) return;
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
      if constexpr (C::kPaired) {
        skip_other_row();
      } else {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
          if (column < padding) scores[i] = -INFINITY;
        }
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
        if constexpr (C::kPaired) skip_other_row();
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
    bool finite = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = work.row * C::kQueryBlock + consumer * 64 + thread / kWarp * 16 + lane / 4 + 8 * r;
      const int token = query_token(args, work.head, position);
      const float total = tiles_of_row > 0 ? quad_sum(softmax.sum[r]) : 0.0f;
      const bool empty = total == 0;  // also a row of a pair none of whose keys is its own
      const float inverse = empty ? 0.0f : 1.0f / total;
      if (position >= args.num_queries || static_cast<uint32_t>(token) >= static_cast<uint32_t>(args.num_queries))
        continue;
      char* line = static_cast<char*>(args.output) +
                   2 * (query_offset(args, args.output_strides, work.head) + token * args.output_strides.token);
#pragma unroll
      for (int i = 2 * r; i < kOutputs; i += 4) {
        if constexpr (C::kPaired) finite = finite && isfinite(output[i] + output[i + 1]);
        const uint32_t pair = empty ? 0 : ptx::pack<Element>(output[i] * inverse, output[i + 1] * inverse);
        *reinterpret_cast<uint32_t*>(line + 2 * (i / 4 * 8 + lane % 4 * 2)) = pair;
      }
      if (lane % 4 == 0) {
        const float lse = empty ? -INFINITY : softmax.reference[r] * args.scale + logf(total);
        args.lse[static_cast<int64_t>(work.head) * args.num_queries + token] = lse;
      }
    }
    if constexpr (C::kPaired) {
      // A value that only the other row keeps came in as 0 times itself: NaN if it is not finite. Such rows run alone.
      const int row = work.row + consumer;
      if (__any_sync(kAllLanes, !finite && tiles_of_row > 0) && lane == 0 && row < args.num_rows) {
        params.workspace.leave(work.head * args.num_rows + row);
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    attention_kernel(const __grid_constant__ KernelParams params) {
  static_assert(sizeof(SharedMemory<C>) <= C::kBlockBytes);
  extern __shared__ __align__(1024) char raw[];
  SharedMemory<C>& shared = *reinterpret_cast<SharedMemory<C>*>(raw);
  const Barriers<C> barriers(shared);
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
  const int thread = threadIdx.x % 128, lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) barriers.init();
  int* lists = reinterpret_cast<int*>(shared.lists);
  for (int i = threadIdx.x; i < C::kKeyLists * C::kTileKeys; i += C::kThreads) lists[i] = 0;
  __syncthreads();
  if (warpgroup == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    const int warp = thread / kWarp;
    if (warp == 0) {
      decode<C>(shared, barriers, params, lane);
    } else if (warp == 1) {
      load_queries<C>(shared, barriers, params, lane);
    } else {
      gather<C>(shared, barriers, params, thread - C::kFirstGatherWarp * kWarp);
    }
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    consume<C>(shared, barriers, params, warpgroup - 1, thread);
  }
}

}  // namespace fgattn
