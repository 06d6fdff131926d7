// Dense attention that finds the mask of the next steps on its way (FG-Attn, arXiv 2509.16518, section 5.1, with the
// LSE of the step before): the attention kernel's consumers over all keys, whose weights show which keys stay.
//
//   work counter                             K, V in order, and Q (through query_order)
//        |                                      |
//     [gather] 4 warps --tiles, Q--> [consume] 2 warpgroups --> O, LSE
//                                       |      64 queries each
//                                       +--> words of kept keys, eight tiles at a time --> bits
//
// Barriers and stages are those of attention_kernel.cuh; nothing is decoded, and the first gathering warp announces the
// items. An item is 128 neighbouring queries: one row of the mask, or two of 64. Its tiles come last keys first, so
// that the tile that the last key leaves incomplete is the first one, which alone is masked, and a tile's keys are
// whole words.
//
// A slice is kept if scale * q k - lse > log t for one of its queries: a score above (lse + log t) / scale, a number
// that a query has for all keys. Softmax may measure a query's scores from any reference (softmax.cuh): it gets the one
// from which that number becomes the least weight that 16 bits round to 2. Of a positive number of 16 bits, bfloat16 or
// float16, bit 14 says whether it reaches 2, and it is set in NaN: the packed weights hold the mask, no score is
// compared, and what is left to do happens while the tensor cores work. Where weights from that reference would be too
// large or too small, as with an LSE far from this step's, a warp compares scores as they come.
//
// A thread has two lines of queries; the warp's lanes and its lines come together by one reduction a word. Words stand
// in shared memory until eight tiles are done. That all warps have written those of a tile is what the next tile's
// `voted` says; the half of the ring that is written next was read before the last such vote.
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
  alignas(16) uint32_t words[C::kConsumers][2 * C::kBatch][4][C::kWords];  // of a tile and a warp
};

struct OnePassParams {
  KernelParams kernel;
  OnePassArgs call;
  int items_of_head, num_items;  // 128 queries each
};

// Logarithms to base 2 of weights: of the least one that is rounded to 2, and between which the largest of a first tile
// may lie. Above comes softmax's own limit; below, float32 sums and float16 weights would get too small.
template <class Element>
struct WeightRange {
  static constexpr float kLogLeast = 0.99717948f, kLeast = -100, kMost = 31;  // 2 - 2^-8
};
template <>
struct WeightRange<__half> {
  static constexpr float kLogLeast = 0.99964774f, kLeast = -2, kMost = 14;  // 2 - 2^-11
};

// Which keys the 64 queries of a consumer need.
template <class C>
class PeakFinder {
 public:
  static constexpr bool kFinds = true;

