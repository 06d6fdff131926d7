// Bits of a mask row -> lists of key numbers, tile by tile, by one or more warps ahead of everybody else.
//
// A row with n kept keys makes ceil(n / kTileKeys) tiles. The keys stand at the end of that stretch, so that only the
// first tile has places without a key of its own: it repeats its first key there, the consumers mask these columns, and
// zeros stand in for their values. Every later tile is full, and the main loop needs no mask.
//
// A step takes 4096 keys a decoder: 128 neighbouring ones a lane, so that a prefix sum of the population counts is each
// lane's place in the lists. Every decoder counts the keys of all, which says where its own begin. It writes them at
// once, or where these are more than the ring takes, a quarter at a time: of a word a lane, or of a byte.
//
// A pair of rows is decoded as the union of their keys. While a tile is written the two highest bits of an entry say
// which rows keep the key; they leave as words of bits for the consumers, `kept`.
#pragma once
#include <cstdint>

#include "ptx.cuh"

namespace fgattn {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kFirstRowBit = 30, kSecondRowBit = 31;
constexpr uint32_t kKeyMask = (1u << kFirstRowBit) - 1;

// compute-sanitizer's racecheck does not follow what lanes hand on through __syncwarp and the arrival of one of them.
// For its sake a build can let every lane arrive (docs/notes/cuda_kernel.md).
#ifdef FGATTN_EVERY_LANE_ARRIVES
constexpr int kArrivalsPerWarp = kWarp;
#else
constexpr int kArrivalsPerWarp = 1;
#endif

// Arrives for a warp whose lanes have met since they last read or wrote what is let go.
__device__ __forceinline__ void arrive_warp(uint32_t barrier, int lane) {
  if (lane < kArrivalsPerWarp) ptx::barrier_arrive(barrier);
}

// Where a role stands in a ring of places whose barriers lie 8 bytes apart. One register: they are scarce.
template <int kDepth>
class Stage {
 public:
  __device__ __forceinline__ int slot() const { return state_ & 255; }
  __device__ __forceinline__ uint32_t phase() const { return state_ >> 8; }
  __device__ __forceinline__ void advance() {
    ++state_;
    if (slot() == kDepth) state_ = state_ ^ kDepth ^ 256;
  }

 private:
  uint32_t state_ = 0;
};

// A ring of kDepth lists in shared memory. `full`: arrivals of the decoders. `empty`: of its readers.
template <int kTileKeys_, int kDepth_>
struct KeyRing {
  static constexpr int kTileKeys = kTileKeys_, kDepth = kDepth_;
  uint32_t full, empty;  // barriers
  int* lists;
  Stage<kDepth> stage{};

