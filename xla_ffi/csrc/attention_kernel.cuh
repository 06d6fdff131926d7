// Forward attention over a slice mask on Hopper: the gather-load kernel (FG-Attn, arXiv 2509.16518, section 4).
//
//   work counter, work order, mask bits          K, V, and Q (through query_order)
//          |                                      |
//     [decode] 1-4 warps --key lists--> [gather] 2-4 warps --tiles, Q--> [consume] 1-2 warpgroups --> O, LSE
//          |                                                             ^  64 queries each
//          +--items (batch, head, row, count), read by all roles---------+
//
// The grid is persistent: a block takes rows from one counter until none is left. All roles walk through the same
// items. A row of n keys has t = ceil(n / kTileKeys) tiles and t + 1 stages; stage j holds the keys of tile j and the
// values of tile j - 1, which is what step j of the consumers reads: they start S(j) = Q K(j)^T and O += P(j-1) V(j-1),
// and make P(j) of S(j) while the tensor cores finish the second product and serve the other consumer. Q stands in
// registers: what a product reads from shared memory, copies cannot use to write there.
//
// barrier        arrivals                       who waits, for what
// item_full      1 first decoder                all other warps: the next item stands in its place
// item_empty     1 a warp of those              first decoder: everybody has read the item that stood there
// list_full      1 a decoder                    gather: the key numbers of a tile are written
// list_empty     1 a gather warp                decoders: its keys' and values' copies have been started
// tile_full      1 a gather thread, when its    consumers: a stage has landed
//                copies have landed
// tile_empty     1 a consumer warp              gather: S has been computed from the keys, O from the values
// query_full     1 a gather thread, when its    consumers: Q has landed
//                copies have landed
// query_empty    1 a consumer warp              gather: Q stands in registers
// voted          1 a warp of a consumer         that consumer: is there a warp with too high a score?
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
__device__ __forceinline__ MaskRows mask_rows(const AttentionArgs& args, const WorkItem& work) {
  const uint32_t* first = args.bits + work.batch * args.bits_strides.batch + work.head * args.bits_strides.head +
                          static_cast<int64_t>(work.row) * args.num_words;
  const bool has_second = C::kPaired && work.row + 1 < args.num_rows;
  return {first, first + args.num_words, args.num_words, has_second ? args.num_words : 0, args.num_keys};
}

// Takes items of work from the counter, in their order. By one warp of a block.
template <class C>
class ItemSource {
 public:
  __device__ __forceinline__ ItemSource(const KernelParams& params, int lane) : params_(params), lane_(lane) {
    num_items_ =
        params.only_left ? min(*params.workspace.num_left, params.workspace.most_left) : params.schedule.size();
  }
  __device__ __forceinline__ void begin() { next_ = take(); }

  __device__ __forceinline__ WorkItem next() {
    while (true) {
      const int item = __shfl_sync(kAllLanes, next_, 0);
      if (item >= num_items_) return {0, 0, WorkItem::kNoMore, 0};
      next_ = take();  // on its way while this one is decoded
      WorkItem work;
      if (params_.only_left ? locate_left(item, work) : locate(item, work)) return work;
    }
  }

 private:
  __device__ __forceinline__ int take() const { return lane_ == 0 ? atomicAdd(params_.workspace.next_item, 1) : 0; }

  // A row that pairs have left over.
  __device__ __forceinline__ bool locate_left(int item, WorkItem& work) const {
    const AttentionArgs& args = params_.args;
    const int left = params_.workspace.left[item], head = left / args.num_rows;
    work.batch = head / args.num_heads, work.head = head - work.batch * args.num_heads;
    work.row = left - head * args.num_rows;
    work.count = count_keys(mask_rows<C>(args, work), lane_).first;
    return true;
  }

  // Returns whether this kernel does the item. Of a pair it takes the first row, and leaves pairs of rows that have few
  // keys in common to kRow64.
  __device__ __forceinline__ bool locate(int item, WorkItem& work) const {
    const AttentionArgs& args = params_.args;
    int head, rank;
    params_.schedule.locate(item, head, rank);
    work.batch = head / args.num_heads, work.head = head - work.batch * args.num_heads;
    const int32_t* order =
        args.work_order + work.batch * args.work_order_strides.batch + work.head * args.work_order_strides.head;
    const int2 entry = __ldg(reinterpret_cast<const int2*>(order) + rank);
    work.row = min(max(entry.x, 0), args.num_rows - 1);
    work.count = min(max(entry.y, 0), args.num_keys);
    if constexpr (C::kPaired) {
      if (work.row % 2 != 0) return false;  // comes with the row before it
      const RowCounts counts = count_keys(mask_rows<C>(args, work), lane_);
      work.count = counts.either;
      if (counts.either > C::kPairPays * (counts.first + counts.second)) {
        if (lane_ == 0) {
          params_.workspace.leave(head * args.num_rows + work.row);
          if (work.row + 1 < args.num_rows) params_.workspace.leave(head * args.num_rows + work.row + 1);
        }
        return false;
      }
    }
    return true;
  }

