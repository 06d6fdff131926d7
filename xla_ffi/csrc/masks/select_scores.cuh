// What scores look like where keys are ranked, and what the threads of a block find out together.
//
// Scores stand as patterns: integers that order as the scores do, NaN above all others.
#pragma once
#include <cstdint>

#include "decode.cuh"
#include "ptx.cuh"

namespace fgattn {

// float32 scores that are not negative: their own bits.
struct WholeScores {
  using Number = float;
  using Pattern = int32_t;
  static constexpr int kListed = 8192, kOfWord = 1;  // keys that may be listed; keys of 32 bits
  static constexpr bool kShares = false;             // whether scores of a row add up to 1
  static constexpr int kBlocks = 3;                  // of a multiprocessor; four would spill
  static constexpr int kLowest = 0, kHighest = 0x7FFFFFFF;  // of patterns, and behind the last
  static constexpr int kNone = -1;                          // behind the last key
  static constexpr float kUsualMass = 0, kMassSpread = 0, kMostMass = 0;
  __device__ __forceinline__ static int pattern(float score) {
    return min(__float_as_int(score) & 0x7FFFFFFF, kHighest - 1);
  }
  __device__ __forceinline__ static float value(int pattern) { return __int_as_float(pattern); }
  __device__ __forceinline__ static int of_number(float score) { return pattern(score); }
  __device__ __forceinline__ static int of_word(uint32_t word, int) {
    return min(static_cast<int>(word & 0x7FFFFFFFu), kHighest - 1);
  }
  // Numbers that `ptx::shift_in_reached` compares: of a key, and of a bound.
  __device__ __forceinline__ static uint32_t compared(uint32_t word, int) { return 2 * word + 1; }
  __device__ __forceinline__ static uint32_t negative_bound(int pattern) {
    return pattern == kLowest ? ~0u : pattern == kHighest ? 0u : 0u - 2 * static_cast<uint32_t>(pattern);
  }
};

// Probabilities in 16 bits, rounded down: 6 bits of exponent and 10 of mantissa, 2^-62 to 1; what is smaller counts as the
// least of them. Rounded down, what is kept holds at least the share asked for. Two neighbouring keys are a word.
template <int kListed_>
struct HalfScores {
  using Number = uint16_t;
  using Pattern = uint16_t;
  static constexpr int kListed = kListed_, kOfWord = 2;
  static constexpr bool kShares = true;
  static constexpr int kLowest = 1, kHighest = 0x10000, kNone = 0;
  // What the keys of a row hold: 1, but for what rounding takes. Only a key that is NaN has a value of nearly 2.
  static constexpr float kUsualMass = 0.99965f, kMassSpread = 0.0004f, kMostMass = 1.5f;
  static constexpr int kZero = 64 << 10;  // pattern 0 as a float32 without its last 13 bits
  static constexpr int kBlocks = 4;       // of a multiprocessor
  __device__ __forceinline__ static int pattern(float score) {
    return score == score ? min(max((__float_as_int(score) >> 13) - kZero, 1), 0xFFFE) : 0xFFFF;
  }
  // Patterns of two numbers that are below 2, as probabilities are, or the one NaN that arithmetic gives, all bits set:
  // of a float32 without its last 13 bits the next 16 are the pattern.
  __device__ __forceinline__ static uint32_t pair(float low, float high) {
    constexpr int kLeast = (kZero + 1) << 13;
    static_assert(kZero == 1 << 16);
    const uint32_t a = max(__float_as_int(low), kLeast), b = max(__float_as_int(high), kLeast);
    return __byte_perm(a >> 13, b << 3, 0x7610);
  }
  __device__ __forceinline__ static float value(int pattern) { return __int_as_float((pattern + kZero) << 13); }
  __device__ __forceinline__ static int of_number(uint16_t number) { return number; }
  __device__ __forceinline__ static int of_word(uint32_t word, int i) {
    return static_cast<int>(i == 0 ? word & 0xFFFFu : word >> 16);
  }
  // Numbers that `ptx::shift_in_reached` compares: the key in the high half, whatever the low one holds. No bound is 0.
  __device__ __forceinline__ static uint32_t compared(uint32_t word, int i) { return i == 0 ? word << 16 : word; }
  __device__ __forceinline__ static uint32_t negative_bound(int pattern) {
    return 0u - (static_cast<uint32_t>(pattern) << 16);
  }
};

constexpr int kSelectThreads = 256;  // of a row

// A number of keys, and the sum of their scores.
struct Amount {
  int count;
  float mass;
};

// Combines what the threads of a block have; all threads get the result, and sums are taken in one order.
class BlockSum {
 public:
  static constexpr int kWarps = kSelectThreads / kWarp;
  struct Parts {
    int counts[2][2][kWarps];
    float sums[2][3][kWarps];
  };

  __device__ __forceinline__ explicit BlockSum(Parts& parts) : parts_(parts) {}

  __device__ __forceinline__ Amount operator()(Amount x, bool with_mass) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    side_ ^= 1;  // whoever is late still reads the other side
    x.count = __reduce_add_sync(kAllLanes, x.count);
    if (with_mass) x.mass = sum_of_lanes<kWarp>(x.mass);
    if (lane == 0) parts_.counts[side_][0][warp] = x.count, parts_.sums[side_][0][warp] = x.mass;
    __syncthreads();
    x.count = __reduce_add_sync(kAllLanes, lane < kWarps ? parts_.counts[side_][0][lane] : 0);
    if (with_mass) x.mass = sum_of_lanes<kWarps>(parts_.sums[side_][0][lane % kWarps]);
    return x;
  }

  // The largest of each.
  __device__ __forceinline__ int2 most(int2 x) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    side_ ^= 1;
    x = {__reduce_max_sync(kAllLanes, x.x), __reduce_max_sync(kAllLanes, x.y)};
    if (lane == 0) parts_.counts[side_][0][warp] = x.x, parts_.counts[side_][1][warp] = x.y;
    __syncthreads();
    const auto& parts = parts_.counts[side_];
    return {__reduce_max_sync(kAllLanes, parts[0][lane % kWarps]), __reduce_max_sync(kAllLanes, parts[1][lane % kWarps])};
  }

  // The sum of what the threads before this one have.
  __device__ __forceinline__ int before(int mine) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    side_ ^= 1;
    int up_to = up_to_lane(mine, lane);
    if (lane == kWarp - 1) parts_.counts[side_][0][warp] = up_to;
    __syncthreads();
    for (int other = 0; other < warp; ++other) up_to += parts_.counts[side_][0][other];
    return up_to - mine;
  }

  // The same of up to three numbers.
  template <int kNumbers>
  __device__ __forceinline__ void before(float (&mine)[kNumbers]) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    side_ ^= 1;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      float up_to = up_to_lane(mine[i], lane);
      if (lane == kWarp - 1) parts_.sums[side_][i][warp] = up_to;
      up_to = __shfl_up_sync(kAllLanes, up_to, 1);
      mine[i] = lane == 0 ? 0.0f : up_to;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      float others = 0;
#pragma unroll 1
      for (int other = 0; other < warp; ++other) others += parts_.sums[side_][i][other];
      mine[i] += others;
    }
  }

 private:
  template <int kLanes>
  __device__ __forceinline__ static float sum_of_lanes(float x) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
  }
  template <class T>
  __device__ __forceinline__ static T up_to_lane(T x, int lane) {
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const T theirs = __shfl_up_sync(kAllLanes, x, distance);
      if (lane >= distance) x += theirs;
    }
    return x;
  }

  Parts& parts_;
  int side_ = 0;
};

}  // namespace fgattn
