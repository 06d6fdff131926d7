// The `top_k` best keys of every mean query from one byte a key: of rows with one mean, most of the time.
//
//   mean_sums_kernel --samples--> bands_kernel --bands--> mean_codes_kernel --codes--> rank_kernel --> bits
//
// A sample of a row's scores, left by the pass that sums them, says between which scores the last kept key must lie:
// the row's band. The next pass writes a code a key: 0 below the band, 127 above it, and else which of 126 equal steps
// holds its score. Counts of the codes show in which step the cut lies; the few keys of that step are scored again, and
// ordered exactly. Where the sample was wrong, or too many keys share the step, the row's flag is set, and the kernels
// that rank probabilities in 16 bits do it (mean_probabilities_kernel, select_kernel). So they do for all other rules,
// for rows of several means, and for floors that rows of a head share. A share is no rule for codes: the mass of a step
// is known to its width only, and samples say so little of masses that bands of peaked rows are wide.
//
// Codes of 128 neighbouring keys, a tile, stand in 128 bytes, eight pieces of 16. Of the four lanes that share a line,
// lane `quad` writes pieces quad and quad + 4: words (i, b), i the word of 32 keys, two a piece, and b = 0, 1, whose
// byte c is key 32 i + 8 c + 2 quad + b, what the product leaves in one thread. Bit 7 of a byte is set, so that four
// are compared by one subtraction.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

#include "masks/mean_kernel.cuh"
#include "masks/select_scores.cuh"

namespace fgattn {

constexpr int kCodeAbove = 127, kCodeSteps = 126;
constexpr int kBandThreads = 128, kMostListed = 512;
constexpr uint32_t kCodeFlags = 0x80808080u, kEachCode = 0x01010101u;

// A warp a row: the band, from the row's sample.
static __global__ void __launch_bounds__(kBandThreads) bands_kernel(const __grid_constant__ MeanWork work) {
  const MeanMaskArgs& args = work.args;
  const int lane = threadIdx.x % kWarp, num_words = work.sample_words();
  const int64_t row = int64_t{blockIdx.x} * (kBandThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= work.rows()) return;
  constexpr int kWords = kSampleWords / kWarp;
  float sample[2 * kWords];
  float least = INFINITY, most = -INFINITY;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int at = i * kWarp + lane;
    const uint32_t word = __ldg(work.samples(row) + min(at, num_words - 1));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float here = ptx::unpack<__half>(word, j);
      least = fminf(least, here), most = fmaxf(most, here);
      sample[2 * i + j] = at < num_words ? here : -INFINITY;
    }
  }
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    least = fminf(least, __shfl_xor_sync(kAllLanes, least, distance));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, distance));
  }
  // To spare are five standard deviations of independent keys, eight keys, and half as much again: the keys of a
  // pair are neighbours. Upwards less, if so many are not wanted at all: a band without an end has wide steps.
  const float number = 2.0f * num_words, share = static_cast<float>(work.top_k()) / args.scores.num_keys;
  const float wanted = number * share, spare = 7.5f * sqrtf(wanted * (1 - share)) + 12 * number / args.scores.num_keys;
  const float spare_above = wanted > 20 ? fminf(spare, 0.8f * wanted) : spare;
  auto reached = [&](float score) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < 2 * kWords; ++i) count += sample[i] >= score ? 1 : 0;
    return static_cast<float>(__reduce_add_sync(kAllLanes, count));
  };
  // Between the first two the best lower bound, between the others the best upper one; the outer ones may be wrong.
  const float beyond = (most - least) / 2;
  float lower = least - beyond, not_lower = most, not_upper = least, upper = most + beyond;
#pragma unroll 1
  for (int step = 0; step < 10; ++step) {
    const float low = step == 0 ? least : (lower + not_lower) / 2, high = step == 0 ? most : (not_upper + upper) / 2;
    reached(low) >= wanted + spare ? lower = low : not_lower = low;
    reached(high) <= wanted - spare_above ? upper = high : not_upper = high;
  }
  if (lane != 0) return;
  lower -= fabsf(lower) * 0x1p-10f, upper += fabsf(upper) * 0x1p-10f;  // samples have 16 bits
  // A score that is no number, or infinite, shows in the sum of all: then no key gets a code.
  const bool finite = fabsf(work.lse(static_cast<int>(row / args.scores.num_rows),
                                     static_cast<int>(row % args.scores.num_rows))) < INFINITY;
  *work.band(row) = {finite ? lower : NAN, kCodeSteps / fmaxf(upper - lower, 0x1p-10f)};
}

