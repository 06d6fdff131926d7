// Bits of a mask row -> lists of key numbers, tile by tile, by one or more warps ahead of everybody else.
//
// A row with n kept keys makes ceil(n / kTileKeys) tiles. The keys stand at the end of that stretch, so that only the
// first tile has places without a key of its own: it repeats its first key there, the consumers mask these columns, and
// zeros stand in for their values. Every later tile is full, and the main loop needs no mask.
//
// A step takes four words a lane, 4096 keys: lanes in order hold keys in order, so a prefix sum of the population
// counts is each lane's place in the lists. Keys are written for a quarter of a step at a time, a word a lane; where
// these are more than the ring takes, for a sixteenth, a byte a lane.
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

// A ring of kDepth lists in shared memory. `full`: one arrival, by the decoder. `empty`: by its readers.
template <int kTileKeys_, int kDepth_>
struct KeyRing {
  static constexpr int kTileKeys = kTileKeys_, kDepth = kDepth_;
  uint32_t full, empty;  // barriers
  int* lists;
  Stage<kDepth> stage{};

  __device__ __forceinline__ int* list() const { return lists + stage.slot() * kTileKeys; }
  __device__ __forceinline__ void wait_full() const { ptx::barrier_wait(full + 8 * stage.slot(), stage.phase()); }
  __device__ __forceinline__ void wait_empty() const { ptx::barrier_wait(empty + 8 * stage.slot(), stage.phase() ^ 1); }
  __device__ __forceinline__ void arrive_full() const { ptx::barrier_arrive(full + 8 * stage.slot()); }
  __device__ __forceinline__ void arrive_empty() const { ptx::barrier_arrive(empty + 8 * stage.slot()); }
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

// Four words from `first`, zero past the row's end.
__device__ __forceinline__ void load_words(uint32_t (&words)[4], const uint32_t* row, int first, int num_words) {
  const uint4 four = first < num_words ? __ldg(reinterpret_cast<const uint4*>(row + first)) : uint4{0, 0, 0, 0};
  words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
}

// Bits past the last key are cleared whatever the mask holds there.
__device__ __forceinline__ void clear_past_end(uint32_t (&words)[4], int first, int num_keys) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int left = num_keys - (first + i) * 32;
    if (left < 32) words[i] = left > 0 ? words[i] & ((1u << left) - 1) : 0;
  }
}

struct RowCounts {
  int either, first, second;  // keys that the pair, the first, the second row keeps
};

// Counts the bits of one or two rows by a warp.
__device__ __forceinline__ RowCounts count_keys(const MaskRows& rows, int lane) {
  RowCounts counts{0, 0, 0};
#pragma unroll 4
  for (int at = lane * 4; at < rows.num_words; at += kWarp * 4) {
    uint32_t a[4], b[4];
    load_words(a, rows.first, at, rows.num_words);
    load_words(b, rows.second, at, rows.num_second_words);
    clear_past_end(a, at, rows.num_keys);
    clear_past_end(b, at, rows.num_keys);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      counts.either += __popc(a[i] | b[i]), counts.first += __popc(a[i]), counts.second += __popc(b[i]);
    }
  }
  return {__reduce_add_sync(kAllLanes, counts.either), __reduce_add_sync(kAllLanes, counts.first),
          __reduce_add_sync(kAllLanes, counts.second)};
}

// Word lane % 4 of the four of another lane.
__device__ __forceinline__ uint32_t pick(const uint32_t (&words)[4], int source, int lane) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t there = __shfl_sync(kAllLanes, words[i], source);
    if (lane % 4 == i) word = there;
  }
  return word;
}

