// Where in a row the cut lies, guessed from a sample of its keys: so that one look at all of them is enough.
//
// The sample is a word of every stretch of the row, at a place of the stretch that looks random but is the same in every
// run: keys of a video come in periods that a fixed step could fall in with. What lies below a pattern is counted, or
// summed, in bins of patterns; a pattern bounds the cut if the sample says so with room to spare. A
// share is asked of what is *not* kept, whose scores are all small: the few keys that hold much of a row are not in most
// samples. A wrong guess costs another look and nothing else.
#pragma once
#include <cstdint>

#include "masks/select_scores.cuh"

namespace fgattn {

// A pattern, and what reaches it.
struct Bound {
  int pattern;
  Amount amount;
};

// What is looked for: the cut lies between a bound that reaches it, and one that does not.
struct Cut {
  bool by_mass;
  int count;
  float mass;
  __device__ __forceinline__ bool reached(const Amount& x) const {
    return x.count > 0 && (by_mass ? x.mass >= mass : x.count >= count);
  }
};

template <class Scores>
class RowSample {
 public:
  static constexpr int kThreads = kSelectThreads, kWords = 8 / Scores::kOfWord;  // of a thread
  static constexpr int kOfThread = 4, kBins = kOfThread * kThreads;

  // `shared`: kBins + 4 numbers.
  __device__ __forceinline__ RowSample(const uint32_t* row, int num_keys, int* shared)
      : row_(row), num_keys_(num_keys), bins_(shared) {}

  // Patterns `lower` <= `upper` of which the cut is thought to lie at or above the first and below the second: in
  // [lo, hi) with room for `most` keys, if that can be. The row has at least kWords * kThreads words.
  __device__ __forceinline__ void guess(BlockSum& sum, const Cut& cut, const Bound& lo, const Bound& hi,
                                        float slack, int most, int& lower, int& upper) {
    lower = lo.pattern, upper = hi.pattern;
    // Edges 0 to 2: of the sampled keys in [lo, lower) the number, weights, and squares of weights; 3: those below `upper`.
    float all = -1;  // sampled keys in [lo, hi)
    __syncthreads();  // the place of the bins may be read as something else before
    if (threadIdx.x < 3) edge(threadIdx.x) = 0;
#pragma unroll 1
    for (;;) {
      int shift = 0;
      while ((upper - lower - 1) >> shift >= kBins) ++shift;
      for (int i = threadIdx.x; i < kBins; i += kThreads) bins_[i] = 0;
      __syncthreads();
      count_sample(lower, upper, shift);
      __syncthreads();
      // Loops over this thread's bins stay loops: unrolled, they would need more registers than there are.
      float before[3] = {0, 0, 0};
      each_bin(cut, lower, upper, shift, before, [](int) {});
      const float mine = before[0];
      sum.before(before);
#pragma unroll
      for (int i = 0; i < 3; ++i) before[i] += edge(i);
      // The last thread knows how many there are.
      if (threadIdx.x == kThreads - 1) edge(3) = before[0] + mine;
      __syncthreads();
      if (all < 0) all = edge(3);
      if (all == 0) return;
      const float of_all = ptx::reciprocal(all), scale = of_all * (lo.amount.count - hi.amount.count);
      const float light = cut.by_mass ? lo.amount.mass - cut.mass : static_cast<float>(lo.amount.count - cut.count);
      int2 best{lower, -upper};
      float here[3] = {before[0], before[1], before[2]};
      each_bin(cut, lower, upper, shift, here, [&](int pattern) {
        const float variance = cut.by_mass ? here[2] : here[0] * (all - here[0]) * of_all;
        const float unit = cut.by_mass ? Scores::value(pattern) : 1.0f;
        // To spare are five standard deviations, eight keys (some may be in no sample), and what is not known of the sum.
        const float gap = light - scale * here[1], spare = fabsf(gap) - scale * 8 * unit - slack;
        if (pattern == lower || spare < 0 || spare * spare < 25 * scale * scale * variance) return;
        (gap > 0 ? best.x : best.y) = gap > 0 ? max(best.x, pattern) : max(best.y, -pattern);
      });
      best = sum.most(best);
      // Whoever has the edges says what lies below them.
      each_bin(cut, lower, upper, shift, before, [&](int pattern) {
        if (pattern == best.x) edge(0) = before[0], edge(1) = before[1], edge(2) = before[2];
        if (pattern == -best.y) edge(3) = before[0];
      });
      __syncthreads();
      const bool fits = scale * (edge(3) - edge(0)) <= 0.75f * most, same = best.x == lower && best.y == -upper;
      lower = best.x, upper = -best.y;
      __syncthreads();  // all have read the edges
      if (fits || same || shift == 0) return;
    }
  }

 private:
  // Adds the sample's keys in [lower, upper) to their bins.
  __device__ __forceinline__ void count_sample(int lower, int upper, int shift) const {
    constexpr uint32_t kStretches = kWords * kThreads;
    const uint32_t all = (num_keys_ + Scores::kOfWord - 1) / Scores::kOfWord;
#pragma unroll 2  // all at a time take more registers than there are
    for (int i = 0; i < kWords; ++i) {
      const uint32_t stretch = i * kThreads + threadIdx.x;
      const uint32_t first = stretch * all / kStretches, length = (stretch + 1) * all / kStretches - first;
      const uint32_t number = first + ((stretch * 2654435761u >> 16) * length >> 16), word = __ldg(row_ + number);
#pragma unroll
      for (int j = 0; j < Scores::kOfWord; ++j) {
        const int pattern = Scores::of_word(word, j), key = static_cast<int>(number) * Scores::kOfWord + j;
        if (pattern >= lower && pattern < upper && key < num_keys_) atomicAdd(bins_ + ((pattern - lower) >> shift), 1);
      }
    }
  }
  // f(first pattern) for this thread's bins, after which each is added to `sums`: number, weights, their squares.
  template <class F>
  __device__ __forceinline__ void each_bin(const Cut& cut, int lower, int upper, int shift, float (&sums)[3], F f) const {
#pragma unroll 1
    for (int i = 0; i < kOfThread; ++i) {
      const int bin = kOfThread * threadIdx.x + i;
      if (bin > (upper - lower - 1) >> shift) break;
      const int pattern = lower + (bin << shift);
      const float count = static_cast<float>(bins_[bin]);
      f(pattern);
      if (count == 0) continue;  // its weight may be no number
      const float middle = Scores::value(min(pattern + (1 << shift) / 2, Scores::kHighest - 1));
      const float weight = cut.by_mass ? middle : 1.0f;
      sums[0] += count, sums[1] += count * weight, sums[2] += count * weight * weight;
    }
  }
  __device__ __forceinline__ float& edge(int i) const { return reinterpret_cast<float*>(bins_ + kBins)[i]; }

  const uint32_t* row_;
  int num_keys_;
  int* bins_;
};

}  // namespace fgattn
