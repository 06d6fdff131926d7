// Scores of whole rows: K Q^T tile by tile, for kernels that look at every key (FG-Attn, arXiv 2509.16518, section 5).
//
//   K, Q (through query_order), LSE          [produce] 1 warpgroup --tiles of K, Q--> [consume] 2 warpgroups --> masks
//
// An item is 256 neighbouring queries of a head, 128 for each consumer: a tile of keys read from L2 serves 256 queries.
// Keys are the lines of a product and queries its columns, so that what is asked of a key over all queries of a row is
// found in one thread, and but for its three neighbours nobody else has a say. A consumer's scores come in two halves of
// 64 keys; while the tensor cores make one half, it looks at the other.
//
// barrier        arrivals                       who waits, for what
// tokens         1 a producer warp              producer: who is a query, and who stands in for one, is written
// query_full     1 a producer thread, when its  consumers: queries and what goes with them have landed
//                copies have landed
// rows_empty     1 a consumer warp              producer: LSE and who is alive stand in registers
// query_empty    1 a consumer warp              producer: nothing is computed from the queries any more
// keys_full      1 a producer thread, when its  consumers: a tile has landed
//                copies have landed
// keys_empty     1 a consumer warp              producer: both halves have been computed from the tile
//
// A position behind the last query, or whose LSE is -inf, is no query. Another query of its row stands in for it with an
// LSE of +inf, so that its probabilities are 0 and NaN only where the other's are NaN too: nothing is masked later. A row
// without any query is not alive.
#pragma once
#include <cstdint>

#include "decode.cuh"
#include "gather.cuh"
#include "masks/mask_launch.h"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace fgattn {

template <class Element_, int kHeadDim_, int kQueryBlock_>
struct ScoreConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kQueryBlock = kQueryBlock_;
  static constexpr int kTileKeys = 128;
  static constexpr int kConsumers = 2, kConsumerQueries = 128;
  static constexpr int kQueries = kConsumers * kConsumerQueries;
  static constexpr int kRowsOfConsumer = kConsumerQueries / kQueryBlock;  // rows of the mask
  static constexpr int kRows = kConsumers * kRowsOfConsumer;
  static constexpr int kThreads = (1 + kConsumers) * 128;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kQueryBytes = kQueries * kHeadDim * 2;
  static constexpr int kTileBytes = kTileKeys * kHeadDim * 2;
  static constexpr int kStages = kHeadDim == 128 ? 4 : 6;
  static_assert(kQueryBlock == 64 || kQueryBlock == 128);
};

template <class C>
struct alignas(1024) ScoreMemory {
  char query[C::kQueryBytes];
  char tiles[C::kStages][C::kTileBytes];
  int token[C::kQueries];
  float lse[C::kQueries];
  int first_query[C::kQueries / kWarp];  // of each 32 positions, or -1
  int alive[C::kRows];
  uint64_t tokens, query_full, rows_empty, query_empty;
  uint64_t keys_full[C::kStages], keys_empty[C::kStages];
};

template <class C>
struct ScoreBarriers {
  uint32_t tokens, query_full, rows_empty, query_empty, keys_full, keys_empty;
  __device__ __forceinline__ explicit ScoreBarriers(const ScoreMemory<C>& shared)
      : tokens(ptx::shared_address(&shared.tokens)),
        query_full(ptx::shared_address(&shared.query_full)),
        rows_empty(ptx::shared_address(&shared.rows_empty)),
        query_empty(ptx::shared_address(&shared.query_empty)),
        keys_full(ptx::shared_address(shared.keys_full)),
        keys_empty(ptx::shared_address(shared.keys_empty)) {}

  __device__ __forceinline__ void init() const {
    auto init = [](uint32_t barrier, int warps) { ptx::barrier_init(barrier, warps * kArrivalsPerWarp); };
    init(tokens, 4);
    ptx::barrier_init(query_full, 128);
    init(rows_empty, 4 * C::kConsumers);
    init(query_empty, 4 * C::kConsumers);
    for (int i = 0; i < C::kStages; ++i) {
      ptx::barrier_init(keys_full + 8 * i, 128);
      init(keys_empty + 8 * i, 4 * C::kConsumers);
    }
    ptx::barrier_init_fence();
  }
};

