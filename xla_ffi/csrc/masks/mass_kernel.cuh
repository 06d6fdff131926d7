// The exact slice mass: what the queries of a row give each key, summed (LoSA, arXiv 2608.12032).
//
// A thread adds up 32 queries of a key, four neighbouring lanes add theirs by shuffles, always in the same order.
#pragma once
#include <cstdint>

#include "masks/scores.cuh"

namespace fgattn {

template <class C>
class KeyMasses {
  static constexpr int kColumns = C::kConsumerQueries / 4, kRows = C::kRowsOfConsumer;

 public:
  // `masses`: [heads of `items`, R, W * 32], zeros behind the last key.
  __device__ __forceinline__ KeyMasses(const ScoreArgs& args, const ScoreItems& items, float* masses,
                                       const ScoreMemory<C>& shared, int thread)
      : args_(args), items_(items), shared_(shared), masses_(masses), warp_(thread / kWarp), lane_(thread % kWarp) {
    factor_ = kLog2E * __ldg(args.scale);
  }

  __device__ __forceinline__ void begin(const ScoreItem& item, int first_query) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      shift_[i] = -kLog2E * shared_.lse[first_query + i / 2 * 8 + lane_ % 4 * 2 + i % 2];
    }
    // Of four lanes with the same two keys, one writes the first and one the second, for each row.
    const int mine = kRows == 1 ? 0 : lane_ % 4 / 2, row = (item.first_position + first_query) / C::kQueryBlock + mine;
    const int64_t head = static_cast<int64_t>(item.batch) * args_.num_heads + item.head - items_.first_head;
    const int key = 16 * warp_ + lane_ / 4 + lane_ % 2 * 8;
    // Behind the last key, and where nobody is alive, all masses are 0.
    keys_left_ = shared_.alive[first_query / C::kQueryBlock + mine] != 0 ? args_.num_keys - key : 0;
    writes_ = row < args_.num_rows && lane_ % 4 < 2 * kRows;
    out_ = masses_ + (head * args_.num_rows + row) * (32 * static_cast<int64_t>(args_.num_words)) + key;
  }

  template <int kHalf>
  __device__ __forceinline__ void at(int tile, const float (&scores)[2 * kColumns]) {
    float sums[kRows][2] = {};
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        sums[i / (kColumns / kRows)][line] += ptx::exp2(fmaf(scores[i / 2 * 4 + 2 * line + i % 2], factor_, shift_[i]));
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        sums[row][line] += __shfl_xor_sync(kAllLanes, sums[row][line], 1);
        sums[row][line] += __shfl_xor_sync(kAllLanes, sums[row][line], 2);
      }
    }
    const bool last_row = lane_ % 4 >= 2;  // of two
    const float first_key = last_row ? sums[kRows - 1][0] : sums[0][0];
    const float second_key = last_row ? sums[kRows - 1][1] : sums[0][1];
    const float mass = lane_ % 2 == 0 ? first_key : second_key;
    const int first = tile * C::kTileKeys + kHalf * (C::kTileKeys / 2);
    if (writes_) out_[first] = first < keys_left_ ? mass : 0;
  }

  __device__ __forceinline__ void end(const ScoreItem&) {}

 private:
  static constexpr float kLog2E = 1.4426950408889634f;
  const ScoreArgs& args_;
  const ScoreItems& items_;
  const ScoreMemory<C>& shared_;
  float shift_[kColumns], factor_;
  float *masses_, *out_;
  int warp_, lane_, keys_left_;
  bool writes_;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) exact_mass_kernel(const __grid_constant__ ExactMassArgs args,
                                                                       const ScoreItems items) {
  score_rows<C>(args.scores, items, [&](const ScoreMemory<C>& shared, int thread) {
    return KeyMasses<C>(args.scores, items, args.workspace, shared, thread);
  });
}

}  // namespace fgattn
