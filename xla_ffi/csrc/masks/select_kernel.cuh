// The best keys of every row by their scores: `Budget` of fgattn_jax.predictors, exact and without a sort.
//
// Scores stand as patterns: integers that order as the scores do, NaN above all others. The pattern of the last key that
// is kept is found by bisection, a count or a sum over the row in each step, and of the keys that tie there the lowest
// stay. One block a row; thread t has keys t, t + threads, and so on, in registers first, then in shared memory, and what
// is left is read again from L2. Once few keys lie between the bounds of the search, every thread lists its own of them
// in a column of shared memory and looks at no others. Sums are taken in one order, so that every run keeps the same keys.
#pragma once
#include <cstdint>

#include "decode.cuh"
#include "masks/mask_launch.h"
#include "ptx.cuh"

namespace fgattn {

constexpr int kSelectThreads = 512;  // of a multiprocessor, in one block or in two

struct SelectArgs {
  const void* scores;  // [rows, stride], as the keys' kind has it; only num_keys of a row count
  int64_t stride;
  SelectRule rule;
  int32_t num_keys, num_words, num_rows;  // num_rows: of a head
  int32_t staged, listed;                 // words of a thread in shared memory: keys, and its column
  const int32_t* floors;                  // [heads] least keys of a row, or null
  uint32_t* bits;                         // [rows, W], or null: only the counts that the rule and min_keys ask for
  int32_t* counts;                        // [rows]
};

// float32 scores that are not negative: their own bits.
struct WholeScores {
  using Word = float;
  static constexpr int kThreads = 512, kHeld = 48, kOfWord = 1;
  static constexpr bool kShares = false;  // whether scores of a row add up to 1
  static constexpr int kNone = -1, kLowest = 0, kInfinity = 0x7F800000, kOctave = 1 << 23;
  __device__ __forceinline__ static int pattern(float score) { return min(__float_as_int(score) & 0x7FFFFFFF, 0x7FFFFFFE); }
  __device__ __forceinline__ static float value(int pattern) { return __int_as_float(pattern); }
  __device__ __forceinline__ static uint32_t patterns(float word, int left) { return left > 0 ? pattern(word) : kNone; }
};

// Probabilities in 16 bits, rounded down: 6 bits of exponent and 10 of mantissa, 2^-62 to 1. 0 is behind the last key;
// what is smaller than the least of them counts as that. Rounded down, what is kept holds at least the share asked for.
// Two neighbouring keys are a word.
template <int kThreads_>
struct HalfScores {
  using Word = uint32_t;
  static constexpr int kThreads = kThreads_, kHeld = 64, kOfWord = 2;
  static constexpr bool kShares = true;
  static constexpr int kNone = 0, kLowest = 1, kInfinity = 0xFFFE, kOctave = 1 << 10;  // a factor of two
  static constexpr int kZero = 64 << 10;  // pattern 0 as a float32 without its last 13 bits
  __device__ __forceinline__ static int pattern(float score) {
    return score == score ? min(max((__float_as_int(score) >> 13) - kZero, 1), kInfinity) : 0xFFFF;
  }
  __device__ __forceinline__ static float value(int pattern) { return __int_as_float((pattern + kZero) << 13); }
  __device__ __forceinline__ static uint32_t patterns(uint32_t word, int left) {
    return left > 1 ? word : left > 0 ? word & 0xFFFFu : 0u;
  }
};

// A number of keys, and the sum of their scores.
struct Amount {
  int count;
  float mass;
};

// Combines what the threads of a block have; all threads get the result, and lanes add up in the same order.
template <int kThreads>
class BlockSum {
 public:
  static constexpr int kWarps = kThreads / kWarp;
  struct Parts {
    int counts[2][kWarps];
    float masses[2][kWarps];
  };

  __device__ __forceinline__ explicit BlockSum(Parts& parts) : parts_(parts) {}

  // `most`: the largest count instead of their sum.
  template <bool kMost = false>
  __device__ __forceinline__ Amount operator()(Amount x, bool with_mass) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    side_ ^= 1;  // whoever is late still reads the other side
    x.count = kMost ? __reduce_max_sync(kAllLanes, x.count) : __reduce_add_sync(kAllLanes, x.count);
    if (with_mass) {
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) x.mass += __shfl_xor_sync(kAllLanes, x.mass, distance);
    }
    if (lane == 0) parts_.counts[side_][warp] = x.count, parts_.masses[side_][warp] = x.mass;
    __syncthreads();
    x.count = parts_.counts[side_][lane % kWarps];
    if (!kMost && lane >= kWarps) x.count = 0;
    x.count = kMost ? __reduce_max_sync(kAllLanes, x.count) : __reduce_add_sync(kAllLanes, x.count);
    if (with_mass) {
      x.mass = parts_.masses[side_][lane % kWarps];
#pragma unroll
      for (int distance = kWarps / 2; distance > 0; distance /= 2) x.mass += __shfl_xor_sync(kAllLanes, x.mass, distance);
    }
    return x;
  }

 private:
  Parts& parts_;
  int side_ = 0;
};

