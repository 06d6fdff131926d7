// The best keys of every row by their scores: `Budget` of fgattn_jax.predictors, exact and without a sort.
//
// One block a row. A guess from a sample bounds the pattern of the last key that is kept (select_bracket.cuh). One look at
// all keys then writes two rows of bits to shared memory: keys at or above the upper bound, which stay, and those between
// the bounds. If the cut lies there, and there are few, they are listed, counted in bins of patterns until the cut is known,
// and of the keys that tie there the lowest stay. If not, what was counted gives better bounds, and
// the next look follows: the row is read again, mostly from L2. Sums are taken in one order, so that every run keeps
// the same keys.
#pragma once
#include <cstdint>

#include "masks/carry.cuh"
#include "masks/mask_launch.h"
#include "masks/select_bracket.cuh"
#include "masks/select_scores.cuh"

namespace fgattn {

struct SelectArgs {
  const void* scores;  // [rows, stride], as the keys' kind has it; only num_keys of a row count; at multiples of 16 bytes
  int64_t stride;      // at least num_words * 32
  SelectRule rule;
  int32_t num_keys, num_words, num_rows;  // num_rows: of a head
  const int32_t* floors;                  // [heads] least keys of a row, or null
  const int32_t* flags;                   // [rows] which rows to do, or null: all
  uint32_t* bits;                         // [rows, W], or null: only the counts that the rule and min_keys ask for
  int32_t* counts;                        // [rows]
};

template <class Scores>
struct SelectMemory {
  static constexpr int kListed = Scores::kListed;
  static constexpr int kBins = 512;  // more, and three blocks with float32 scores would not fit
  BlockSum::Parts parts;
  int bins[kBins];  // of listed keys
  Bound found[2];   // among them
  union {
    int keys[kListed];  // between the bounds
    int sample[RowSample<Scores>::kBins + 4];
  };
  typename Scores::Pattern patterns[kListed];  // of these keys
  Bound bottom, top;                           // of the last look
  // Behind it: above[num_words], between[num_words].
  static constexpr size_t bytes(int num_words) { return sizeof(SelectMemory) + 2 * sizeof(uint32_t) * num_words; }
};

// A row, and what the last look at it left in shared memory.
template <class Scores>
class RowKeys {
 public:
  static constexpr int kThreads = kSelectThreads;
  using Memory = SelectMemory<Scores>;

  __device__ __forceinline__ RowKeys(const SelectArgs& args, int64_t row, Memory& memory, BlockSum& sum)
      : row_(static_cast<const uint32_t*>(args.scores) + row * args.stride / Scores::kOfWord), memory_(memory), sum_(sum),
        above_(reinterpret_cast<uint32_t*>(&memory + 1)), between_(above_ + args.num_words), num_keys_(args.num_keys),
        num_words_(args.num_words) {
    const int of_thread = (num_words_ + kThreads - 1) / kThreads;
    first_ = min(static_cast<int>(threadIdx.x) * of_thread, num_words_), last_ = min(first_ + of_thread, num_words_);
  }

  __device__ __forceinline__ const uint32_t* words() const { return row_; }
  __device__ __forceinline__ uint32_t above(int word) const { return above_[word]; }