  const KernelParams& params_;
  int lane_, num_items_, next_ = 0;
};

// Some warps: bits -> key lists. The first of them announces the items to all others.
template <class C>
__device__ __forceinline__ void decode(SharedMemory<C>& shared, const Barriers<C>& barriers, const KernelParams& params,
                                       int worker, int lane) {
  using Ring = KeyRing<C::kTileKeys, C::kKeyLists>;
  Ring ring{barriers.list_full, barriers.list_empty, &shared.lists[0][0]};
  KeptRing kept{&shared.kept[0][0][0], C::kKeptTiles};
  ItemSource<C> source(params, lane);
  if (worker == 0) source.begin();
  Stage<C::kItems> stage;
  while (true) {
    WorkItem work;
    if (worker == 0) {
      work = source.next();
      ptx::barrier_wait(barriers.item_empty + 8 * stage.slot(), stage.phase() ^ 1);
      __syncwarp();  // else the place could be filled, read and let go again before the last lane has looked
      if (lane == 0) {
        shared.items[stage.slot()] = work;
        ptx::barrier_arrive(barriers.item_full + 8 * stage.slot());
      }
      stage.advance();
    } else {
      work = next_item(shared, barriers, stage, lane);
    }
    if (work.row == WorkItem::kNoMore) return;
    if (work.count == 0) continue;
    RowDecoder<C::kPaired, C::kDecodeWarps, Ring>(ring, kept, work.count, worker, lane)
        .run(mask_rows<C>(params.args, work));
  }
}

// Where an array of the item's head begins.
__device__ __forceinline__ int64_t query_offset(const WorkItem& work, const TokenStrides& strides) {
  return work.batch * strides.batch + work.head * strides.head;
}

__device__ __forceinline__ int64_t key_offset(const AttentionArgs& args, const WorkItem& work,
                                              const TokenStrides& strides) {
  return work.batch * strides.batch + work.head / (args.num_heads / args.num_kv_heads) * strides.head;
}

// The query that stands at a position; behind the last one, the last.
__device__ __forceinline__ int query_token(const AttentionArgs& args, const WorkItem& work, int position) {
  position = min(position, args.num_queries - 1);
  if (args.query_order == nullptr) return position;
  return __ldg(args.query_order + work.batch * args.query_order_strides.batch +
               work.head * args.query_order_strides.head + position);
}

// Starts the copies of a row's queries, through `query_order`.
template <class C>
__device__ __forceinline__ void load_queries(SharedMemory<C>& shared, const AttentionArgs& args, const WorkItem& work,
                                             int thread) {
  const int line = thread / 8, chunk = thread % 8;
  const char* head = static_cast<const char*>(args.query) + 2 * query_offset(work, args.query_strides) + chunk * 16;
  const uint32_t query = ptx::shared_address(shared.query) + ((chunk ^ (line % 8)) * 16);
  constexpr int kLinesPerPass = C::kGatherThreads / 8;
  static_assert(kLinesPerPass % 8 == 0);
#pragma unroll 2
  for (int i = line; i < C::kQueries; i += kLinesPerPass) {
    const int token = query_token(args, work, work.row * C::kQueryBlock + i);
    const int inside = min(max(token, 0), args.num_queries - 1);
    const char* source = head + 2 * inside * args.query_strides.token;
#pragma unroll
    for (int panel = 0; panel < C::kHeadDim / kPanelColumns; ++panel) {
      ptx::copy_async_16<2 * C::kHeadDim>(query + (panel * C::kQueries + i) * kPanelLineBytes,
                                          source + panel * kPanelLineBytes);
    }
  }
}

