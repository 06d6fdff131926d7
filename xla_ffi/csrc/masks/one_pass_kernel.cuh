// Dense attention that finds the mask of the next steps on its way (FG-Attn, arXiv 2509.16518, section 5.1, with the LSE of
// the step before): the attention kernel's consumers over all keys, and one comparison a score before it becomes a weight.
//
//   work counter                             K, V in order, and Q (through query_order)
//        |                                      |
//     [gather] 4 warps --tiles, Q--> [consume] 2 warpgroups --> O, LSE
//                                       |      64 queries each
//                                       +--> words of kept keys, eight tiles at a time --> bits
//
// Barriers and stages are those of attention_kernel.cuh; nothing is decoded, and the first gathering warp announces the
// items. An item is 128 neighbouring queries: one row of the mask, or two of 64. Its tiles come last keys first, so that
// the tile that the last key leaves incomplete is the first one, which alone is masked, and a tile's keys are whole words.
//
// A slice is kept if scale * q k - lse > log t for one of its queries: a score above (lse + log t) / scale, a number that
// a query has for all keys. A thread has two lines of queries; the warp's lanes and its lines come together by one
// reduction a word. Words stand in shared memory until eight tiles are done. That all warps have written those of a
// tile is what `voted` says, of every tile; the half of the ring that is written next was read before the last such vote.
#pragma once
#include <cstdint>

#include "attention_kernel.cuh"
#include "masks/one_pass_launch.h"

namespace fgattn {

// Sizes, by the names that the attention kernel's parts know. kMaskBlock: queries a row of the mask (M).
template <class Element_, int kHeadDim_, int kMaskBlock_>
struct OnePassConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kMaskBlock = kMaskBlock_;
  static constexpr bool kPaired = false;
  static constexpr int kQueries = 128, kQueryBlock = kQueries;  // an item counts as one row
  static constexpr int kTileKeys = 128;
  static constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * 128;
  static constexpr int kDecodeWarps = 1;  // the one that announces; it reads the items like the other gathering warps
  static constexpr int kGatherThreads = 128;
  static constexpr int kGatherRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kQueryBytes = kQueries * kHeadDim * 2;
  static constexpr int kTileBytes = kTileKeys * kHeadDim * 2;
  static constexpr int kItems = 4, kKeyLists = 1, kKeptTiles = 1;
  static constexpr int kBlockBytes = 227 * 1024;
  static constexpr int kStages = (kBlockBytes - 3 * 1024 - kQueryBytes) / (2 * kTileBytes);
  static constexpr int kWords = kTileKeys / 32;  // of a tile
  static constexpr int kBatch = 8;               // tiles whose words leave together
  static constexpr int kRowsOfItem = kQueries / kMaskBlock;
  static_assert(kMaskBlock == 64 || kMaskBlock == 128);
  static_assert(kTileKeys % 32 == 0 && kBatch * kWords <= kWarp);
};

template <class C>
struct OnePassMemory : SharedMemory<C> {
  uint32_t words[C::kConsumers][2 * C::kBatch][4][4];  // of a tile and a warp; three or four of them
};

struct OnePassParams {
  KernelParams kernel;
  OnePassArgs call;
  int items_of_head;  // 128 queries each
};

// What a consumer makes of the scores of its 64 queries before they become weights.
template <class C>
class PeakFinder {
 public:
  static constexpr bool kFinds = true;

  __device__ __forceinline__ PeakFinder(OnePassMemory<C>& shared, const OnePassArgs& call, int consumer, int thread)
      : words_(shared.words[consumer]), call_(call), consumer_(consumer), warp_(thread / kWarp), lane_(thread % kWarp) {}

