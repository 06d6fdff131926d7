// Bits of a mask row -> lists of key numbers, tile by tile, by one warp ahead of everybody else.
//
// A row with n kept keys makes ceil(n / kTileKeys) tiles. The keys stand at the end of that stretch, so that only the
// first tile has places without a key of its own: it repeats its first key there and the consumers mask these
// columns. Every later tile is full, and the main loop needs no mask.
//
// A step takes kWords words a lane, 32 kWords neighbouring keys: lanes in order hold keys in order, so a prefix sum of
// the population counts is each lane's place in the list. More words a lane mean fewer prefix sums for sparse rows.
//
// A pair of rows is decoded as the union of their keys. While a tile is written the two highest bits of an entry say which
// rows keep the key; they leave as words of bits for the consumers, `kept`.
#pragma once
#include <cstdint>

#include "ptx.cuh"

namespace fgattn {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kFirstRowBit = 30, kSecondRowBit = 31;
constexpr uint32_t kKeyMask = (1u << kFirstRowBit) - 1;

// A ring of kDepth lists in shared memory. `full`: one arrival, by the decoder. `empty`: by its readers.
template <int kTileKeys_, int kDepth>
struct KeyRing {
  static constexpr int kTileKeys = kTileKeys_;
  uint32_t full, empty;  // barriers, 8 bytes apart
  int* lists;
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ int* list() const { return lists + slot * kTileKeys; }
  __device__ __forceinline__ void wait_full() const { ptx::barrier_wait(full + 8 * slot, phase); }
  __device__ __forceinline__ void wait_empty() const { ptx::barrier_wait(empty + 8 * slot, phase ^ 1); }
  __device__ __forceinline__ void arrive_full() const { ptx::barrier_arrive(full + 8 * slot); }
  __device__ __forceinline__ void arrive_empty() const { ptx::barrier_arrive(empty + 8 * slot); }
  __device__ __forceinline__ void advance() {
    if (++slot == kDepth) slot = 0, phase ^= 1;
  }
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

// kWords words from `first`, zero past the row's end; bits past the last key are cleared whatever the mask holds there.
template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&words)[kWords], const uint32_t* row, int first, int num_words,
                                           int num_keys) {
  if constexpr (kWords == 4) {
    const uint4 four = first < num_words ? __ldg(reinterpret_cast<const uint4*>(row + first)) : uint4{0, 0, 0, 0};
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  } else if constexpr (kWords == 2) {
    const uint2 two = first < num_words ? __ldg(reinterpret_cast<const uint2*>(row + first)) : uint2{0, 0};
    words[0] = two.x, words[1] = two.y;
  } else {
    static_assert(kWords == 1);
    words[0] = first < num_words ? __ldg(row + first) : 0;
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
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
    load_words(a, rows.first, at, rows.num_words, rows.num_keys);
    load_words(b, rows.second, at, rows.num_second_words, rows.num_keys);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      counts.either += __popc(a[i] | b[i]), counts.first += __popc(a[i]), counts.second += __popc(b[i]);
    }
  }
  return {__reduce_add_sync(kAllLanes, counts.either), __reduce_add_sync(kAllLanes, counts.first),
          __reduce_add_sync(kAllLanes, counts.second)};
}

// Writes the lists of one row or pair with `count` > 0 kept keys. If it holds fewer (a work order of another mask),
// what stands in the ring from before fills the rest: always a valid key. Keys beyond `count` are left out.
template <int kWords, bool kPaired, class Ring>
__device__ __forceinline__ void decode_rows(Ring& ring, KeptRing& kept, const MaskRows& rows, int count, int lane) {
  constexpr int kTileKeys = Ring::kTileKeys;
  const int end = (count + kTileKeys - 1) / kTileKeys * kTileKeys;
  const int padding = end - count;
  int tile_end = kTileKeys;  // of the tile being written
  int place = padding;       // of the step's first key
  ring.wait_empty();

  auto finish_tile = [&] {
    int* list = ring.list();
    __syncwarp();
    if (tile_end == kTileKeys && padding > 0) {
      const int key = list[padding] & kKeyMask;  // here for neither row
      for (int i = lane; i < padding; i += kWarp) list[i] = key;
      __syncwarp();
    }
    if constexpr (kPaired) {
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
    tile_end += kTileKeys;
    if (tile_end <= end) ring.wait_empty();
  };
  auto load = [&](uint32_t (&first)[kWords], uint32_t (&second)[kWords], int at) {
    load_words(first, rows.first, at, rows.num_words, rows.num_keys);
    if constexpr (kPaired) load_words(second, rows.second, at, rows.num_second_words, rows.num_keys);
  };

  uint32_t next_first[kWords], next_second[kWords];
  load(next_first, next_second, lane * kWords);
  for (int step = 0; step < rows.num_words && tile_end <= end; step += kWarp * kWords) {
    uint32_t words[kWords], first_words[kWords], second_words[kWords];
    int found = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = next_first[i];
      if constexpr (kPaired) {
        first_words[i] = next_first[i], second_words[i] = next_second[i];
        words[i] |= next_second[i];
      }
      found += __popc(words[i]);
    }
    const int mine = step + lane * kWords;
    load(next_first, next_second, mine + kWarp * kWords);
    const int up_to_here = prefix_sum(found, lane);
    int at = place + up_to_here - found;
    place += __shfl_sync(kAllLanes, up_to_here, kWarp - 1);
    while (true) {
      int* list = ring.list() - (tile_end - kTileKeys);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        while (words[i] != 0 && at < tile_end) {
          const int bit = __ffs(words[i]) - 1;
          uint32_t entry = (mine + i) * 32 + bit;
          if constexpr (kPaired) {
            entry |= (first_words[i] >> bit & 1) << kFirstRowBit | (second_words[i] >> bit & 1) << kSecondRowBit;
          }
          list[at++] = entry;
          words[i] &= words[i] - 1;
        }
      }
      if (place < tile_end) break;
      finish_tile();
      if (tile_end > end) break;
    }
  }
  while (tile_end <= end) finish_tile();
}

}  // namespace fgattn