  // What all keys hold.
  __device__ __forceinline__ float mass() {
    float mine = 0;
    visit([&](int, int left, const uint32_t (&words)[kChunkWords]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < left) mine += Scores::value(pattern(words, i));
      }
    });
    return sum_({0, mine}, true).mass;
  }

  // Finds the keys at or above `upper`, and those that reach `lower` only: how many of both, and with_mass what they hold.
  __device__ __forceinline__ void look(int lower, int upper, bool with_mass, Amount& above, Amount& between) {
    float held_above = 0, held_between = 0;
    const uint32_t from_upper = Scores::negative_bound(upper), from_lower = Scores::negative_bound(lower);
    visit([&](int chunk, int left, const uint32_t (&words)[kChunkWords]) {
      uint32_t upper_bits = 0, lower_bits = 0;
#pragma unroll
      for (int i = 7; i >= 0; --i) {
        const uint32_t here = Scores::compared(words[i / Scores::kOfWord], i % Scores::kOfWord);
        upper_bits = ptx::shift_in_reached(upper_bits, here, from_upper);
        lower_bits = ptx::shift_in_reached(lower_bits, here, from_lower);
      }
      lower_bits &= ~upper_bits;
      if (with_mass) {
        const uint32_t inside = left >= 8 ? 255u : left > 0 ? (1u << left) - 1 : 0u;
        upper_bits &= inside, lower_bits &= inside;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float value = Scores::value(pattern(words, i));
          if (upper_bits >> i & 1) held_above += value;
          if (lower_bits >> i & 1) held_between += value;
        }
      }
      reinterpret_cast<uint8_t*>(above_)[chunk] = static_cast<uint8_t>(upper_bits);
      reinterpret_cast<uint8_t*>(between_)[chunk] = static_cast<uint8_t>(lower_bits);
    });
    __syncthreads();  // all bits are written
    above = {0, held_above}, between = {0, held_between};
    for (int i = first_; i < last_; ++i) {
      if (32 * i + 32 > num_keys_) above_[i] &= valid_bits(i, num_keys_), between_[i] &= valid_bits(i, num_keys_);
      above.count += __popc(above_[i]), between.count += __popc(between_[i]);
    }
    of_thread_ = between.count;
    above = sum_(above, with_mass), between = sum_(between, with_mass);
  }

  // Lists the keys between the bounds, kListed at most, and their patterns.
  __device__ __forceinline__ void list(int num_listed) {
    int at = sum_.before(of_thread_);
    for (int i = first_; i < last_; ++i) {
      for (uint32_t rest = between_[i]; rest != 0; rest &= rest - 1) memory_.keys[at++] = 32 * i + __ffs(rest) - 1;
    }
    __syncthreads();  // all keys are listed
    const auto* numbers = reinterpret_cast<const typename Scores::Number*>(row_);
    num_listed_ = num_listed;
#pragma unroll 4
    for (int i = threadIdx.x; i < num_listed; i += kThreads) {
      memory_.patterns[i] = static_cast<typename Scores::Pattern>(Scores::of_number(__ldg(numbers + memory_.keys[i])));
    }
  }

  // Of the listed keys, those that reach a pattern.
  __device__ __forceinline__ Amount listed_from(int pattern) {
    Amount mine{0, 0};
#pragma unroll 4
    for (int i = threadIdx.x; i < num_listed_; i += kThreads) {  // those that this thread has put there
      const int here = memory_.patterns[i];
      if (here >= pattern) ++mine.count, mine.mass += Scores::value(here);
    }
    return sum_(mine, true);
  }

  // Moves the bounds of a cut, which lies among the listed keys, together: to the bin of 2^shift patterns that holds it.
  // Where masses are asked for, a bin is one pattern: what several hold would depend on the order of adding.
  __device__ __forceinline__ void narrow(const Cut& cut, int shift, Bound& lo, Bound& hi) {
    constexpr int kOfThread = Memory::kBins / kThreads;
    const int last = (hi.pattern - 1 - lo.pattern) >> shift;  // the bin of the lowest patterns; 0 has the highest
    for (int i = threadIdx.x; i < Memory::kBins; i += kThreads) memory_.bins[i] = 0;
    __syncthreads();  // before others count
#pragma unroll 4
    for (int i = threadIdx.x; i < num_listed_; i += kThreads) {
      const int here = memory_.patterns[i];
      if (here >= lo.pattern && here < hi.pattern) atomicAdd(memory_.bins + last - ((here - lo.pattern) >> shift), 1);
    }
    __syncthreads();  // all are counted
    const auto first_pattern = [&](int bin) { return lo.pattern + ((last - bin) << shift); };
    const int thread = threadIdx.x, first_bin = kOfThread * thread;
    int number[kOfThread];
    float mass[kOfThread], higher[2] = {0, 0};  // count and mass of the bins of threads before this one
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      number[i] = first_bin + i <= last ? memory_.bins[first_bin + i] : 0;
      mass[i] = cut.by_mass && number[i] > 0 ? number[i] * Scores::value(first_pattern(first_bin + i)) : 0.0f;
      higher[0] += static_cast<float>(number[i]), higher[1] += mass[i];
    }
    const int own = static_cast<int>(higher[0]);
    sum_.before(higher);  // and all have read their bins
    // A thread ends where the next one begins: sums that round in their own ways could leave the cut to none of them.
    float* begins = reinterpret_cast<float*>(memory_.bins);
    begins[thread] = higher[1];
    __syncthreads();  // all begins are written
    const bool has_last = first_bin <= last && last < first_bin + kOfThread, has_bins = first_bin <= last;
    Bound above{first_bin > 0 && has_bins ? first_pattern(first_bin - 1) : hi.pattern,
                {hi.amount.count + static_cast<int>(higher[0]), hi.amount.mass + higher[1]}};
    // lo is known, and reaches the cut whatever this sum's rounding says.
    const Amount end = has_last   ? lo.amount
                       : has_bins ? Amount{above.amount.count + own, hi.amount.mass + begins[thread + 1]}
                                  : above.amount;
    const bool holds = has_bins && !cut.reached(above.amount) && (has_last || cut.reached(end));
    const int holder = kThreads - sum_.most({holds || has_last ? kThreads - thread : 0, 0}).x;  // the first of them
    if (thread == holder) {
#pragma unroll
      for (int i = 0; i < kOfThread; ++i) {
        const int bin = first_bin + i;
        const bool ends = bin == last || i == kOfThread - 1;
        Bound here{first_pattern(bin), {above.amount.count + number[i], above.amount.mass + mass[i]}};
        if (ends) here.amount = end;
        if (ends || cut.reached(here.amount)) {
          memory_.found[0] = here, memory_.found[1] = above;
          break;
        }
        above = here;
      }
    }
    __syncthreads();  // found
    lo = memory_.found[0], hi = memory_.found[1];
  }

  // Of the listed keys, those from `upper` on count as above, and only those that reach `lower` are still between.
  __device__ __forceinline__ void part(int lower, int upper) {
    for (int i = threadIdx.x; i < num_words_; i += kThreads) between_[i] = 0;
    __syncthreads();  // before others set bits
    for (int i = threadIdx.x; i < num_listed_; i += kThreads) {
      const int key = memory_.keys[i], here = memory_.patterns[i];
      if (here >= lower) atomicOr((here >= upper ? above_ : between_) + key / 32, 1u << key % 32);
    }
    __syncthreads();  // before others read them
    of_thread_ = 0;
    for (int i = first_; i < last_; ++i) of_thread_ += __popc(between_[i]);
  }

  // The first `missing` keys between the bounds stay too.
  __device__ __forceinline__ void keep_first(int missing) {
    missing -= sum_.before(of_thread_);
    for (int i = first_; i < last_ && missing > 0; ++i) {
      uint32_t rest = between_[i];
      const int here = __popc(rest);
      for (int left = missing; left > 0 && rest != 0; --left) rest &= rest - 1;
      above_[i] |= between_[i] & ~rest;
      missing -= here;
    }
    __syncthreads();  // before others write them out
  }

 private:
  static constexpr int kChunkWords = 8 / Scores::kOfWord, kAtOnce = 16 / kChunkWords;

  __device__ __forceinline__ static int pattern(const uint32_t (&words)[kChunkWords], int i) {
    return Scores::of_word(words[i / Scores::kOfWord], i % Scores::kOfWord);
  }

  // f(chunk, left, words) for every chunk of eight keys, of which `left` or more lie in front of the row's end.
  template <class F>
  __device__ __forceinline__ void visit(F f) const {
    const int chunks = 4 * num_words_;
#pragma unroll 1
    for (int first = threadIdx.x; first < chunks; first += kAtOnce * kThreads) {
      // Loads that depend on nothing: many are under way at a time.
      uint32_t words[kAtOnce][kChunkWords];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint4* from = reinterpret_cast<const uint4*>(row_) + min(first + i * kThreads, chunks - 1) * (kChunkWords / 4);
#pragma unroll
        for (int j = 0; j < kChunkWords / 4; ++j) {
          const uint4 four = __ldg(from + j);
          words[i][4 * j] = four.x, words[i][4 * j + 1] = four.y, words[i][4 * j + 2] = four.z, words[i][4 * j + 3] = four.w;
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int chunk = first + i * kThreads;
        if (chunk < chunks) f(chunk, num_keys_ - 8 * chunk, words[i]);
      }
    }
  }

  const uint32_t* row_;
  Memory& memory_;
  BlockSum& sum_;
  uint32_t *above_, *between_;
  int num_keys_, num_words_;
  int first_, last_;   // words that this thread counts
  int of_thread_ = 0;  // keys between the bounds in these words
  int num_listed_ = 0;
};

