// The asynchronous gather-load: key numbers in, a swizzled tile and a barrier arrival out (FG-Attn, section 4).
//
//   global memory, one line of H numbers per key          shared memory, panels of 64 columns
//   key 3   ........................................  ->  line 0  |c0 c1 c2 c3 c4 c5 c6 c7|   16-byte chunks,
//   key 17  ........................................  ->  line 1  |c1 c0 c3 c2 c5 c4 c7 c6|   chunk c of line r
//   key 18  ........................................  ->  line 2  |c2 c3 c0 c1 c6 c7 c4 c5|   at place c ^ (r % 8)
//
// Eight neighbouring lanes copy one 128-byte piece of a line, so a warp's instruction moves 4 lines x 128 bytes in
// whole sectors and without bank conflicts. Thread t owns chunk t % 8 of lines t / 8 + 16 i: 16 is a multiple of 8, so
// its place in the swizzle is one constant, and a line costs one address product and H / 64 copies. (With 64 threads: 8
// i.)
#pragma once
#include <cstdint>

#include "ptx.cuh"

namespace fgattn {

constexpr int kPanelColumns = 64;  // 128 bytes: the width of the swizzle
constexpr int kPanelLineBytes = 128;

template <int kTileKeys, int kHeadDim, int kThreads>
class Gather {
 public:
  static constexpr int kLinesPerPass = kThreads / 8;
  static constexpr int kPasses = kTileKeys / kLinesPerPass;
  static constexpr int kBatch = kPasses % 8 == 0 ? 8 : kPasses;  // lines whose keys are read ahead
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static_assert(kLinesPerPass % 8 == 0 && kTileKeys % kLinesPerPass == 0 && kHeadDim % kPanelColumns == 0);

  // `thread`: 0..kThreads - 1.
  __device__ __forceinline__ explicit Gather(int thread) : line_(thread / 8), chunk_(thread % 8) {
    place_ = line_ * kPanelLineBytes + ((chunk_ ^ (line_ % 8)) * 16);
  }

  // Starts the copies of this thread's lines into `tile`. `list`: key numbers of the tile, in shared memory. `head`:
  // key 0 of the head in global memory. `token_bytes`: from one key's line to the next there.
  __device__ __forceinline__ void start(uint32_t list, const char* head, uint32_t token_bytes, uint32_t tile) const {
    start<false>(list, head, token_bytes, tile, 0);
  }

  // The same with zeros in the first `empty` lines.
  __device__ __forceinline__ void start_behind(int empty, uint32_t list, const char* head, uint32_t token_bytes,
                                               uint32_t tile) const {
    start<true>(list, head, token_bytes, tile, empty);
    ptx::fence_shared_stores();
  }

 private:
  template <bool kSomeEmpty>
  __device__ __forceinline__ void start(uint32_t list, const char* head, uint32_t token_bytes, uint32_t tile,
                                        int empty) const {
    const char* mine = ptx::opaque(head + chunk_ * 16);
    const uint32_t to = tile + place_, keys = list + line_ * 4;
#pragma unroll
    for (int batch = 0; batch < kPasses; batch += kBatch) {
      uint32_t key[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) key[i] = ptx::load_shared(keys + (batch + i) * kLinesPerPass * 4);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const char* line = mine + static_cast<uint64_t>(key[i]) * token_bytes;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          const uint32_t place = to + (panel * kTileKeys + (batch + i) * kLinesPerPass) * kPanelLineBytes;
          if (kSomeEmpty && line_ + (batch + i) * kLinesPerPass < empty) {
            ptx::store_shared_zeros_16(place);
          } else {
            ptx::copy_async_16<2 * kHeadDim>(place, line + panel * kPanelLineBytes);
          }
        }
      }
    }
  }

  int line_, chunk_;
  uint32_t place_;
};

}  // namespace fgattn