  __device__ __forceinline__ int* list() const { return lists + stage.slot() * kTileKeys; }
  __device__ __forceinline__ void wait_full() const { ptx::barrier_wait(full + 8 * stage.slot(), stage.phase()); }
  __device__ __forceinline__ void wait_empty() const { ptx::barrier_wait(empty + 8 * stage.slot(), stage.phase() ^ 1); }
  __device__ __forceinline__ void arrive_full(int lane) const { arrive_warp(full + 8 * stage.slot(), lane); }
  __device__ __forceinline__ void arrive_empty(int lane) const { arrive_warp(empty + 8 * stage.slot(), lane); }
  __device__ __forceinline__ void advance() { stage.advance(); }
};

// One row of the mask, or two. A second row that is not there has no words.
struct MaskRows {
  const uint32_t* first;
  const uint32_t* second;
  int num_words, num_second_words, num_keys;
};

// What the tiles of a pair need besides the lists: a ring of words, [kDepth][2][kTileKeys / 32], that nobody waits for:
// it is deep enough.
struct KeptRing {
  uint32_t* words;
  int depth;
  int slot = 0;
};

__device__ __forceinline__ int prefix_sum(int value, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// The bits of a word that stand for keys: those past the last key count for nothing, whatever the mask holds there.
__device__ __forceinline__ uint32_t valid_bits(int word, int num_keys) {
  const int left = num_keys - word * 32;
  return left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
}

struct RowCounts {
  int either, first, second;  // keys that the pair, the first, the second row keeps
};

// Counts the bits of one or two rows by a warp.
__device__ __forceinline__ RowCounts count_keys(const MaskRows& rows, int lane) {
  RowCounts counts{0, 0, 0};
#pragma unroll 4
  for (int at = lane; at < rows.num_words; at += kWarp) {
    const uint32_t valid = valid_bits(at, rows.num_keys);
    const uint32_t a = __ldg(rows.first + at) & valid,
                   b = at < rows.num_second_words ? __ldg(rows.second + at) & valid : 0;
    counts.either += __popc(a | b), counts.first += __popc(a), counts.second += __popc(b);
  }
  return {__reduce_add_sync(kAllLanes, counts.either), __reduce_add_sync(kAllLanes, counts.first),
          __reduce_add_sync(kAllLanes, counts.second)};
}

// Some words of a row and, in a pair, of the other one.
template <int kWords, bool kPaired>
struct Words {
  uint32_t first[kWords], second[kPaired ? kWords : 1];
  __device__ __forceinline__ uint32_t either(int i) const { return kPaired ? first[i] | second[i] : first[i]; }
  __device__ __forceinline__ int count() const {
    int bits = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) bits += __popc(either(i));
    return bits;
  }
};

// Writes the lists of one row or pair of `count` > 0 kept keys. One of kWorkers warps: a list is full when every one of
// them has nothing more for it.
template <bool kPaired, int kWorkers, class Ring>
class RowDecoder {
 public:
  __device__ __forceinline__ RowDecoder(Ring& ring, KeptRing& kept, int count, int worker, int lane)
      : ring_(ring), kept_(kept), ahead_(ring), worker_(worker), lane_(lane) {
    end_ = (count + kTileKeys - 1) / kTileKeys * kTileKeys;
    padding_ = end_ - count;
  }

  // If the rows hold fewer keys (a work order of another mask), what stands in the ring from before fills the rest:
  // always a valid key. Keys beyond `count` are left out.
  __device__ __forceinline__ void run(const MaskRows& rows) {
    Chunk next[kWorkers];
    load(next, rows, 0);
    int place = padding_;  // of the next key in the lists of this row, laid end to end
#pragma unroll 1
    for (int step = 0; step < rows.num_words && tile_end_ <= end_; step += kWorkers * kChunkWords) {
      if ((step + kWorkers * kChunkWords) * 32 > rows.num_keys) clear_past_end(next, rows.num_keys, step);
      const Chunk mine = next[0];
      int found[kWorkers + 1];
#pragma unroll
      for (int i = 0; i < kWorkers; i += 2) {  // two sums in one number
        const int both = next[i].count() | (i + 1 < kWorkers ? next[i + 1].count() << 16 : 0);
        const int sums = __reduce_add_sync(kAllLanes, both);
        found[i] = sums & 0xFFFF, found[i + 1] = sums >> 16;
      }
      load(next, rows, step + kWorkers * kChunkWords);
      int start = place;
#pragma unroll
      for (int i = 0; i < kWorkers; ++i) {
        place += found[i];
        if (chunk_of(i) < worker_) start += found[i];
      }
      if (found[0] > 0) {
        const int key0 = (step + worker_ * kChunkWords) * 32;
        if (start == padding_) repeat_first_key(mine, key0);
        hand_on(start);
        write<128>(mine, key0, start, found[0]);
      }
      hand_on(place);
    }
    hand_on(end_);
  }

 private:
  static_assert(!kPaired || kWorkers == 1);  // which row keeps a tile's keys is read off the whole list
  static constexpr int kTileKeys = Ring::kTileKeys, kRing = Ring::kDepth * kTileKeys;
  static constexpr int kLaneWords = 4, kChunkWords = kLaneWords * kWarp;
  // Keys that may be written at once: they and the part of a tile before them reach into all lists of the ring but one,
  // which gather still holds while it waits for the tile that is handed on next. From many words it takes longest: half
  // of that then, or gather comes to wait.
  static constexpr int kMost = (Ring::kDepth - 2) * kTileKeys;
  static constexpr int kFewestBits = 8;
  static_assert(kMost >= kWarp * kFewestBits);
  using Chunk = Words<kLaneWords, kPaired>;

  // Which chunk of a step stands at place i of an array of them: this worker's own comes first.
  __device__ __forceinline__ int chunk_of(int i) const { return (worker_ + i) % kWorkers; }