// Some warps: key lists -> tiles, and the queries of every row. Stage j of a row holds the keys of tile j and the
// values of tile j - 1: what the consumers' step j reads.
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
  uint32_t query_phase = 0;
  while (true) {
    const WorkItem work = next_item(shared, barriers, item_stage, lane);
    if (work.row == WorkItem::kNoMore) return;
    if (work.count == 0) continue;
    const char* key = static_cast<const char*>(args.key) + 2 * key_offset(args, work, args.key_strides);
    const char* value = static_cast<const char*>(args.value) + 2 * key_offset(args, work, args.value_strides);
    const int last = num_tiles<C>(work.count), padding = last * C::kTileKeys - work.count;
    ptx::barrier_wait(barriers.query_empty, query_phase ^ 1);
    query_phase ^= 1;
    load_queries(shared, args, work, thread);
    ptx::copy_async_arrive(barriers.query_full);
    auto behind = ring;  // values follow one tile behind the keys
#pragma unroll 1
    for (int step = 0; step <= last; ++step) {
      const uint32_t here = tiles + stage.slot() * 2 * C::kTileBytes;
      ptx::barrier_wait(barriers.tile_empty + 8 * stage.slot(), stage.phase() ^ 1);
      if (step < last) {
        ring.wait_full();
        tile.start(ptx::shared_address(ring.list()), key, key_bytes, here);
        ring.advance();
      }
      if (step > 0) {
        const uint32_t list = ptx::shared_address(behind.list()), there = here + C::kTileBytes;
        if (step == 1 && padding > 0) {
          tile.start_behind(padding, list, value, value_bytes, there);  // weight 0 times an infinite value would be NaN
        } else {
          tile.start(list, value, value_bytes, there);
        }
        __syncwarp();
        behind.arrive_empty(lane);
        behind.advance();
      }
      ptx::copy_async_arrive(barriers.tile_full + 8 * stage.slot());
      stage.advance();
    }
  }
}

// Lane i of every four gets the i-th number of each of them, in their order.
__device__ __forceinline__ void transpose_in_quads(uint32_t (&x)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32_t theirs = __shfl_xor_sync(kAllLanes, upper ? x[i] : x[i + distance], distance);
      (upper ? x[i] : x[i + distance]) = theirs;
    }
  }
}

// Looks at no weight. One that does (masks/one_pass_kernel.cuh) sees those of all keys, tiles of the last keys first.
struct NoFinder {
  static constexpr bool kFinds = false;
};