// 256 positions of a head, with some tiles of keys.
struct ScoreItem {
  int batch, head, first_position;
  int first_tile, last_tile;
};

// What is to do. A block takes every so-many-th item, as all take the same time; heads in sequence, so that K stays in L2.
// Items that are too few for all blocks are cut into equal numbers of tiles, one piece a block.
struct ScoreItems {
  int first_head, num_heads;  // of batch * heads
  int of_head;                // items of a head
  int num_tiles;

  __host__ __device__ __forceinline__ int size() const { return num_heads * of_head; }

  // Calls visit(item) for all that this block does.
  template <class C, class Visit>
  __device__ __forceinline__ void each(const ScoreArgs& args, Visit visit) const {
    const uint32_t block = blockIdx.x, blocks = gridDim.x, whole = size() / blocks * blocks, tiles = num_tiles;
    const uint32_t left = (size() - whole) * tiles, share = left / blocks, more = left % blocks;
    uint32_t number = block, tile = 0, done = block * share + min(block, more);
    const uint32_t end = done + share + (block < more ? 1 : 0);
    while (number < whole || done < end) {
      uint32_t last = tiles;
      if (number >= whole) {
        number = whole + done / tiles, tile = done % tiles;
        last = min(tiles, tile + end - done);
        done += last - tile;
      }
      const int item = static_cast<int>(number), head = item / of_head, of_all = first_head + head;
      visit(ScoreItem{of_all / args.num_heads, of_all % args.num_heads, (item - head * of_head) * C::kQueries,
                      static_cast<int>(tile), static_cast<int>(last)});
      number = min(number + blocks, whole);
    }
  }
};

// Writes which query stands at each position of an item, and its LSE.
template <class C>
__device__ __forceinline__ void find_queries(ScoreMemory<C>& shared, const ScoreBarriers<C>& barriers,
                                             const ScoreArgs& args, const ScoreItem& item, int thread, uint32_t& phase) {
  const int lane = thread % kWarp;
  const int64_t head = static_cast<int64_t>(item.batch) * args.num_heads + item.head;
  const int32_t* order = args.query_order == nullptr ? nullptr
                                                     : args.query_order + item.batch * args.query_order_strides.batch +
                                                           item.head * args.query_order_strides.head;
  auto meet = [&] {
    __syncwarp();
    arrive_warp(barriers.tokens, lane);
    ptx::barrier_wait(barriers.tokens, phase);
    phase ^= 1;
  };
  bool is_query[C::kQueries / 128];
#pragma unroll
  for (int i = 0; i < C::kQueries / 128; ++i) {
    const int place = 128 * i + thread, position = item.first_position + place;
    const int inside = min(position, args.num_queries - 1);
    const int token = min(max(order == nullptr ? inside : __ldg(order + inside), 0), args.num_queries - 1);
    const float lse = __ldg(args.lse + head * args.num_queries + token);
    is_query[i] = position < args.num_queries && lse != -INFINITY;
    const uint32_t queries = __ballot_sync(kAllLanes, is_query[i]);
    shared.token[place] = token;
    shared.lse[place] = is_query[i] ? lse : INFINITY;
    if (lane == 0) shared.first_query[place / kWarp] = queries == 0 ? -1 : place + __ffs(queries) - 1;
  }
  meet();
#pragma unroll
  for (int i = 0; i < C::kQueries / 128; ++i) {
    const int place = 128 * i + thread, row = place / C::kQueryBlock;
    int other = -1;
    for (int warp = 0; warp < C::kQueryBlock / kWarp; ++warp) {
      const int found = shared.first_query[row * (C::kQueryBlock / kWarp) + warp];
      if (other < 0) other = found;
    }
    if (!is_query[i] && other >= 0) shared.token[place] = shared.token[other];
    if (place % C::kQueryBlock == 0) shared.alive[row] = other >= 0;
  }
  meet();
}