  __device__ __forceinline__ PeakFinder(OnePassMemory<C>& shared, const OnePassArgs& call, int consumer, int thread)
      : words_(shared.words[consumer]),
        call_(call),
        consumer_(consumer),
        warp_(thread / kWarp),
        lane_(thread % kWarp) {}

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
    row_ = row < args.num_rows ? static_cast<int>(head * args.num_rows + row) : -1;
    tile_ = tiles + 1, --slot_;  // the first `met` is that of no tile
  }

  // With the reference that softmax has chosen, the maximum of the first tile's scores: another one, if weights from it
  // show what is kept.
  template <int kScores>
  __device__ __forceinline__ void refer(float scale_log2, float (&reference)[2], const float (&scores)[kScores]) {
    bool good = true;
    float by_limit[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      by_limit[r] = limit_[r] - Range::kLogLeast / scale_log2;
      const float highest = (reference[r] - by_limit[r]) * scale_log2;  // logarithm of the first tile's largest weight
      good = good && highest > Range::kLeast && highest < Range::kMost;
    }
    by_weights_ = __all_sync(kAllLanes, good);
    if (by_weights_) {
      reference[0] = by_limit[0], reference[1] = by_limit[1];
    } else {
      look(scores);
    }
  }

  // The next tile's weights, packed in pairs. Between this and `met`, all warps of the consumer have to meet.
  template <int kPairs>
  __device__ __forceinline__ void look_at_weights(const uint32_t (&weights)[kPairs]) {
    if (!by_weights_) return;
    uint32_t words[C::kWords];
#pragma unroll
    for (int word = 0; word < C::kWords; ++word) {
      uint32_t kept[4];  // bits 14 and 30, of two neighbouring columns
#pragma unroll
      for (int i = 0; i < 4; ++i) kept[i] = (weights[8 * word + 2 * i] | weights[8 * word + 2 * i + 1]) & 0x40004000u;
      words[word] = 2 * kept[0] + kept[1] | kept[2] >> 1 | kept[3] >> 2;
    }
    put(slot_, words);
  }

  // The next tile's scores, if its weights will not be looked at.
  template <int kScores>
  __device__ __forceinline__ void look_at_scores(const float (&scores)[kScores]) {
    if (!by_weights_) look(scores);
  }

  // Softmax changes its reference: scores of the tile whose weights would be looked at next.
  template <int kScores>
  __device__ __forceinline__ void look_at_scores_from_now_on(const float (&scores)[kScores]) {
    if (by_weights_) look(scores);
    by_weights_ = false;
  }

  // All warps' words of one more tile stand in shared memory. The weights of a tile are looked at after the `met` of
  // the tile before it, its scores before that.
  __device__ __forceinline__ void met() {
    --tile_;
    ++slot_;
    if (slot_ % C::kBatch == 0 && tile_ < num_tiles<C>(call_.attention.num_keys)) leave(C::kBatch);
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
  using Range = WeightRange<typename C::Element>;

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
        if (!(scores[at] <= limit_[0]) | !(scores[at + 2] <= limit_[1]))
          kept |= 0x8000u >> (bit / 2) << (16 * (bit % 2));
      }
      words[word] = kept & alive_;
    }
    put((slot_ + 1) % (2 * C::kBatch), words);
  }

  // Bits 15 - c and 31 - c of a thread: columns 8 c + 2 (lane % 4) and the next. In shared memory bit
  // 16 b + 15 - c - 4 quad is column 8 c + 2 quad + b.
  __device__ __forceinline__ void put(int slot, uint32_t (&words)[C::kWords]) {
#pragma unroll
    for (int word = 0; word < C::kWords; ++word) {
      words[word] = __reduce_or_sync(kAllLanes, words[word] >> (lane_ % 4 * 4));
    }
    static_assert(C::kWords == 4);
    if (lane_ == 0) *reinterpret_cast<uint4*>(words_[slot][warp_]) = {words[0], words[1], words[2], words[3]};
  }

  // Such bits to their columns.
  __device__ __forceinline__ static uint32_t in_order(uint32_t bits) {
    uint32_t columns = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int quad = 0; quad < 4; ++quad) {
        const int from = 15 - c - 4 * quad, to = 8 * c + 2 * quad;
        columns |= (bits >> from & 1) << to | (bits >> (from + 16) & 1) << (to + 1);
      }
    }
    return columns;
  }

  // The words of the last `number` tiles go to global memory, by one warp after the other in turns.
  __device__ __forceinline__ void leave(int number) {
    const int first = slot_ - C::kBatch;
    if (slot_ == 2 * C::kBatch) slot_ = 0;
    if (warp_ != tile_ / C::kBatch % 4 || row_ < 0 || lane_ >= number * C::kWords) return;
    const AttentionArgs& args = call_.attention;
    const int of_batch = lane_ / C::kWords, word = lane_ % C::kWords;
    const int at = (tile_ + number - 1 - of_batch) * C::kWords + word;
    const auto& words = words_[first + of_batch];
    const uint32_t all = in_order(words[0][word] | words[1][word] | words[2][word] | words[3][word]);
    const uint32_t kept = all & valid_bits(at, args.num_keys);
    if (at >= args.num_words) return;
    uint32_t* to = call_.bits + int64_t{row_} * args.num_words + at;
    if constexpr (C::kRowsOfItem == 2) {
      *to = kept;
    } else if (kept != 0) {
      atomicOr(to, kept);  // the other consumer's queries are of the same row
    }
  }

  uint32_t (&words_)[2 * C::kBatch][4][C::kWords];
  const OnePassArgs& call_;
  int consumer_, warp_, lane_;
  float limit_[2];           // of this thread's lines, in units of scores
  bool by_weights_ = false;  // and not by scores; the same in a warp
  uint32_t alive_ = 0;       // all bits, if one of the lines is a query
  int row_ = -1;             // of all rows of the mask, or -1
  int tile_ = 0, slot_ = 0;  // the last tile that was met, and the slot behind its own
};

// Starts the copies of this thread's lines of a tile of keys or values. Behind the last key comes the last one again,
// or zeros.
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
  const int lane = thread % kWarp;
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
        if (next >= params.num_items) work = {0, 0, WorkItem::kNoMore, 0};
        shared.items[announced.slot()] = work;
        ptx::barrier_arrive(barriers.item_full + 8 * announced.slot());
        if (next < params.num_items) next = atomicAdd(params.kernel.workspace.next_item, 1);
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