  // Before the first tile of an item.
  __device__ __forceinline__ void begin(const WorkItem& work, int tiles) {
    const AttentionArgs& args = call_.attention;
    const int64_t head = static_cast<int64_t>(work.batch) * args.num_heads + work.head;
    const float log_threshold = __ldg(call_.log_threshold + work.head);
    bool alive = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = work.row * C::kQueries + consumer_ * 64 + warp_ * 16 + lane_ / 4 + 8 * r;
      const int token = min(max(query_token(args, work, position), 0), args.num_queries - 1);
      const float lse = __ldg(call_.last_lse + head * args.num_queries + token), least = lse + log_threshold;
      const bool is_query = position < args.num_queries && lse != -INFINITY;
      alive |= is_query;
      // Without a scale every score counts as 0.
      limit_[r] = args.scale > 0 ? least / args.scale : least < 0 ? -INFINITY : least >= 0 ? INFINITY : least;
      if (!is_query) limit_[r] = INFINITY;
    }
    alive_ = alive ? ~0u : 0;
    const int row = work.row * C::kRowsOfItem + (C::kRowsOfItem == 2 ? consumer_ : 0);
    row_ = row < args.num_rows ? call_.bits + (head * args.num_rows + row) * args.num_words : nullptr;
    tile_ = tiles;
  }

  // The next tile's scores. Between this and `met`, all warps of the consumer have to meet.
  template <int kScores>
  __device__ __forceinline__ void look(const float (&scores)[kScores]) {
    uint32_t words[C::kWords];
#pragma unroll
    for (int word = 0; word < C::kWords; ++word) {
      uint32_t kept = 0;
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        const int at = word * 16 + bit / 2 * 4 + bit % 2;
        // Not above is what is refused: NaN is kept.
        if (!(scores[at] <= limit_[0]) | !(scores[at + 2] <= limit_[1])) kept |= 1u << (bit / 2 * 8 + bit % 2);
      }
      words[word] = __reduce_or_sync(kAllLanes, (kept & alive_) << (lane_ % 4 * 2));
    }
    if (lane_ == 0) {
#pragma unroll
      for (int word = 0; word < C::kWords; ++word) words_[slot_][warp_][word] = words[word];
    }
  }

  // All warps' words of the tile stand in shared memory.
  __device__ __forceinline__ void met() {
    --tile_;
    ++slot_;
    if (slot_ % C::kBatch == 0) leave(C::kBatch);
  }

  // `met` for the last tile of an item.
  __device__ __forceinline__ void end() {
    met();
    if (slot_ % C::kBatch == 0) return;
    const int number = slot_ % C::kBatch;
    slot_ += C::kBatch - number;
    leave(number);
  }

 private:
  // The words of the last `number` tiles go to global memory, by one warp after the other in turns.
  __device__ __forceinline__ void leave(int number) {
    const int first = slot_ - C::kBatch;
    if (slot_ == 2 * C::kBatch) slot_ = 0;
    turn_ = (turn_ + 1) & 3;
    if (warp_ != turn_ || row_ == nullptr || lane_ >= number * C::kWords) return;
    const AttentionArgs& args = call_.attention;
    const int of_batch = lane_ / C::kWords, word = lane_ % C::kWords;
    const int at = (tile_ + number - 1 - of_batch) * C::kWords + word;
    const auto& words = words_[first + of_batch];
    const uint32_t all = words[0][word] | words[1][word] | words[2][word] | words[3][word];
    const uint32_t kept = all & valid_bits(at, args.num_keys);
    if (at >= args.num_words) return;
    if constexpr (C::kRowsOfItem == 2) {
      row_[at] = kept;
    } else if (kept != 0) {
      atomicOr(row_ + at, kept);  // the other consumer's queries are of the same row
    }
  }

  uint32_t (&words_)[2 * C::kBatch][4][4];
  const OnePassArgs& call_;
  int consumer_, warp_, lane_;
  float limit_[2];        // of this thread's lines, in units of scores
  uint32_t alive_ = 0;    // all bits, if one of them is a query
  uint32_t* row_ = nullptr;
  int tile_ = 0, slot_ = 0, turn_ = 0;  // tile: the last one that was met
};

// Starts the copies of this thread's lines of a tile of keys or values. Behind the last key comes the last one again, or
// zeros.
template <class C, bool kZeros>
__device__ __forceinline__ void copy_tile(uint32_t tile, const char* head, uint32_t token_bytes, int first_key,
                                          int num_keys, int thread) {
  const int line = thread / 8, chunk = thread % 8;
  constexpr int kLinesPerPass = C::kGatherThreads / 8;
  static_assert(kLinesPerPass % 8 == 0 && C::kTileKeys % kLinesPerPass == 0);
  const char* mine = ptx::opaque(head + chunk * 16);
  const uint32_t place = tile + line * kPanelLineBytes + ((chunk ^ (line % 8)) * 16);
#pragma unroll
  for (int j = 0; j < C::kTileKeys; j += kLinesPerPass) {
    const int key = first_key + j + line;
    const char* source = mine + static_cast<uint64_t>(min(key, num_keys - 1)) * token_bytes;
#pragma unroll
    for (int panel = 0; panel < C::kHeadDim / kPanelColumns; ++panel) {
      const uint32_t to = place + (panel * C::kTileKeys + j) * kPanelLineBytes;
      if (kZeros && key >= num_keys) {
        ptx::store_shared_zeros_16(to);
      } else {
        ptx::copy_async_16<2 * C::kHeadDim>(to, source + panel * kPanelLineBytes);
      }
    }
  }
  if constexpr (kZeros) ptx::fence_shared_stores();
}