// Every lane writes the keys of some bits; `key0` is that of bit 0, `behind` the place behind the lane's last key,
// `tile_start` that of the tile that is handed on next. All places are open, less than the ring's length behind it.
template <bool kPaired, class Ring>
__device__ __forceinline__ void write_keys(const Ring& ring, uint32_t in_first, uint32_t in_second, int key0,
                                           int behind, int end, int tile_start) {
  constexpr uint32_t kRing = Ring::kDepth * Ring::kTileKeys;
  uint32_t bits = in_first | in_second;
  for (; behind > end && bits != 0; --behind) bits &= ~(1u << ptx::highest_bit(bits));
  uint32_t line = min(behind, end) + (ring.stage.slot() * Ring::kTileKeys - tile_start);
  if (line > kRing) line -= kRing;
#pragma unroll 2
  for (int most = __reduce_max_sync(kAllLanes, __popc(bits)); most > 0; --most) {
    line = min(line - 1, line - 1 + kRing);  // 0 - 1 is the greatest number there is
    const uint32_t bit = ptx::highest_bit(bits);
    uint32_t entry = key0 + bit;
    if constexpr (kPaired) {
      entry |= (in_first >> bit & 1) << kFirstRowBit | (in_second >> bit & 1) << kSecondRowBit;
    }
    if (bits != 0) ring.lists[line] = entry;
    bits &= ~(1u << bit);
  }
}