template <class Scores>
__global__ void __launch_bounds__(kSelectThreads, Scores::kBlocks)
    select_kernel(const __grid_constant__ SelectArgs args) {
  using Memory = SelectMemory<Scores>;
  extern __shared__ __align__(16) char select_memory[];
  Memory& memory = *reinterpret_cast<Memory*>(select_memory);
  const int64_t row = blockIdx.x;
  if (args.flags != nullptr && __ldg(args.flags + row) == 0) return;
  const int num_keys = args.num_keys;
  const SelectRule& rule = args.rule;
  BlockSum sum(memory.parts);
  RowKeys<Scores> keys(args, row, memory, sum);
  RowSample<Scores> sample(keys.words(), num_keys, memory.sample);

  // First the rule, then a search for the number of keys that it and the floors ask for, if that is not the same.
  const Bound lowest{Scores::kLowest, {num_keys, Scores::kUsualMass}}, highest{Scores::kHighest, {0, 0}};
  Bound lo = lowest, hi = highest;  // of the cut
  Cut cut{rule.rule == Rule::kTopP, rule.top_k, rule.value};
  bool by_rule = rule.rule != Rule::kTopK, looked = false, listed = false, broken = false;
  bool guessed_mass = Scores::kShares && cut.by_mass;  // lo's
  if (!Scores::kShares && cut.by_mass) {
    lo.amount.mass = keys.mass();
    cut.mass *= lo.amount.mass;
    broken = !isfinite(lo.amount.mass) || lo.amount.mass < cut.mass;
    if (broken || lo.amount.mass == 0) cut.count = broken ? num_keys : 0, by_rule = false;
  }
#pragma unroll 1
  for (;; by_rule = false) {
    bool found = false;
    if (!by_rule) {
      cut.by_mass = guessed_mass = false;
      cut.count = max(cut.count, rule.min_keys);
      if (args.bits == nullptr) {
        if (threadIdx.x == 0) args.counts[row] = cut.count;
        return;
      }
      if (args.floors != nullptr) cut.count = max(cut.count, __ldg(args.floors + row / args.num_rows));
      cut.count = min(cut.count, min(rule.max_keys, num_keys));
      if (cut.count == 0) break;
      // What is known already: the bounds that the rule found, those of the last look, or on which side of these.
      const Bound bottom = memory.bottom, top = memory.top;
      const bool in_look = looked && cut.reached(bottom.amount) && top.amount.count <= cut.count;
      if (in_look && (cut.count == top.amount.count || listed || top.pattern - bottom.pattern == 1)) {
        found = true;
        if (!(hi.amount.count < cut.count && cut.count <= lo.amount.count)) lo = bottom, hi = top;
        if (cut.count == top.amount.count) lo = hi = top;
      } else {
        lo = looked && cut.reached(top.amount) ? top : lowest;
        hi = looked && !cut.reached(bottom.amount) ? bottom : highest;
      }
    }
#pragma unroll 1
    for (int tries = 0; !found; ++tries) {
      int lower = lo.pattern, upper = hi.pattern;
      if (by_rule && !cut.by_mass) {
        lower = upper = Scores::pattern(rule.value) + 1;
      } else if (!cut.by_mass && lo.amount.count == cut.count) {
        upper = lower;
      } else if (lo.amount.count - hi.amount.count > Memory::kListed && upper - lower > 1) {
        if (tries < 3) {
          sample.guess(sum, cut, lo, hi, guessed_mass ? Scores::kMassSpread : 0, Memory::kListed, lower, upper);
          upper = max(upper, lower + 1);  // whatever rounding made of it
        }
        if (lower == lo.pattern && upper == hi.pattern) lower += (upper - lower) / 2;
      }
      Amount above, between;
      keys.look(lower, upper, cut.by_mass, above, between);
      // What was known stays as it was: the same sum in another order may differ.
      const Bound top = upper == hi.pattern ? hi : Bound{upper, above};
      const Bound bottom = lower == lo.pattern && !guessed_mass
                   ? lo
                   : Bound{lower, {top.amount.count + between.count, top.amount.mass + between.mass}};
      if (threadIdx.x == 0) memory.bottom = bottom, memory.top = top;
      __syncthreads();  // bounds are written
      looked = true, listed = false;
      if (by_rule && !cut.by_mass) {
        lo = hi = top, cut.count = top.amount.count;
        break;
      }
      if (guessed_mass && (bottom.amount.mass > Scores::kMostMass ||
                           (lower == lowest.pattern && !cut.reached(bottom.amount)))) {
        cut.count = num_keys, broken = true;
        break;
      }
      const bool exactly = !cut.by_mass && (top.amount.count == cut.count || bottom.amount.count == cut.count);
      if (cut.reached(top.amount)) {
        lo = top, guessed_mass = false;
        if (exactly) hi = top, found = true;
      } else if (!cut.reached(bottom.amount)) {
        hi = bottom;
      } else {
        lo = bottom, hi = top, guessed_mass = false;
        listed = between.count <= Memory::kListed;
        if (listed) keys.list(between.count);
        found = listed || exactly || upper - lower == 1;
      }
    }
    // Among the listed keys.
#pragma unroll 1
    while (listed && hi.pattern - lo.pattern > 1 && lo.amount.count - hi.amount.count > 1 &&
           (cut.by_mass || lo.amount.count != cut.count)) {
      int shift = 0;
      while ((hi.pattern - lo.pattern - 1) >> shift >= Memory::kBins) ++shift;
      if (shift == 0 || !cut.by_mass) {
        keys.narrow(cut, shift, lo, hi);
        continue;
      }
      const int pivot = lo.pattern + (hi.pattern - lo.pattern) / 2;
      Amount here = keys.listed_from(pivot);
      here.count += memory.top.amount.count, here.mass += memory.top.amount.mass;
      (cut.reached(here) ? lo : hi) = {pivot, here};
    }
    if (!by_rule) break;
    if (cut.by_mass && !broken) {
      // The least keys at `lo` that make up the share.
      const int between = lo.amount.count - hi.amount.count;
      const float last = Scores::value(lo.pattern);
      const float missing = ceilf((cut.mass - hi.amount.mass) / (last > 0 ? last : 1.0f));
      const float least = fminf(fmaxf(missing, 1.0f), 1.0f * between);
      cut.count = hi.amount.count + (between <= 1 ? between : static_cast<int>(least));
    }
  }

  if (cut.count > 0) {
    const bool all = lo.amount.count == cut.count;  // that reach lo
    if (listed) keys.part(lo.pattern, all ? lo.pattern : hi.pattern);
    if (!(listed && all)) keys.keep_first(cut.count - (all && !listed ? memory.top : hi).amount.count);
  }
  uint32_t* bits = args.bits + row * args.num_words;
  for (int i = threadIdx.x; i < args.num_words; i += kSelectThreads) bits[i] = cut.count > 0 ? keys.above(i) : 0;
  if (threadIdx.x == 0) args.counts[row] = cut.count;
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