// Second pass: codes of all keys.
template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) mean_codes_kernel(const __grid_constant__ MeanWork work) {
  pass_over_keys<C>(work, [&](const MeanItem& item, int first_line, auto score) {
    const ScoreArgs& args = work.args.scores;
    const int quad = threadIdx.x % 4, tiles = args.num_words / 4;
    const float factor = kLog2E * __ldg(args.scale);
    float slope[C::kGroups][2], offset[C::kGroups][2];
    uint4* codes = reinterpret_cast<uint4*>(work.probabilities()) +
                   int64_t{item.head - work.first_head} * args.num_rows * 8 * tiles;
    int place[C::kGroups][2];  // of the first tile; -1: no row
#pragma unroll
    for (int i = 0; i < 2 * C::kGroups; ++i) {
      const int line = first_line + 64 * (i / 2) + 8 * (i % 2), row = min(line, args.num_rows - 1);
      const Band band = *work.band(int64_t{item.head} * args.num_rows + row);
      slope[i / 2][i % 2] = factor * band.steps / kCodeAbove;
      offset[i / 2][i % 2] = (1 - band.lower * band.steps) / kCodeAbove;
      place[i / 2][i % 2] = line < args.num_rows ? 8 * row * tiles + quad : -1;
    }
    score([&](int group, int first_key, float (&scores)[C::kScores]) {
      const int left = args.num_keys - first_key;
      if (left < C::kTileKeys) {
#pragma unroll
        for (int i = 0; i < C::kScores; ++i) {
          if (i / 4 * 8 + quad * 2 + i % 2 >= left) scores[i] = NAN;  // has code 0
        }
      }
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        uint32_t words[8];
#pragma unroll
        for (int word = 0; word < 8; ++word) {
          uint32_t bytes[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float score = scores[4 * (4 * (word / 2) + c) + 2 * line + word % 2];
            bytes[c] =
                ptx::floor_to_byte(ptx::saturating_fma(score, slope[group][line], offset[group][line]), kCodeAbove);
          }
          words[word] =
              __byte_perm(__byte_perm(bytes[0], bytes[1], 0x0040), __byte_perm(bytes[2], bytes[3], 0x0040), 0x5410);
        }
        if (place[group][line] >= 0) {
          uint4* to = codes + place[group][line] + 8 * (first_key / C::kTileKeys);
          to[0] = {words[0], words[1], words[2], words[3]}, to[4] = {words[4], words[5], words[6], words[7]};
        }
      }
    });
  });
}

struct RankMemory {
  BlockSum::Parts parts;
  int bins[kCodeAbove + 1];  // of codes
  int cut;                   // the code that holds the cut, or 0: none
  int above_cut;             // keys whose code is higher
  int num_listed;
  int keys[kMostListed];  // of the code that holds the cut
  float scores[kMostListed];
};

// Shared memory for a row: this, and its codes.
constexpr int kRankBytes = (sizeof(RankMemory) + 15) / 16 * 16;
inline int rank_bytes(int num_words) { return kRankBytes + 32 * num_words; }