// Starts the copies of this thread's lines of a tile of keys. `tile`: where its chunk of line 0 goes; `keys`: its chunk
// of key 0. Behind the last key comes the last one again.
template <int kHeadDim, int kTileKeys>
__device__ __forceinline__ void start_keys(uint32_t tile, const char* keys, int64_t token_stride, int first_key,
                                           int num_keys, int line) {
#pragma unroll
  for (int j = 0; j < kTileKeys; j += 128 / 8) {
    const char* source = keys + 2 * min(first_key + j + line, num_keys - 1) * token_stride;
#pragma unroll
    for (int panel = 0; panel < kHeadDim / kPanelColumns; ++panel) {
      ptx::copy_async_16<2 * kHeadDim>(tile + (panel * kTileKeys + j) * kPanelLineBytes,
                                       source + panel * kPanelLineBytes);
    }
  }
}

// One warpgroup: queries and tiles of keys into shared memory.
template <class C>
__device__ __forceinline__ void produce(ScoreMemory<C>& shared, const ScoreBarriers<C>& barriers, const ScoreArgs& args,
                                        const ScoreItems& items, int thread) {
  const int line = thread / 8, chunk = thread % 8;
  const uint32_t place = line * kPanelLineBytes + ((chunk ^ (line % 8)) * 16);
  const uint32_t query = ptx::shared_address(shared.query) + place, tiles = ptx::shared_address(shared.tiles) + place;
  constexpr int kPanels = C::kHeadDim / kPanelColumns, kLinesPerPass = 128 / 8;
  Stage<C::kStages> stage;
  uint32_t tokens_phase = 0, query_phase = 0;
  items.each<C>(args, [&](const ScoreItem& item) {
    ptx::barrier_wait(barriers.rows_empty, query_phase ^ 1);
    find_queries<C>(shared, barriers, args, item, thread, tokens_phase);
    ptx::barrier_wait(barriers.query_empty, query_phase ^ 1);
    query_phase ^= 1;
    const char* queries = static_cast<const char*>(args.query) + chunk * 16 +
                          2 * (item.batch * args.query_strides.batch + item.head * args.query_strides.head);
#pragma unroll 4
    for (int j = line; j < C::kQueries; j += kLinesPerPass) {
      const char* source = queries + 2 * shared.token[j] * args.query_strides.token;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        ptx::copy_async_16<2 * C::kHeadDim>(query + (panel * C::kQueries + j - line) * kPanelLineBytes,
                                            source + panel * kPanelLineBytes);
      }
    }
    ptx::fence_shared_stores();  // LSE and what is alive
    ptx::copy_async_arrive(barriers.query_full);
    const int kv_head = item.head / (args.num_heads / args.num_kv_heads);
    const char* keys = static_cast<const char*>(args.key) + chunk * 16 +
                       2 * (item.batch * args.key_strides.batch + kv_head * args.key_strides.head);
#pragma unroll 1
    for (int tile = item.first_tile; tile < item.last_tile; ++tile) {
      ptx::barrier_wait(barriers.keys_empty + 8 * stage.slot(), stage.phase() ^ 1);
      start_keys<C::kHeadDim, C::kTileKeys>(tiles + stage.slot() * C::kTileBytes, keys, args.key_strides.token,
                                            tile * C::kTileKeys, args.num_keys, line);
      ptx::copy_async_arrive(barriers.keys_full + 8 * stage.slot());
      stage.advance();
    }
  });
}