// Writes the lists of one row or pair with `count` > 0 kept keys. If it holds fewer (a work order of another mask),
// what stands in the ring from before fills the rest: always a valid key. Keys beyond `count` are left out.
// `worker` of kWorkers warps: all of them look at all words, each writes the keys of some, and a list is full when
// every one of them has nothing more for it.
template <bool kPaired, int kWorkers, class Ring>
__device__ __forceinline__ void decode_rows(Ring& ring, KeptRing& kept, const MaskRows& rows, int count, int worker,
                                            int lane) {
  static_assert(!kPaired || kWorkers == 1);  // which row keeps a tile's keys is read off the whole list
  constexpr int kTileKeys = Ring::kTileKeys, kWords = 4;
  // Keys that may be written at once: they and the part of a tile before them reach into all lists of the ring but one,
  // which gather still holds while it waits for the tile that is handed on next.
  constexpr int kMost = (Ring::kDepth - 2) * kTileKeys;
  static_assert(kMost >= 256);
  const int end = (count + kTileKeys - 1) / kTileKeys * kTileKeys;
  const int padding = end - count;
  int place = padding;       // of the next key in the lists of this row, laid end to end
  int tile_end = kTileKeys;  // of the tile that is handed on next
  int opened = 0;            // places that may be written
  auto ahead = ring;

  auto open = [&](int places) {
#pragma unroll 1
    for (; opened < min(places, end); opened += kTileKeys) ahead.wait_empty(), ahead.advance();
  };
  auto hand_on = [&](int places) {
#pragma unroll 1
    for (; tile_end <= min(places, end); tile_end += kTileKeys) {
      open(tile_end);  // also without a key in it: else this arrival could come in the phase before
      __syncwarp();
      if constexpr (kPaired) {
        int* list = ring.list();
        uint32_t* words = kept.words + kept.slot * (kTileKeys / 16);
#pragma unroll
        for (int i = 0; i < kTileKeys / 32; ++i) {
          const uint32_t entry = list[i * 32 + lane];
          const uint32_t first = __ballot_sync(kAllLanes, entry >> kFirstRowBit & 1);
          const uint32_t second = __ballot_sync(kAllLanes, entry >> kSecondRowBit & 1);
          if (lane == 0) words[i] = first, words[kTileKeys / 32 + i] = second;
          list[i * 32 + lane] = entry & kKeyMask;
        }
        if (++kept.slot == kept.depth) kept.slot = 0;
        __syncwarp();
      }
      if (lane == 0) ring.arrive_full();
      ring.advance();
    }
  };
  auto write = [&](uint32_t in_first, uint32_t in_second, int key0, int behind) {
    write_keys<kPaired>(ring, in_first, in_second, key0, behind, end, tile_end - kTileKeys);
  };
  // 1024 keys that are all kept, the usual case in a full row.
  auto write_all = [&](int key0, int start) {
#pragma unroll 1
    for (int key = 0; key < 32 * kWarp && tile_end <= end; key += kTileKeys) {
      const int count = min(kTileKeys, 32 * kWarp - key);
      open(start + key + count);
#pragma unroll 1
      for (int i = lane; i < count; i += kWarp) {
        uint32_t line = start + key + i + (ring.stage.slot() * kTileKeys - (tile_end - kTileKeys));
        if (line >= Ring::kDepth * kTileKeys) line -= Ring::kDepth * kTileKeys;
        if (start + key + i < end) ring.lists[line] = key0 + key + i;
      }
      hand_on(start + key + count);
    }
  };
  auto load = [&](uint32_t (&first)[kWords], uint32_t (&second)[kWords], int at) {
    load_words(first, rows.first, at, rows.num_words);
    if constexpr (kPaired) load_words(second, rows.second, at, rows.num_second_words);
  };

  uint32_t next_first[kWords], next_second[kWords] = {};
  load(next_first, next_second, lane * kWords);
#pragma unroll 1
  for (int step = 0; step < rows.num_words && tile_end <= end; step += kWarp * kWords) {
    uint32_t first[kWords], second[kWords];
    int found = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) first[i] = next_first[i], second[i] = next_second[i];
    if ((step + kWarp * kWords) * 32 > rows.num_keys) {
      clear_past_end(first, step + lane * kWords, rows.num_keys);
      clear_past_end(second, step + lane * kWords, rows.num_keys);
    }
    int key = 0;  // this lane's first one
#pragma unroll
    for (int i = kWords - 1; i >= 0; --i) {
      const uint32_t word = first[i] | second[i];
      found += __popc(word);
      if (word != 0) key = (step + lane * kWords + i) * 32 + __ffs(word) - 1;
    }
    load(next_first, next_second, step + (kWarp + lane) * kWords);
    const int lane_end = place + prefix_sum(found, lane);
    const uint32_t lanes = __ballot_sync(kAllLanes, found > 0);
    if (lanes == 0) continue;
    if (place == padding && padding > 0 && worker == 0) {
      // Nothing has been found before: the first kept key stands in for the places in front of it, for neither row.
      key = __shfl_sync(kAllLanes, key, __ffs(lanes) - 1);
      open(padding);
#pragma unroll 1
      for (int i = lane; i < padding; i += kWarp) ring.list()[i] = key;
    }
    // 32 words at a time, one a lane; if they hold too many keys, 8 words, a byte a lane.
#pragma unroll 1
    for (int quarter = worker; quarter < kWords; quarter += kWorkers) {
      const int source = quarter * (kWarp / kWords) + lane / kWords, key0 = (step + quarter * kWarp) * 32;
      const int end_before = __shfl_sync(kAllLanes, lane_end, max(quarter * (kWarp / kWords) - 1, 0));
      const int start = quarter == 0 ? place : end_before;
      const uint32_t a = pick(first, source, lane), b = kPaired ? pick(second, source, lane) : 0;
      const int word_end = start + prefix_sum(__popc(a | b), lane);
      const int words_end = __shfl_sync(kAllLanes, word_end, kWarp - 1);
      hand_on(start);
      if (!kPaired && words_end - start == 32 * kWarp) {
        write_all(key0, start);
      } else if (words_end - start <= kMost) {
        open(words_end);
        write(a, b, key0 + lane * 32, word_end);
      } else {
        int from = start;
#pragma unroll 1
        for (int part = 0; part < 4; ++part) {
          const int word = part * 8 + lane / 4, shift = lane % 4 * 8;
          const uint32_t c = __shfl_sync(kAllLanes, a, word) >> shift & 255;
          const uint32_t d = kPaired ? __shfl_sync(kAllLanes, b, word) >> shift & 255 : 0;
          const int byte_end = from + prefix_sum(__popc(c | d), lane);
          from = __shfl_sync(kAllLanes, byte_end, kWarp - 1);
          open(from);
          write(c, d, key0 + part * 256 + lane * 8, byte_end);
          hand_on(from);
        }
      }
      hand_on(words_end);
    }
    place = __shfl_sync(kAllLanes, lane_end, kWarp - 1);
    hand_on(place);
  }
  hand_on(end);
}

}  // namespace fgattn
