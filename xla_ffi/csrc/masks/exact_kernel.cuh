// The exact slice mask: which slices hold a probability above a threshold (FG-Attn, arXiv 2509.16518, section 5.1).
//
// p = exp(scale * q k - lse) > t is scale * q k - lse > log t: one multiply-add and one comparison a score, no exponential.
#pragma once
#include <cstdint>

#include "masks/scores.cuh"

namespace fgattn {

// Lanes 4 i to 4 i + 3 of a vote have seen parts of the same key: bit i says whether one of them keeps it.
__device__ __forceinline__ uint32_t kept_of_lanes(uint32_t votes) {
  votes |= votes >> 2;
  votes = (votes | votes >> 1) & 0x11111111u;
  votes = (votes | votes >> 3) & 0x03030303u;
  votes = (votes | votes >> 6) & 0x000F000Fu;
  return (votes | votes >> 12) & 0xFFu;
}

template <class C>
class KeptKeys {
  static constexpr int kColumns = C::kConsumerQueries / 4, kRows = C::kRowsOfConsumer;

 public:
  __device__ __forceinline__ KeptKeys(const ExactMaskArgs& call, const ScoreMemory<C>& shared, int thread)
      : call_(call), shared_(shared), scale_(__ldg(call.scores.scale)), warp_(thread / kWarp), lane_(thread % kWarp) {}

  __device__ __forceinline__ void begin(const ScoreItem& item, int first_query) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      minus_lse_[i] = -shared_.lse[first_query + i / 2 * 8 + lane_ % 4 * 2 + i % 2];
    }
    limit_ = __ldg(call_.log_threshold + item.head);
    // Lane i writes for row i, as many as there are.
    const int mine = lane_ % kRows, row = (item.first_position + first_query) / C::kQueryBlock + mine;
    const int64_t head = static_cast<int64_t>(item.batch) * call_.scores.num_heads + item.head;
    row_ = head * call_.scores.num_rows + row;
    writes_ = lane_ < kRows && row < call_.scores.num_rows;
    alive_ = shared_.alive[first_query / C::kQueryBlock + mine] ? 0xFFFFu : 0u;
    count_ = 0;
  }

  template <int kHalf>
  __device__ __forceinline__ void at(int tile, const float (&scores)[2 * kColumns]) {
    // Sixteen neighbouring keys are half a word: that of this warp's keys.
    const int number = 8 * tile + 4 * kHalf + warp_, left = call_.scores.num_keys - 16 * number;
    const uint32_t inside = left >= 16 ? 0xFFFFu : left > 0 ? (1u << left) - 1 : 0u;
    bool kept[kRows][2] = {};
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        // Not above is what is refused: NaN is kept.
        kept[i / (kColumns / kRows)][line] |=
            !(fmaf(scores[i / 2 * 4 + 2 * line + i % 2], scale_, minus_lse_[i]) <= limit_);
      }
    }
    uint32_t keys[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const uint32_t first = __ballot_sync(kAllLanes, kept[row][0]), second = __ballot_sync(kAllLanes, kept[row][1]);
      keys[row] = kept_of_lanes(first) | kept_of_lanes(second) << 8;
    }
    const uint32_t mine = (lane_ % kRows == 0 ? keys[0] : keys[kRows - 1]) & inside & alive_;
    count_ += __popc(mine);
    if (writes_) {
      reinterpret_cast<uint16_t*>(call_.bits + row_ * call_.scores.num_words)[number] = static_cast<uint16_t>(mine);
    }
  }

  __device__ __forceinline__ void end(const ScoreItem&) {
    if (writes_) atomicAdd(call_.counts + row_, count_);
  }

 private:
  const ExactMaskArgs& call_;
  const ScoreMemory<C>& shared_;
  float minus_lse_[kColumns], scale_, limit_;
  int64_t row_;
  uint32_t alive_;
  int count_, warp_, lane_;
  bool writes_;
};

// `counts` are zeros before.
template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) exact_mask_kernel(const __grid_constant__ ExactMaskArgs args,
                                                                       const ScoreItems items) {
  score_rows<C>(args.scores, items, [&](const ScoreMemory<C>& shared, int thread) {
    return KeptKeys<C>(args, shared, thread);
  });
}

}  // namespace fgattn
