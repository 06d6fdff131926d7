// Second passes over the keys of mean queries: what becomes of the scores once their LSE is known.
#pragma once
#include <cstdint>

#include "masks/carry.cuh"
#include "masks/mean_kernel.cuh"
#include "masks/select_scores.cuh"
#include "softmax.cuh"

namespace fgattn {

// Probabilities of a thread's scores, averaged over the means of their row: every lane of a row has them.
template <int kGroups>
struct RowProbabilities {
  const MeanWork& work;
  int first_line;
  float factor, lse[kGroups][2];

  __device__ __forceinline__ RowProbabilities(const MeanWork& work, int head, int first_line)
      : work(work), first_line(first_line), factor(kLog2E * __ldg(work.args.scores.scale)) {
    // The four lanes of a line share its parts.
    constexpr int kOfLane = kMostKeyParts / 4;
    float2 parts[2 * kGroups][kOfLane];
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
#pragma unroll
      for (int j = 0; j < kOfLane; ++j) {
        const int part = threadIdx.x % 4 + 4 * j;
        parts[i][j] = *work.partial(head, first_line + 64 * (i / 2) + 8 * (i % 2), min(part, work.summed_parts - 1));
        if (part >= work.summed_parts) parts[i][j] = {-INFINITY, 0};
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
      float most = -INFINITY, sum = 0;
#pragma unroll
      for (int j = 0; j < kOfLane; ++j) most = fmaxf(most, parts[i][j].x);
      most = quad_max(most);
      const float shift = MeanWork::finite_or_zero(most);
#pragma unroll
      for (int j = 0; j < kOfLane; ++j) sum += parts[i][j].y * ptx::exp2(parts[i][j].x - shift);
      lse[i / 2][i % 2] = shift + ptx::log2(quad_sum(sum));
    }
  }
  // Of kScores scores from `first` on, a multiple of 4.
  template <int kScores, int kAll>
  __device__ __forceinline__ void of(int group, float (&scores)[kAll], int first) const {
#pragma unroll
    for (int i = first; i < first + kScores; ++i) {
      scores[i] = ptx::exp2(fmaf(scores[i], factor, -lse[group][i / 2 % 2]));
    }
    const int num_means = work.args.num_means;
    if (num_means == 1) return;
    const float share[2] = {work.share(first_line + 64 * group), work.share(first_line + 64 * group + 8)};
#pragma unroll
    for (int i = first; i < first + kScores; ++i) {
      const float part = share[i / 2 % 2];
      scores[i] = part == 0 ? 0.0f : scores[i] * part;
    }
#pragma unroll 1
    for (int distance = 4; distance < 4 * num_means; distance *= 2) {
#pragma unroll
      for (int i = first; i < first + kScores; ++i) scores[i] += __shfl_xor_sync(kAllLanes, scores[i], distance);
    }
  }
};

// Of the four lanes of a line, each with bits 2 c + b for its columns 8 c + 2 quad + b, lane i gets the word of 32
// neighbouring keys that has its number.
__device__ __forceinline__ uint32_t words_of_quad(uint32_t bits, int quad) {
  // Bytes: lane i gets byte i of all four.
  uint32_t theirs = __shfl_xor_sync(kAllLanes, bits, 2);
  bits = __byte_perm(bits, theirs, quad < 2 ? 0x5410 : 0x3276);
  theirs = __shfl_xor_sync(kAllLanes, bits, 1);
  bits = __byte_perm(bits, theirs, quad % 2 == 0 ? 0x6240 : 0x3715);
  // Pairs of bits: pair c of byte j to pair j of byte c.
  uint32_t swapped = (bits ^ bits >> 6) & 0x00CC00CCu;
  bits ^= swapped ^ swapped << 6;
  swapped = (bits ^ bits >> 12) & 0x0000F0F0u;
  return bits ^ swapped ^ swapped << 12;
}

// Second pass: bits of the keys whose probability is above the threshold, and how many these are.
template <class C, bool kOneMean>
__global__ void __launch_bounds__(C::kThreads, 1) mean_bits_kernel(const __grid_constant__ MeanWork work) {
  pass_over_keys<C>(work, [&](const MeanItem& item, int first_line, auto score) {
    const ScoreArgs& args = work.args.scores;
    const int lane = threadIdx.x % kWarp, quad = lane % 4;
    const float log_limit = kLog2E * __ldg(work.args.log_threshold + item.head % args.num_heads);
    const float limit = ptx::exp2(log_limit);
    const RowProbabilities<C::kGroups> probabilities(work, item.head, first_line);
    const float factor = probabilities.factor;
    bool writes[C::kGroups][2];
    int row[C::kGroups][2], count[C::kGroups][2];
#pragma unroll
    for (int i = 0; i < 2 * C::kGroups; ++i) {
      const int number = first_line + 64 * (i / 2) + 8 * (i % 2), of_head = number / work.args.num_means;
      row[i / 2][i % 2] = item.head * args.num_rows + of_head, count[i / 2][i % 2] = 0;
      writes[i / 2][i % 2] = number % work.args.num_means == 0 && of_head < args.num_rows;
    }
    score([&](int group, int first_key, float (&scores)[C::kScores]) {
      if constexpr (!kOneMean) {
#pragma unroll
        for (int first = 0; first < C::kScores; first += 16) probabilities.template of<16>(group, scores, first);
      }
      const int word = first_key / 32 + quad, left = args.num_keys - 32 * word;
      const uint32_t inside = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        const float least = -probabilities.lse[group][line] - log_limit;
        // Signs, one bit behind the other: what is not below is kept, NaN too. Two halves, as each shift waits for the
        // one before it.
        uint32_t below[2] = {0, 0};
#pragma unroll
        for (int bit = C::kScores / 4 - 1; bit >= 0; --bit) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = half * C::kScores / 4 + bit;  // bit 2 c + b is column 8 c + 2 quad + b
            const float score = scores[at / 2 * 4 + 2 * line + at % 2];
            const float sign = kOneMean ? fmaf(score, factor, least) : score <= limit ? -1.0f : 1.0f;
            below[half] = ptx::shift_in_sign(below[half], sign);
          }
        }
        const uint32_t kept = words_of_quad(~(below[0] | below[1] << (C::kScores / 4)), quad) & inside;
        count[group][line] += __popc(kept);
        if (writes[group][line]) work.args.bits[int64_t{row[group][line]} * args.num_words + word] = kept;
      }
    });
#pragma unroll
    for (int i = 0; i < 2 * C::kGroups; ++i) {
      int all = count[i / 2][i % 2];
      all += __shfl_xor_sync(kAllLanes, all, 1);
      all += __shfl_xor_sync(kAllLanes, all, 2);
      if (writes[i / 2][i % 2] && quad == 0) atomicAdd(work.args.counts + row[i / 2][i % 2], all);
    }
  });
}