// One warpgroup of consumers: starts products and hands their scores to `look`.
//
// look.begin(item, first_query)   an item's first query of this consumer among those of shared memory
// look.template at<kHalf>(tile, scores)   scores[4 c + 2 line + b]: key 64 half + 16 warp + lane / 4 + 8 line of the tile
//                                 with query 8 c + 2 (lane % 4) + b of the consumer
// look.end(item)
template <class C, class Look>
__device__ __forceinline__ void consume(ScoreMemory<C>& shared, const ScoreBarriers<C>& barriers, const ScoreArgs& args,
                                        const ScoreItems& items, Look& look, int consumer, int lane) {
  constexpr int kScores = C::kConsumerQueries / 2;
  const uint32_t tiles = ptx::shared_address(shared.tiles);
  const Descriptor queries(ptx::shared_address(shared.query) + consumer * C::kConsumerQueries * kPanelLineBytes, 16);
  Stage<C::kStages> stage;
  uint32_t query_phase = 0;
  auto wait_keys = [&] {
    ptx::barrier_wait(barriers.keys_full + 8 * stage.slot(), stage.phase());
    ptx::fence_async_proxy();
    return tiles + stage.slot() * C::kTileBytes;
  };
  auto start = [&](float (&scores)[kScores], uint32_t half_tile) {
    const Descriptor keys(half_tile, 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::kHeadDim / 16; ++k) {
      Wgmma<typename C::Element, C::kConsumerQueries>::times_transposed(
          scores, keys.at(k / 4 * C::kTileKeys * kPanelLineBytes + k % 4 * 32),
          queries.at(k / 4 * C::kQueries * kPanelLineBytes + k % 4 * 32), k > 0);
    }
    wgmma_commit();
  };
  constexpr uint32_t kHalfBytes = C::kTileKeys / 2 * kPanelLineBytes;
  items.each<C>(args, [&](const ScoreItem& item) {
    ptx::barrier_wait(barriers.query_full, query_phase);
    query_phase ^= 1;
    ptx::fence_async_proxy();
    look.begin(item, consumer * C::kConsumerQueries);
    __syncwarp();
    arrive_warp(barriers.rows_empty, lane);
    // With a half under way on both sides of the loop's end, ptxas puts all products one after the other (C7514): so the
    // wait for the second half comes before the next first one. The other consumer keeps the tensor cores busy.
    float scores[2][kScores];
    uint32_t here = wait_keys();
    start(scores[0], here);
    start(scores[1], here + kHalfBytes);
    wgmma_wait<1>();
    look.template at<0>(item.first_tile, scores[0]);
#pragma unroll 1
    for (int tile = item.first_tile + 1; tile < item.last_tile; ++tile) {
      const int slot_before = stage.slot();
      stage.advance();
      here = wait_keys();
      wgmma_wait<0>();
      arrive_warp(barriers.keys_empty + 8 * slot_before, lane);
      start(scores[0], here);
      look.template at<1>(tile - 1, scores[1]);
      start(scores[1], here + kHalfBytes);
      wgmma_wait<1>();
      look.template at<0>(tile, scores[0]);
    }
    wgmma_wait<0>();
    arrive_warp(barriers.keys_empty + 8 * stage.slot(), lane);
    arrive_warp(barriers.query_empty, lane);
    stage.advance();
    look.template at<1>(item.last_tile - 1, scores[1]);
    look.end(item);
  });
}

// The whole of a kernel: a warpgroup that copies, and two that look.
template <class C, class MakeLook>
__device__ __forceinline__ void score_rows(const ScoreArgs& args, const ScoreItems& items, MakeLook make_look) {
  extern __shared__ __align__(1024) char raw[];
  ScoreMemory<C>& shared = *reinterpret_cast<ScoreMemory<C>*>(raw);
  const ScoreBarriers<C> barriers(shared);
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0), thread = threadIdx.x % 128;
  if (threadIdx.x == 0) barriers.init();
  __syncthreads();
  if (warpgroup == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    produce<C>(shared, barriers, args, items, thread);
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    auto look = make_look(shared, thread);
    consume<C>(shared, barriers, args, items, look, warpgroup - 1, thread % kWarp);
  }
}

}  // namespace fgattn
