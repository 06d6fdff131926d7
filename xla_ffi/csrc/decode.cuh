// Bits of a mask row -> lists of key numbers, tile by tile, by one warp ahead of everybody else.
//
// A row with n kept keys makes ceil(n / kTileKeys) tiles. The keys stand at the end of that stretch, so that only the
// first tile has places without a key of its own: it repeats its first key there and the consumers mask these
// columns. Every later tile is full, and the main loop needs no mask.
//
// A step takes kWords words a lane, 32 kWords neighbouring keys: lanes in order hold keys in order, so a prefix sum of
// the population counts is each lane's place in the list. More words a lane mean fewer prefix sums for sparse rows.
#pragma once
#include <cstdint>

#include "ptx.cuh"

namespace fgattn {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

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

// Writes the lists of one row with `count` > 0 kept keys. If the row holds fewer (a work order of another mask), what
// stands in the ring from before fills the rest: always a valid key. Keys beyond `count` are left out.
template <int kWords, class Ring>
__device__ __forceinline__ void decode_row(Ring& ring, const uint32_t* row, int num_words, int num_keys, int count,
                                           int lane) {
  constexpr int kTileKeys = Ring::kTileKeys;
  const int end = (count + kTileKeys - 1) / kTileKeys * kTileKeys;
  const int padding = end - count;
  int tile_end = kTileKeys;  // of the tile being written
  int place = padding;       // of the step's first key
  ring.wait_empty();

  auto finish_tile = [&] {
    __syncwarp();
    if (tile_end == kTileKeys && padding > 0) {
      int* list = ring.list();
      const int key = list[padding];
      for (int i = lane; i < padding; i += kWarp) list[i] = key;
      __syncwarp();
    }
    if (lane == 0) ring.arrive_full();
    ring.advance();
    tile_end += kTileKeys;
    if (tile_end <= end) ring.wait_empty();
  };

  uint32_t next[kWords];
  load_words(next, row, lane * kWords, num_words, num_keys);
  for (int first = 0; first < num_words && tile_end <= end; first += kWarp * kWords) {
    uint32_t words[kWords];
    int found = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = next[i], found += __popc(words[i]);
    const int mine = first + lane * kWords;
    load_words(next, row, mine + kWarp * kWords, num_words, num_keys);
    const int up_to_here = prefix_sum(found, lane);
    int at = place + up_to_here - found;
    place += __shfl_sync(kAllLanes, up_to_here, kWarp - 1);
    while (true) {
      int* list = ring.list() - (tile_end - kTileKeys);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        while (words[i] != 0 && at < tile_end) {
          list[at++] = (mine + i) * 32 + __ffs(words[i]) - 1;
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