  // This lane's words of a step; zero past the row's end.
  __device__ __forceinline__ void load(Chunk (&chunks)[kWorkers], const MaskRows& rows, int step) const {
#pragma unroll
    for (int i = 0; i < kWorkers; ++i) {
      const int at = step + chunk_of(i) * kChunkWords + lane_ * kLaneWords;
      load(chunks[i].first, rows.first + at, at < rows.num_words);
      if constexpr (kPaired) load(chunks[i].second, rows.second + at, at < rows.num_second_words);
    }
  }
  __device__ __forceinline__ static void load(uint32_t (&words)[kLaneWords], const uint32_t* from, bool inside) {
    const uint4 four = inside ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  }

  __device__ __forceinline__ void clear_past_end(Chunk (&chunks)[kWorkers], int num_keys, int step) const {
#pragma unroll
    for (int i = 0; i < kWorkers; ++i) {
#pragma unroll
      for (int j = 0; j < kLaneWords; ++j) {
        const uint32_t valid = valid_bits(step + chunk_of(i) * kChunkWords + lane_ * kLaneWords + j, num_keys);
        chunks[i].first[j] &= valid;
        if constexpr (kPaired) chunks[i].second[j] &= valid;
      }
    }
  }

  // The first kept key stands in for the places in front of it, for neither row.
  __device__ __forceinline__ void repeat_first_key(const Chunk& chunk, int key0) {
    uint32_t key = ~0u;
#pragma unroll
    for (int i = kLaneWords - 1; i >= 0; --i) {
      if (chunk.either(i) != 0) key = key0 + (lane_ * kLaneWords + i) * 32 + __ffs(chunk.either(i)) - 1;
    }
    key = __reduce_min_sync(kAllLanes, key);
    open(padding_);
#pragma unroll 1
    for (int i = lane_; i < padding_; i += kWarp) ring_.list()[i] = key;
  }

  // Waits until places may be written.
  __device__ __forceinline__ void open(int places) {
#pragma unroll 1
    for (; opened_ < min(places, end_); opened_ += kTileKeys) ahead_.wait_empty(), ahead_.advance();
  }

  // This warp has nothing more for the tiles that end at or before `places`.
  __device__ __forceinline__ void hand_on(int places) {
#pragma unroll 1
    for (; tile_end_ <= min(places, end_); tile_end_ += kTileKeys) {
      open(tile_end_);  // also without a key in it: else this arrival could come in the phase before
      __syncwarp();
      if constexpr (kPaired) {
        int* list = ring_.list();
        uint32_t* words = kept_.words + kept_.slot * (kTileKeys / 16);
#pragma unroll
        for (int i = 0; i < kTileKeys / 32; ++i) {
          const uint32_t entry = list[i * 32 + lane_];
          const uint32_t first = __ballot_sync(kAllLanes, entry >> kFirstRowBit & 1);
          const uint32_t second = __ballot_sync(kAllLanes, entry >> kSecondRowBit & 1);
          if (lane_ == 0) words[i] = first, words[kTileKeys / 32 + i] = second;
          list[i * 32 + lane_] = entry & kKeyMask;
        }
        if (++kept_.slot == kept_.depth) kept_.slot = 0;
        __syncwarp();
      }
      ring_.arrive_full(lane_);
      ring_.advance();
    }
  }

  // The `count` keys of kBits bits a lane, which begin at place `start`. `key0`: key of lane 0's bit 0.
  template <int kBits, class Some>
  __device__ __forceinline__ void write(const Some& words, int key0, int start, int count) {
    if (!kPaired && kBits >= 32 && count == kWarp * kBits) {
      write_all(key0, start, count);
    } else if (kBits == kFewestBits || count <= (kBits > 32 ? kMost / 2 : kMost)) {
      const int left = words.count(), behind = start + prefix_sum(left, lane_);
      open(start + count);
      write_some(words, key0 + lane_ * kBits, behind, left);
      hand_on(start + count);
    } else if constexpr (kBits > kFewestBits) {
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const Words<1, kPaired> quarter = quarter_of<kBits>(words, i);
        const int some = __reduce_add_sync(kAllLanes, quarter.count());
        write<kBits / 4>(quarter, key0 + i * (kWarp * kBits / 4), start, some);
        start += some;
      }
    }
  }