// One block a row of the pass.
template <class Element>
__global__ void __launch_bounds__(kSelectThreads, 4) rank_kernel(const __grid_constant__ MeanWork work) {
  extern __shared__ __align__(16) char rank_memory[];
  RankMemory& memory = *reinterpret_cast<RankMemory*>(rank_memory);
  uint4* codes = reinterpret_cast<uint4*>(rank_memory + kRankBytes);
  const ScoreArgs& s = work.args.scores;
  const int tiles = s.num_words / 4, thread = threadIdx.x;
  // Piece p of tile t to place p ^ t % 8 of the tile: eight lanes that read the same piece meet in no bank.
  const uint4* source = reinterpret_cast<const uint4*>(work.probabilities()) + int64_t{blockIdx.x} * 8 * tiles;
#pragma unroll 4
  for (int i = thread; i < 8 * tiles; i += kSelectThreads) codes[i ^ (i / 8 & 7)] = __ldg(source + i);
  for (int i = thread; i <= kCodeAbove; i += kSelectThreads) memory.bins[i] = 0;
  if (thread == 0) memory.cut = 0, memory.num_listed = 0;
  __syncthreads();  // all codes are here, and nothing is counted yet
  // f(word, codes): codes[2 quad + b] of 32 keys, as the picture says.
  auto each_word = [&](auto f) {
#pragma unroll 1
    for (int half = thread; half < 2 * tiles; half += kSelectThreads) {
      const int tile = half / 2;
      uint32_t words[16];
#pragma unroll
      for (int quad = 0; quad < 4; ++quad) {
        const uint4 four = codes[8 * tile + ((half % 2 * 4 + quad) ^ (tile & 7))];
        words[2 * quad] = four.x, words[2 * quad + 1] = four.y, words[2 * quad + 8] = four.z,
                  words[2 * quad + 9] = four.w;
      }
      f(2 * half, words), f(2 * half + 1, words + 8);
    }
  };
  each_word([&](int, const uint32_t* words) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) atomicAdd(memory.bins + (words[i] >> (8 * j) & kCodeAbove), 1);
    }
  });
  __syncthreads();  // all are counted

  // The first code from above with which enough is kept: thread i has code 127 - i.
  BlockSum sum(memory.parts);
  const int top_k = work.top_k(), code = kCodeAbove - thread, here = code >= 0 ? memory.bins[code] : 0;
  const int before = sum.before(here);
  if (code >= 0 && before < top_k && before + here >= top_k) memory.cut = code, memory.above_cut = before;
  __syncthreads();  // the cut is found
  const int cut = memory.cut;
  const int64_t row = int64_t{work.first_head} * s.num_rows + blockIdx.x;
  const bool found = cut > 0 && cut < kCodeAbove && memory.bins[cut] <= kMostListed;
  if (thread == 0) *work.flag(row) = found ? 0 : 1;
  if (!found) return;

  // Bits of all keys with higher codes, and a list of those with this one.
  uint32_t* bits = work.args.bits + row * s.num_words;
  each_word([&](int number, const uint32_t* words) {
    uint32_t higher = 0, reached = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      higher |= (words[i] - (cut + 1) * kEachCode & kCodeFlags) >> (7 - i);
      reached |= (words[i] - cut * kEachCode & kCodeFlags) >> (7 - i);
    }
    bits[number] = higher;
    for (uint32_t rest = reached & ~higher; rest != 0; rest &= rest - 1) {
      memory.keys[atomicAdd(&memory.num_listed, 1)] = 32 * number + __ffs(rest) - 1;
    }
  });
  __syncthreads();  // all bits and keys are written

  // Their scores: four lanes a key, 16 bytes each at a time.
  const int num_listed = memory.num_listed, of_head = static_cast<int>(row % s.num_rows), quad = thread % 4;
  const int head = static_cast<int>(row / s.num_rows), batch = head / s.num_heads;
  const int kv = head % s.num_heads / (s.num_heads / s.num_kv_heads);
  const uint4* mean = reinterpret_cast<const uint4*>(work.means(head) + 2 * int64_t{of_head} * s.head_dim) + quad;
  const Element* keys = static_cast<const Element*>(s.key) + batch * s.key_strides.batch + kv * s.key_strides.head;
  const float factor = kLog2E * __ldg(s.scale);
  const auto dot_of_8 = [](const uint4& x, const uint4& y, float& product) {
    const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      product = fmaf(ptx::unpack<Element>(a[i / 2], i % 2), ptx::unpack<Element>(b[i / 2], i % 2), product);
    }
  };
  for (int first = 0; first < num_listed; first += kSelectThreads / 4) {
    const int i = min(first + thread / 4, num_listed - 1);
    const uint4* key = reinterpret_cast<const uint4*>(keys + memory.keys[i] * s.key_strides.token) + quad;
    float product = 0;
    for (int at = 0; at < s.head_dim / 8; at += 8) {  // two loads each at a time
      const uint4 near = __ldg(key + at), far = __ldg(key + at + 4);
      dot_of_8(__ldg(mean + at), near, product), dot_of_8(__ldg(mean + at + 4), far, product);
    }
    product = quad_sum(product) * factor;
    if (quad == 0) memory.scores[i] = product;
  }
  __syncthreads();  // all are scored
  const int missing = top_k - memory.above_cut;
  for (int i = thread; i < num_listed; i += kSelectThreads) {
    const float mine = memory.scores[i];
    const int key = memory.keys[i];
    int better = 0;
#pragma unroll 4
    for (int j = 0; j < num_listed; ++j) {
      const float other = memory.scores[j];
      better += other > mine || (other == mine && memory.keys[j] < key) ? 1 : 0;
    }
    if (better < missing) atomicOr(bits + key / 32, 1u << key % 32);
  }
  if (thread == 0) work.args.counts[row] = top_k;
}

}  // namespace fgattn