// One warpgroup of 64 queries: scores, softmax, output.
template <class C, class Finder>
__device__ __forceinline__ void consume(SharedMemory<C>& shared, const Barriers<C>& barriers,
                                        const KernelParams& params, Finder& finder, int consumer, int thread) {
  using Element = typename C::Element;
  constexpr int kScores = C::kTileKeys / 2, kOutputs = C::kHeadDim / 2;
  const AttentionArgs& args = params.args;
  const int lane = thread % kWarp;
  const uint32_t tiles = ptx::shared_address(shared.tiles);
  const float scale_log2 = fmaxf(args.scale * 1.4426950408889634f, 1e-20f);  // 0 times a skipped -inf would be NaN
  OnlineSoftmax<Element, kScores> softmax(scale_log2);
  Stage<C::kItems> item_stage;
  Stage<C::kStages> stage;
  uint32_t query_phase = 0;
  uint32_t votes = 0;
  int kept_slot = 0;

  float scores[kScores], output[kOutputs];
  uint32_t weights[kScores / 2], queries[C::kHeadDim / 16][4];

  // Whether the stage that is read next had landed when looked at. Looking early, while products run, takes the latency
  // of the look out of the way from one product to the next. The fence: cp.async wrote the tiles through the generic
  // proxy, wgmma reads through the async one.
  bool landed = false;
  auto look_ahead = [&] {
    landed = ptx::barrier_test(barriers.tile_full + 8 * stage.slot(), stage.phase());
    ptx::fence_async_proxy();
  };
  auto wait_tiles = [&] {
    const uint32_t here = ptx::uniform(tiles + stage.slot() * 2 * C::kTileBytes);
    if (!landed) {
      ptx::barrier_wait(barriers.tile_full + 8 * stage.slot(), stage.phase());
      ptx::fence_async_proxy();
    }
    return here;
  };
  auto release_tiles = [&](int slot) { arrive_warp(barriers.tile_empty + 8 * slot, lane); };
  // The A operand of all products with this row's keys: four registers for 16 columns.
  auto read_queries = [&] {
    const int line = consumer * 64 + thread / kWarp * 16 + lane % 16;
    const uint32_t at = ptx::shared_address(shared.query) + line * kPanelLineBytes;
#pragma unroll
    for (int k = 0; k < C::kHeadDim / 16; ++k) {
      const int chunk = k % 4 * 2 + lane / 16;
      ptx::load_matrices(queries[k], at + k / 4 * C::kQueries * kPanelLineBytes + ((chunk ^ (line % 8)) * 16));
    }
    __syncwarp();
  };
  // S = Q K^T and O += P V, by the tensor cores, in the background until wgmma_wait.
  auto query_by_key = [&](uint32_t tile) {
    const Descriptor keys(tile, 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::kHeadDim / 16; ++k) {
      const int panel = k / 4, column = k % 4 * 32;
      Wgmma<Element, C::kTileKeys>::times_transposed(scores, queries[k],
                                                     keys.at(panel * C::kTileKeys * kPanelLineBytes + column), k > 0);
    }
    wgmma_commit();
  };
  auto weights_by_value = [&](uint32_t tile) {
    const Descriptor values(tile + C::kTileBytes, C::kTileKeys * kPanelLineBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::kTileKeys / 16; ++k) {
      Wgmma<Element, C::kHeadDim>::times(output, weights + 4 * k, values.at(k * 16 * kPanelLineBytes));
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
  };
  auto pack_weights = [&] {
    if (C::kPaired && ++kept_slot == C::kKeptTiles) kept_slot = 0;  // the tile is done with
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) weights[i] = ptx::pack<Element>(scores[2 * i], scores[2 * i + 1]);
  };

  // Whether all warps' weights are good (see softmax.cuh) is asked when the next scores are on their way: the four
  // warps do not come to the question at the same time.
  auto vote = [&](bool good) {
    ++votes;
    if (!good) shared.too_high[consumer][votes % 2] = votes;
    __syncwarp();
    arrive_warp(barriers.voted + 8 * consumer, lane);
  };
  auto too_high = [&] {
    ptx::barrier_wait(barriers.voted + 8 * consumer, (votes - 1) & 1);
    return ptx::load_shared(ptx::shared_address(&shared.too_high[consumer][votes % 2])) == votes;
  };
  // The scores of a tile once more, against a higher reference. No product may be on its way.
  auto weigh_again = [&](uint32_t tile) {
    query_by_key(tile);
    wgmma_wait<0>();
    if constexpr (Finder::kFinds) finder.look_at_scores_from_now_on(scores);
    if constexpr (C::kPaired) {
      kept_slot = kept_slot == 0 ? C::kKeptTiles - 1 : kept_slot - 1;
      skip_other_row();
    }
    float rescale[2];
    softmax.raise(scores, rescale);
#pragma unroll
    for (int i = 0; i < kOutputs; i += 4) {
      output[i] *= rescale[0], output[i + 1] *= rescale[0];
      output[i + 2] *= rescale[1], output[i + 3] *= rescale[1];
    }
    pack_weights();
  };

  int token[2];  // queries of this thread's two lines, or -1
  auto find_tokens = [&](const WorkItem& work) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = work.row * C::kQueryBlock + consumer * 64 + thread / kWarp * 16 + lane / 4 + 8 * r;
      const int there = query_token(args, work, position);
      const bool mine =
          position < args.num_queries && static_cast<uint32_t>(there) < static_cast<uint32_t>(args.num_queries);
      token[r] = mine ? there : -1;
    }
  };

  while (true) {
    const WorkItem work = next_item(shared, barriers, item_stage, lane);
    if (work.row == WorkItem::kNoMore) return;
    const int tiles_of_row = num_tiles<C>(work.count);
    if (tiles_of_row > 0) {
      const int padding = tiles_of_row * C::kTileKeys - work.count;
      if constexpr (Finder::kFinds) finder.begin(work, tiles_of_row);
      ptx::barrier_wait(barriers.query_full, query_phase);
      query_phase ^= 1;
      read_queries();
      arrive_warp(barriers.query_empty, lane);
      look_ahead();
      uint32_t before = wait_tiles();  // the stage of the step before
      query_by_key(before);
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) output[i] = 0;
      wgmma_wait<0>();
      int slot_before = stage.slot();
      stage.advance();
      look_ahead();
      if constexpr (C::kPaired) {
        skip_other_row();
      } else {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
          const bool is_key = Finder::kFinds ? column < C::kTileKeys - padding : column >= padding;
          if (!is_key) scores[i] = -INFINITY;
        }
      }
      softmax.refer(scores);
      if constexpr (Finder::kFinds) finder.refer(softmax.scale_log2, softmax.reference, scores);
      softmax.next(scores);
      uint32_t here;