  // The bits of the i-th eight lanes, a quarter of a lane's bits for every lane.
  template <int kBits>
  __device__ __forceinline__ Words<1, kPaired> quarter_of(const Chunk& words, int i) const {
    static_assert(kBits == 128);
    const int source = i * (kWarp / 4) + lane_ / 4;
    Words<1, kPaired> quarter{};
#pragma unroll
    for (int j = 0; j < kLaneWords; ++j) {
      const uint32_t first = __shfl_sync(kAllLanes, words.first[j], source);
      if (lane_ % 4 == j) quarter.first[0] = first;
      if constexpr (kPaired) {
        const uint32_t second = __shfl_sync(kAllLanes, words.second[j], source);
        if (lane_ % 4 == j) quarter.second[0] = second;
      }
    }
    return quarter;
  }
  template <int kBits>
  __device__ __forceinline__ Words<1, kPaired> quarter_of(const Words<1, kPaired>& words, int i) const {
    const int source = i * (kWarp / 4) + lane_ / 4, shift = lane_ % 4 * (kBits / 4);
    const uint32_t mask = (1u << (kBits / 4)) - 1;
    Words<1, kPaired> quarter{};
    quarter.first[0] = __shfl_sync(kAllLanes, words.first[0], source) >> shift & mask;
    if constexpr (kPaired) quarter.second[0] = __shfl_sync(kAllLanes, words.second[0], source) >> shift & mask;
    return quarter;
  }

  // Every lane writes the `left` keys of its words, the last one in front of place `behind`. All places are open.
  template <int kWords>
  __device__ __forceinline__ void write_some(const Words<kWords, kPaired>& words, int key0, int behind, int left) {
    const int most = __reduce_max_sync(kAllLanes, left), skip = max(behind - end_, 0);
    uint32_t line = line_of(min(behind, end_));
    if (line > kRing) line -= kRing;
    uint32_t bits[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) bits[i] = words.either(i);
#pragma unroll 1
    for (int i = 0; i < most; ++i) {
      uint32_t top = bits[0], first = words.first[0], second = words.second[0];
      int at = 0;  // of the last word that is not zero
#pragma unroll
      for (int j = 1; j < kWords; ++j) {
        if (bits[j] == 0) continue;
        top = bits[j], at = j, first = words.first[j];
        if constexpr (kPaired) second = words.second[j];
      }
      const uint32_t bit = ptx::highest_bit(top);
      uint32_t entry = key0 + at * 32 + bit;
      if constexpr (kPaired) entry |= (first >> bit & 1) << kFirstRowBit | (second >> bit & 1) << kSecondRowBit;
      if (i >= skip) {
        line = min(line - 1, line - 1 + kRing);  // 0 - 1 is the greatest number there is
        if (top != 0) ring_.lists[line] = entry;
      }
      top &= ~(1u << bit);
#pragma unroll
      for (int j = 0; j < kWords; ++j) bits[j] = at == j ? top : bits[j];
    }
  }

  // Keys that are all kept, the usual case in a full row.
  __device__ __forceinline__ void write_all(int key0, int start, int count) {
    const int stop = start + count;
#pragma unroll 1
    while (start < stop && tile_end_ <= end_) {
      const int some = min(kTileKeys, stop - start);
      open(start + some);
#pragma unroll 1
      for (int i = lane_; i < some; i += kWarp) {
        uint32_t line = line_of(start + i);
        if (line >= kRing) line -= kRing;
        if (start + i < end_) ring_.lists[line] = key0 + i;
      }
      start += some, key0 += some;
      hand_on(start);
    }
  }

  // Where a place stands in the ring, or that and the ring's length.
  __device__ __forceinline__ uint32_t line_of(int place) const {
    return place + (ring_.stage.slot() * kTileKeys - (tile_end_ - kTileKeys));
  }

  Ring& ring_;
  KeptRing& kept_;
  Ring ahead_;  // of the tile that is opened next
  int worker_, lane_, end_, padding_;
  int tile_end_ = kTileKeys;  // of the tile that is handed on next
  int opened_ = 0;            // places that may be written
};

}  // namespace fgattn