// Takes items from the counter, tells all others, and copies what they need. Stage j of an item holds the keys of its
// tile j and the values of tile j - 1, tiles counted from the last keys.
template <class C>
__device__ __forceinline__ void gather_all(SharedMemory<C>& shared, const Barriers<C>& barriers,
                                           const OnePassParams& params, int thread) {
  const AttentionArgs& args = params.call.attention;
  const int lane = thread % kWarp, items = args.batch * args.num_heads * params.items_of_head;
  const uint32_t key_bytes = static_cast<uint32_t>(2 * args.key_strides.token);
  const uint32_t value_bytes = static_cast<uint32_t>(2 * args.value_strides.token);
  const uint32_t tiles = ptx::shared_address(shared.tiles);
  Stage<C::kItems> announced, item_stage;
  Stage<C::kStages> stage;
  uint32_t query_phase = 0;
  int next = thread == 0 ? atomicAdd(params.kernel.workspace.next_item, 1) : 0;
  while (true) {
    if (thread < kWarp) {
      ptx::barrier_wait(barriers.item_empty + 8 * announced.slot(), announced.phase() ^ 1);
      __syncwarp();  // else the place could be filled, read and let go again before the last lane has looked
      if (lane == 0) {
        const int head = next / params.items_of_head, batch = head / args.num_heads;
        WorkItem work{batch, head - batch * args.num_heads, next - head * params.items_of_head, args.num_keys};
        if (next >= items) work = {0, 0, WorkItem::kNoMore, 0};
        shared.items[announced.slot()] = work;
        ptx::barrier_arrive(barriers.item_full + 8 * announced.slot());
        if (next < items) next = atomicAdd(params.kernel.workspace.next_item, 1);
      }
      announced.advance();
    }
    const WorkItem work = next_item(shared, barriers, item_stage, lane);
    if (work.row == WorkItem::kNoMore) return;
    const char* key = static_cast<const char*>(args.key) + 2 * key_offset(args, work, args.key_strides);
    const char* value = static_cast<const char*>(args.value) + 2 * key_offset(args, work, args.value_strides);
    const int last = num_tiles<C>(work.count);
    ptx::barrier_wait(barriers.query_empty, query_phase ^ 1);
    query_phase ^= 1;
    load_queries(shared, args, work, thread);
    ptx::copy_async_arrive(barriers.query_full);
#pragma unroll 1
    for (int step = 0; step <= last; ++step) {
      const uint32_t here = tiles + stage.slot() * 2 * C::kTileBytes, there = here + C::kTileBytes;
      const int first_key = (last - 1 - step) * C::kTileKeys, first_value = first_key + C::kTileKeys;
      ptx::barrier_wait(barriers.tile_empty + 8 * stage.slot(), stage.phase() ^ 1);
      if (step < last) copy_tile<C, false>(here, key, key_bytes, first_key, args.num_keys, thread);
      if (step == 1) {  // weight 0 times an infinite value would be NaN
        copy_tile<C, true>(there, value, value_bytes, first_value, args.num_keys, thread);
      } else if (step > 1) {
        copy_tile<C, false>(there, value, value_bytes, first_value, args.num_keys, thread);
      }
      ptx::copy_async_arrive(barriers.tile_full + 8 * stage.slot());
      stage.advance();
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) one_pass_kernel(const __grid_constant__ OnePassParams params) {
  static_assert(sizeof(OnePassMemory<C>) <= C::kBlockBytes);
  extern __shared__ __align__(1024) char raw[];
  OnePassMemory<C>& shared = *reinterpret_cast<OnePassMemory<C>*>(raw);
  const Barriers<C> barriers(shared);
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0), thread = threadIdx.x % 128;
  if (threadIdx.x == 0) barriers.init();
  if (threadIdx.x < 2 * C::kConsumers) shared.too_high[threadIdx.x / 2][threadIdx.x % 2] = 0;
  __syncthreads();
  if (warpgroup == 0) {
    ptx::give_registers<C::kGatherRegisters>();
    gather_all<C>(shared, barriers, params, thread);
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    PeakFinder<C> finder(shared, params.call, warpgroup - 1, thread);
    consume<C>(shared, barriers, params.kernel, finder, warpgroup - 1, thread);
  }
}

}  // namespace fgattn