// The keys of one row that this thread has, as patterns.
template <class Scores>
class RowKeys {
 public:
  __device__ __forceinline__ RowKeys(const void* scores, uint32_t* staged, int num_staged, int num_keys)
      : words_of_row_(static_cast<const typename Scores::Word*>(scores)), staged_(staged), num_staged_(num_staged),
        num_keys_(num_keys) {
    constexpr int kPassKeys = Scores::kOfWord * Scores::kThreads;
    passes_ = (num_keys + kPassKeys - 1) / kPassKeys;
#pragma unroll
    for (int i = 0; i < Scores::kHeld; ++i) held_[i] = read(i);
    for (int i = 0; i < num_staged_; ++i) staged_[i * Scores::kThreads + threadIdx.x] = read(Scores::kHeld + i);
  }

  // f(number, pattern) for every key of this thread, and some of none: key `number % kOfWord` of the word that it has in
  // pass `number / kOfWord`.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int i = 0; i < Scores::kHeld; ++i) of_word(i, held_[i], f);
    const int end = min(passes_, Scores::kHeld + num_staged_);
#pragma unroll(6 / Scores::kOfWord)
    for (int i = Scores::kHeld; i < end; ++i) {
      of_word(i, staged_[(i - Scores::kHeld) * Scores::kThreads + threadIdx.x], f);
    }
#pragma unroll 1
    for (int i = Scores::kHeld + num_staged_; i < passes_; ++i) of_word(i, read(i), f);
  }

 private:
  __device__ __forceinline__ uint32_t read(int pass) const {
    // Loads that depend on nothing: many are under way at a time.
    const int word = pass * Scores::kThreads + threadIdx.x, last = (num_keys_ - 1) / Scores::kOfWord;
    return Scores::patterns(__ldg(words_of_row_ + min(word, last)), num_keys_ - Scores::kOfWord * word);
  }
  template <class F>
  __device__ __forceinline__ static void of_word(int pass, uint32_t x, F f) {
    if constexpr (Scores::kOfWord == 1) {
      f(pass, static_cast<int>(x));
    } else {
      f(2 * pass, static_cast<int>(ptx::low_half(x)));
      f(2 * pass + 1, static_cast<int>(ptx::high_half(x)));
    }
  }

  uint32_t held_[Scores::kHeld];
  const typename Scores::Word* words_of_row_;
  uint32_t* staged_;
  int num_staged_, num_keys_, passes_;
};

// How many keys reach a pattern, and how much they hold. Once a search has bounds, it looks between them only.
template <class Scores>
class RowSearch {
 public:
  __device__ __forceinline__ RowSearch(const RowKeys<Scores>& keys, BlockSum<Scores::kThreads>& sum, int* column,
                                       int length)
      : keys_(keys), sum_(sum), column_(column + threadIdx.x), length_(length) {}

  __device__ __forceinline__ Amount reach(int pivot, bool with_mass) {
    Amount mine = above_;
    if (with_mass) {
      visit([&](int, int pattern) {
        if (pattern >= pivot) ++mine.count, mine.mass += Scores::value(pattern);
      });
    } else {
      visit([&](int, int pattern) { mine.count += pattern >= pivot; });
    }
    return sum_(mine, with_mass);
  }

  // From here on pivots lie in [lower, upper], between which are `between` keys: lists these if they are few enough.
  __device__ __forceinline__ void narrow(int lower, int upper, int between) {
    if (between > (left_ < 0 ? length_ * Scores::kThreads / 2 : listed_ / 4)) return;
    int left = 0;
    Amount above = above_;
    visit([&](int, int pattern) {
      // The last place is for what does not stay: without a branch all keys take the same time.
      column_[min(left, length_ - 1) * Scores::kThreads] = pattern;
      left += pattern >= lower && pattern < upper;
      if (pattern >= upper) ++above.count, above.mass += Scores::value(pattern);
    });
    if (left_ < 0 && sum_.template operator()<true>({left, 0}, false).count >= length_) return;  // too many of a thread
    left_ = left, above_ = above, listed_ = between;
  }

  // Every pattern may be asked for again.
  __device__ __forceinline__ void widen() { left_ = -1, above_ = {0, 0}; }

 private:
  template <class F>
  __device__ __forceinline__ void visit(F f) const {
    if (left_ < 0) {
      keys_.each(f);
      return;
    }
#pragma unroll(4)
    for (int i = 0; i < left_; ++i) f(0, column_[i * Scores::kThreads]);
  }