#pragma unroll 1
      for (int left = tiles_of_row - 1;; --left) {
        here = wait_tiles();
        wgmma_wait<0>();
        vote(softmax.add_up(scores));
        pack_weights();
        if (left == 0) break;
        query_by_key(here);
        if (too_high()) {
          wgmma_wait<0>();
          weigh_again(before);
          query_by_key(here);
        }
        softmax.add_tile();
        release_tiles(slot_before);
        before = here, slot_before = stage.slot();
        stage.advance();
        weights_by_value(here);
        look_ahead();
        if constexpr (Finder::kFinds) {
          finder.met();
          finder.look_at_weights(weights);
        }
        wgmma_wait<1>();
        if constexpr (C::kPaired) skip_other_row();
        if constexpr (Finder::kFinds) finder.look_at_scores(scores);
        softmax.next(scores);
      }
      if (too_high()) weigh_again(before);
      softmax.add_tile();
      release_tiles(slot_before);
      weights_by_value(here);
      if constexpr (Finder::kFinds) {
        finder.met();
        finder.look_at_weights(weights);
        vote(true);
        too_high();
        finder.end();
      }
      find_tokens(work);
      wgmma_wait<0>();
      release_tiles(stage.slot());
      stage.advance();
    } else {
      find_tokens(work);
    }
    bool finite = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = tiles_of_row > 0 ? quad_sum(softmax.sum[r]) : 0.0f;
      const bool empty = total == 0;  // also a row of a pair none of whose keys is its own
      const float inverse = empty ? 0.0f : ptx::reciprocal(total);
      char* line = static_cast<char*>(args.output) + lane % 4 * 16 +
                   2 * (query_offset(work, args.output_strides) + token[r] * args.output_strides.token);
#pragma unroll
      for (int i = 2 * r; i < kOutputs; i += 16) {  // 32 columns, of which a thread has four pairs
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float low = output[i + 4 * j], high = output[i + 4 * j + 1];
          if constexpr (C::kPaired) finite = finite && (token[r] < 0 || isfinite(low + high));
          pairs[j] = empty ? 0 : ptx::pack<Element>(low * inverse, high * inverse);
        }
        transpose_in_quads(pairs, lane);
        if (token[r] >= 0) *reinterpret_cast<uint4*>(line + 4 * (i - 2 * r)) = {pairs[0], pairs[1], pairs[2], pairs[3]};
      }
      if (token[r] >= 0 && lane % 4 == 0) {
        const float lse = empty ? -INFINITY : softmax.reference[r] * args.scale + ptx::log2(total) * 0.69314718f;
        args.lse[(work.batch * args.num_heads + work.head) * static_cast<int64_t>(args.num_queries) + token[r]] = lse;
      }
    }
    if constexpr (C::kPaired) {
      // A value that only the other row keeps came in as 0 times itself: NaN if it is not finite. Such rows run alone.
      const int row = work.row + consumer;
      if (__any_sync(kAllLanes, !finite && tiles_of_row > 0) && lane == 0 && row < args.num_rows) {
        params.workspace.leave((work.batch * args.num_heads + work.head) * args.num_rows + row);
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
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int thread = threadIdx.x % 128, lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) barriers.init();
  int* lists = reinterpret_cast<int*>(shared.lists);
  for (int i = threadIdx.x; i < C::kKeyLists * C::kTileKeys; i += C::kThreads) lists[i] = 0;
  if (threadIdx.x < 2 * C::kConsumers) shared.too_high[threadIdx.x / 2][threadIdx.x % 2] = 0;
  __syncthreads();
  if (warpgroup >= C::kProducers) {
    ptx::take_registers<C::kConsumerRegisters>();
    NoFinder finder;
    consume<C>(shared, barriers, params, finder, warpgroup - C::kProducers, thread);
  } else if (C::kGatherApart && warpgroup == 1) {
    ptx::give_registers<C::kGatherRegisters>();
    gather<C>(shared, barriers, params, thread);
  } else {
    ptx::give_registers<C::kDecodeRegisters>();
    if (warp < C::kDecodeWarps) {
      decode<C>(shared, barriers, params, warp, lane);
    } else if (!C::kGatherApart && warp >= C::kFirstGatherWarp) {
      gather<C>(shared, barriers, params, thread - C::kFirstGatherWarp * kWarp);
    }
  }
}

}  // namespace fgattn