// Second pass where keys are ranked: probabilities in 16 bits, `HalfScores` of select_scores.cuh,
// [heads of the pass, R, W * 32].
template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) mean_probabilities_kernel(const __grid_constant__ MeanWork work) {
  if (work.only_flagged) {
    const MeanItem item = work.template at<C>(blockIdx.x);
    const int num_rows = work.args.scores.num_rows;
    int flagged = 0;
    for (int i = threadIdx.x % kWarp; i < C::kLines; i += kWarp) {
      const int row = (item.first_line + i) / work.args.num_means;
      if (row < num_rows) flagged |= *work.flag(int64_t{item.head} * num_rows + row);
    }
    if (!__any_sync(kAllLanes, flagged)) return;
  }
  pass_over_keys<C>(work, [&](const MeanItem& item, int first_line, auto score) {
    const ScoreArgs& args = work.args.scores;
    const int lane = threadIdx.x % kWarp, quad = lane % 4;
    const RowProbabilities<C::kGroups> probabilities(work, item.head, first_line);
    const int64_t head_rows = int64_t{item.head - work.first_head} * args.num_rows;
    int row[C::kGroups][2];  // -1: nothing to write
#pragma unroll
    for (int i = 0; i < 2 * C::kGroups; ++i) {
      const int number = first_line + 64 * (i / 2) + 8 * (i % 2), of_head = number / work.args.num_means;
      row[i / 2][i % 2] = number % work.args.num_means == 0 && of_head < args.num_rows ? of_head : -1;
    }
    score([&](int group, int first_key, float (&scores)[C::kScores]) {
#pragma unroll
      for (int four = 0; four < C::kScores / 16; ++four) {  // blocks of eight columns
        probabilities.template of<16>(group, scores, 16 * four);
#pragma unroll
        for (int line = 0; line < 2; ++line) {
          uint32_t pairs[4];  // of neighbouring columns, in four blocks
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* pair = scores + 16 * four + 4 * i + 2 * line;
            pairs[i] = HalfScores<4096>::pair(pair[0], pair[1]);
          }
          // The four lanes of a line turn their 4 x 4 pairs, so that each has eight neighbouring columns.
#pragma unroll
          for (int distance = 1; distance < 4; distance *= 2) {
            const bool upper = (quad & distance) != 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (i & distance) continue;
              const uint32_t theirs = __shfl_xor_sync(kAllLanes, upper ? pairs[i] : pairs[i + distance], distance);
              if (upper) {
                pairs[i] = theirs;
              } else {
                pairs[i + distance] = theirs;
              }
            }
          }
          if (row[group][line] >= 0) {
            uint16_t* out = reinterpret_cast<uint16_t*>(work.probabilities()) +
                            32 * int64_t{args.num_words} * (head_rows + row[group][line]) + first_key + 32 * four +
                            8 * quad;
            *reinterpret_cast<uint4*>(out) = {pairs[0], pairs[1], pairs[2], pairs[3]};
          }
        }
      }
    });
  });
}

}  // namespace fgattn