  const RowKeys<Scores>& keys_;
  BlockSum<Scores::kThreads>& sum_;
  int* column_;
  int length_, left_ = -1;  // keys in this thread's column; -1: all keys
  int listed_ = 0;          // keys in all columns
  Amount above_ = {0, 0};   // of this thread's keys that are in no column any more
};

// Votes of a warp to words of neighbouring keys: where a lane has two of them, a vote is about every second key.
template <int kOfWord>
__device__ __forceinline__ uint32_t word_of_votes(const uint32_t* votes, int at) {
  if constexpr (kOfWord == 1) return votes[at];
  auto spread = [](uint32_t x) {  // bit i to bit 2 i
    x = (x | x << 8) & 0x00FF00FFu;
    x = (x | x << 4) & 0x0F0F0F0Fu;
    x = (x | x << 2) & 0x33333333u;
    return (x | x << 1) & 0x55555555u;
  };
  const int first = at & ~1, shift = at % 2 * 16;
  return spread(votes[first] >> shift & 0xFFFFu) | spread(votes[first + 1] >> shift & 0xFFFFu) << 1;
}

// A pattern, and what reaches it.
struct Bound {
  int pattern;
  Amount amount;
};

template <class Scores>
__global__ void __launch_bounds__(Scores::kThreads, kSelectThreads / Scores::kThreads)
    select_kernel(const __grid_constant__ SelectArgs args) {
  constexpr int kThreads = Scores::kThreads, kWarps = kThreads / kWarp;
  using Sum = BlockSum<kThreads>;
  extern __shared__ __align__(16) int select_memory[];
  typename Sum::Parts& parts = *reinterpret_cast<typename Sum::Parts*>(select_memory);
  uint32_t* better_votes = reinterpret_cast<uint32_t*>(select_memory + sizeof(parts) / sizeof(int));
  uint32_t* equal_votes = better_votes + args.num_words;
  int* cut = reinterpret_cast<int*>(equal_votes + args.num_words);
  int* staged = cut + 4;
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const RowKeys<Scores> keys(static_cast<const typename Scores::Word*>(args.scores) + row * args.stride / Scores::kOfWord,
                             reinterpret_cast<uint32_t*>(staged), args.staged, args.num_keys);
  Sum sum(parts);
  RowSearch<Scores> search(keys, sum, staged + args.staged * kThreads, args.listed);
  Amount all{Scores::kNone, 0};  // the largest pattern, and the mass of all keys
  keys.each([&](int, int pattern) {
    all.count = max(all.count, pattern);
    if (pattern != Scores::kNone) all.mass += Scores::value(pattern);
  });
  all = sum.template operator()<true>(all, true);
  const Bound lowest{Scores::kLowest, {args.num_keys, all.mass}}, highest{all.count + 1, {0, 0}};

  // First the rule, then a search for the number of keys that it and the floors ask for, if that is not the same. Scores
  // are often alike: the search starts at their mean and leaps until it has the cut between two bounds.
  const bool by_share = args.rule.rule == Rule::kTopP;
  const float target = (Scores::kShares ? 1.0f : all.mass) * args.rule.value;
  const bool broken = all.count > Scores::kInfinity || !isfinite(all.mass) || all.mass < target;
  Bound lower = lowest, upper = highest;
  int count = args.rule.top_k, leap = Scores::kOctave / 4;
  bool counting = args.rule.rule == Rule::kTopK, floors = false;
  if (by_share && (broken || all.mass == 0)) count = broken ? args.num_keys : 0, counting = true;
  const int middle = min(max(Scores::pattern(all.mass / args.num_keys), lowest.pattern + 1), all.count);
  int pivot = args.rule.rule == Rule::kThreshold ? Scores::pattern(args.rule.value) + 1 : middle;
#pragma unroll 1
  for (;;) {
    if (counting && !floors) {
      floors = true;
      const int by_rule = count;
      count = max(count, args.rule.min_keys);
      if (args.bits == nullptr) {
        if (threadIdx.x == 0) args.counts[row] = count;
        return;
      }
      if (args.floors != nullptr) count = max(count, __ldg(args.floors + row / args.num_rows));
      count = min(count, min(args.rule.max_keys, args.num_keys));
      if (count != by_rule || count > lower.amount.count || count <= upper.amount.count) {
        search.widen();
        lower = lowest, upper = highest, leap = Scores::kOctave / 4, pivot = middle;
      }
    }
    if (counting && (count == 0 || lower.amount.count == count)) break;
    const int width = upper.pattern - lower.pattern, between = lower.amount.count - upper.amount.count;
    if ((width <= 1 || between <= 1) && (counting || by_share)) {
      if (counting) break;
      // The least keys at `lower` that make up the share.
      const float last = Scores::value(lower.pattern);
      const float missing = ceilf((target - upper.amount.mass) / (last > 0 ? last : 1.0f));
      count = upper.amount.count + (between <= 1 ? between : static_cast<int>(fminf(fmaxf(missing, 1.0f), 1.0f * between)));
      counting = true;
      continue;
    }
    const Amount found = search.reach(pivot, by_share && !counting);
    if (args.rule.rule == Rule::kThreshold && !counting) {
      lower = {pivot, found}, count = found.count, counting = true;
      continue;
    }
    ((counting ? found.count >= count : found.mass >= target) ? lower : upper) = {pivot, found};
    search.narrow(lower.pattern, upper.pattern, lower.amount.count - upper.amount.count);
    const int half = (upper.pattern - lower.pattern) / 2;
    if (lower.pattern == lowest.pattern) {
      pivot = upper.pattern - min(leap, half);
    } else {
      pivot = lower.pattern + (upper.pattern == highest.pattern ? min(leap, half) : half);
    }
    leap = min(2 * leap, 1 << 28);
  }

  // Keys above `lower` stay, and of those at `lower` the first ones.
  keys.each([&](int number, int pattern) {
    const uint32_t better = __ballot_sync(kAllLanes, pattern > lower.pattern);
    const uint32_t equal = __ballot_sync(kAllLanes, pattern == lower.pattern);
    const int at = (number / Scores::kOfWord * kWarps + warp) * Scores::kOfWord + number % Scores::kOfWord;
    if (lane == 0 && at < args.num_words) better_votes[at] = better, equal_votes[at] = equal;
  });
  const bool ties = count > 0 && lower.amount.count > count;
  if (threadIdx.x == 0) *cut = args.num_keys;
  __syncthreads();
  const int passed = (args.num_keys + 31) / 32;  // words; a row may have more, up to a multiple of four
  if (ties) {
    // Every thread counts some neighbouring words, and the one whose words hold the last key that stays looks it up.
    const int of_thread = (passed + kThreads - 1) / kThreads, first = threadIdx.x * of_thread;
    int mine = 0;
    for (int at = first; at < min(first + of_thread, passed); ++at) mine += __popc(word_of_votes<Scores::kOfWord>(equal_votes, at));
    int up_to = mine;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int theirs = __shfl_up_sync(kAllLanes, up_to, distance);
      if (lane >= distance) up_to += theirs;
    }
    if (lane == kWarp - 1) parts.counts[0][warp] = up_to;
    __syncthreads();
    for (int other = 0; other < warp; ++other) up_to += parts.counts[0][other];
    int missing = count - upper.amount.count - (up_to - mine);
    if (missing >= 1 && missing <= mine) {
      int at = first;
      uint32_t rest = word_of_votes<Scores::kOfWord>(equal_votes, at);
      while (missing > __popc(rest)) {
        missing -= __popc(rest);
        rest = word_of_votes<Scores::kOfWord>(equal_votes, ++at);
      }
      while (--missing > 0) rest &= rest - 1;
      *cut = 32 * at + __ffs(rest);  // the first key that does not stay
    }
    __syncthreads();
  }
  uint32_t* bits = args.bits + row * args.num_words;
  for (int at = threadIdx.x; at < args.num_words; at += kThreads) {
    const int left = *cut - 32 * at;
    const uint32_t first = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
    const uint32_t kept = word_of_votes<Scores::kOfWord>(better_votes, at) |
                          (word_of_votes<Scores::kOfWord>(equal_votes, at) & first);
    bits[at] = at < passed && count > 0 ? kept : 0;
  }
  if (threadIdx.x == 0) args.counts[row] = count;
}

// The floor of a head: a share of the mean count over its queries. One warp a head.
static __global__ void head_floor_kernel(const int32_t* counts, int num_rows, int num_queries, int query_block, float share,
                                  int32_t* floors) {
  const int head = blockIdx.x, lane = threadIdx.x;
  int64_t total = 0;
  for (int row = 0; row < num_rows; ++row) {
    if (row % kWarp != lane) continue;
    total += int64_t{counts[static_cast<int64_t>(head) * num_rows + row]} * min(query_block, num_queries - row * query_block);
  }
  // In two halves: shuffles move 32 bits.
  double sum = 0;
  for (int other = 0; other < kWarp; ++other) {
    const uint32_t low = __shfl_sync(kAllLanes, static_cast<uint32_t>(total), other);
    const uint32_t high = __shfl_sync(kAllLanes, static_cast<uint32_t>(total >> 32), other);
    sum += static_cast<double>(static_cast<int64_t>(uint64_t{high} << 32 | low));
  }
  if (lane == 0) floors[head] = static_cast<int>(floorf(share * static_cast<float>(sum / num_queries)));
}

}  // namespace fgattn
