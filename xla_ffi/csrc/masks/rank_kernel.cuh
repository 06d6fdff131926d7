// The best keys of every mean query, by count or by a share of the mass, from the few keys that could be either kept or
// not: of rows with one mean, most of the time.
//
//   mean_sums_kernel --samples--> bands_kernel --bands--> mean_candidates_kernel --candidates--> rank_kernel --> bits
//
// A sample of a row's scores, left by the pass that sums them, says between which scores the last kept key must lie:
// the row's band. The next pass knows of every key on which side of the band it lies. It writes the bits of those above
// and, for a share, what they hold; the keys inside, the candidates, it lists with their scores. Bins of these show
// where the cut lies. Where the sample was wrong, or too many keys tie at the cut, the row's flag is set, and the
// kernels that rank probabilities of all keys do it (mean_probabilities_kernel, select_kernel). So they do for a
// threshold with bounds, for rows of several means, and for floors that rows of a head share.
#pragma once
#include <cstdint>

#include "masks/mean_candidates_kernel.cuh"
#include "masks/mean_kernel.cuh"
#include "masks/select_scores.cuh"

namespace fgattn {

struct RankMemory {
  static constexpr int kBins = kSelectThreads, kMostTies = 1024;
  struct Found {
    int bin, number, mass;  // of candidates above the bin
  };
  BlockSum::Parts parts;
  int chunks;                         // of all lists
  int numbers[kBins], masses[kBins];  // of candidates, in bins of 256 steps; masses in 2^-30
  int steps[kBins];                   // of candidates of one bin
  int number, mass;                   // of all candidates
  Found found;
  int num_ties;
  int ties[kMostTies];  // keys of the step that holds the cut
  // Of a list: where it begins, which is also its first key, and behind that a chunk of kChunk candidates, a multiple
  // of kChunk, and a quarter of how many there are.
  struct alignas(8) Chunk {
    int first, at;
  };
  static constexpr int kChunk = 4 * kWarp;
  // Behind it: bits[num_words], and chunks, a tile of keys or less each but for the last ones of lists.
};
__host__ __device__ constexpr int rank_bytes(int num_words) {
  return (sizeof(RankMemory) + 15) / 16 * 16 + 4 * num_words +
         (num_words / 4 + kMostLists) * static_cast<int>(sizeof(RankMemory::Chunk));
}

// One block a row of the pass.
static __global__ void __launch_bounds__(kSelectThreads, 5) rank_kernel(const __grid_constant__ MeanWork work) {
  constexpr int kBins = RankMemory::kBins, kChunk = RankMemory::kChunk;
  constexpr float kMassUnit = 0x1p30f;
  static_assert(kMostLists <= kSelectThreads && kBins * 256 == static_cast<int>(kBandSteps) + 2);
  extern __shared__ __align__(16) char rank_memory[];
  RankMemory& memory = *reinterpret_cast<RankMemory*>(rank_memory);
  const ScoreArgs& s = work.args.scores;
  uint32_t* bits = reinterpret_cast<uint32_t*>(rank_memory + (sizeof(RankMemory) + 15) / 16 * 16);
  RankMemory::Chunk* chunks = reinterpret_cast<RankMemory::Chunk*>(bits + s.num_words);
  const SelectRule& rule = work.args.rule;
  const int thread = threadIdx.x, lane = thread % kWarp, num_lists = work.parts, bin = kBins - 1 - thread;
  const int64_t row = int64_t{work.first_head} * s.num_rows + blockIdx.x;
  const bool by_mass = rule.rule == Rule::kTopP;
  const Band band = *work.band(row);
  BlockSum sum(memory.parts);
  const auto refuse = [&] {
    if (thread == 0) *work.flag(row) = 1;
  };
  if (!(fabsf(band.lower) < INFINITY)) return refuse();

  // What the pass found: lists, keys above the band, and what they hold.
  const uint32_t counts = thread < num_lists ? work.samples(row)[thread] : 0;
  const int listed = static_cast<int>(counts & 0xFFFFu);
  Amount above{0, thread < num_lists ? __uint_as_float(work.samples(row)[kMostLists + thread]) : 0.0f};
  uint32_t* row_bits = work.args.bits + row * s.num_words;
#pragma unroll 2
  for (int i = thread; i < s.num_words / 4; i += kSelectThreads) {
    const uint4 words = reinterpret_cast<const uint4*>(row_bits)[i];
    reinterpret_cast<uint4*>(bits)[i] = words;
    above.count += __popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w);
  }
  const int own_chunks = (listed + kChunk - 1) / kChunk, chunks_before = sum.before(own_chunks);
  for (int i = 0; i < own_chunks; ++i) {
    chunks[chunks_before + i] = {128 * thread * work.tiles_of_part, kChunk * i + min(listed - kChunk * i, kChunk) / 4};
  }
  if (thread == num_lists - 1) memory.chunks = chunks_before + own_chunks;
  memory.numbers[thread] = memory.masses[thread] = 0;
  if (thread == 0) memory.num_ties = 0;
  above = sum(above, by_mass);                                                        // and all is written
  const int others = sum({listed - static_cast<int>(counts >> 16), 0}, false).count;  // that are no candidates

  // f(what is listed, first key of the list) for all lists; listed are candidates and kNoCandidate.
  const uint32_t* lists =
      reinterpret_cast<const uint32_t*>(work.probabilities()) + int64_t{blockIdx.x} * 32 * s.num_words;
  const auto each_listed = [&](auto f) {
#pragma unroll 1
    for (int i = thread / kWarp; i < memory.chunks; i += kSelectThreads / kWarp) {
      const RankMemory::Chunk chunk = chunks[i];
      if (lane >= chunk.at % kChunk) continue;
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(lists + chunk.first + chunk.at / kChunk * kChunk) + lane);
      f(four.x, chunk.first), f(four.y, chunk.first), f(four.z, chunk.first), f(four.w, chunk.first);
    }
  };
  // What a candidate holds at least, in whole numbers: sums are the same in any order.
  const float of_step = band.width / kBandSteps, bottom = band.lower - band.lse - of_step;  // steps count from 1
  const auto mass = [&](int step) { return static_cast<int>(ptx::exp2(fmaf(step, of_step, bottom)) * kMassUnit); };
  each_listed([&](uint32_t candidate, int) {
    const int step = candidate & 0xFFFF;
    atomicAdd(memory.numbers + step / 256, 1);
    if (by_mass) atomicAdd(memory.masses + step / 256, mass(step));
  });
  __syncthreads();  // all are counted
  int own_number = memory.numbers[bin], own_mass = memory.masses[bin];
  if (bin == 0) own_number -= others, own_mass -= by_mass ? others * mass(0) : 0;
  const int number_above = sum.before(own_number), mass_above = by_mass ? sum.before(own_mass) : 0;
  if (bin == 0) memory.number = number_above + own_number, memory.mass = mass_above + own_mass;

  // The cut: the highest step with which `target` is reached, in number or in mass; 0 < target <= what all hold.
  int cut = 0, better = 0, missing = 0;  // candidates above its step, and how many of that step stay
  const auto find = [&](bool in_mass, int target) {
    // Of this thread's bin, or step: how many there are, and what they hold.
    const auto search = [&](int number, int mass, int number_before, int mass_before) {
      const int before = in_mass ? mass_before : number_before, here = in_mass ? mass : number;
      if (before < target && target <= before + here) memory.found = {bin, number_before, mass_before};
      __syncthreads();  // found
    };
    memory.steps[thread] = 0;
    search(own_number, own_mass, number_above, mass_above);
    const RankMemory::Found found = memory.found;
    each_listed([&](uint32_t candidate, int) {
      if (static_cast<int>(candidate >> 8 & 0xFF) == found.bin) atomicAdd(memory.steps + (candidate & 0xFF), 1);
    });
    __syncthreads();  // all are counted
    const int number = found.bin + bin > 0 ? memory.steps[bin] : 0,
              held = in_mass ? number * mass(256 * found.bin + bin) : 0;
    const int number_before = found.number + sum.before(number);
    search(number, held, number_before, in_mass ? found.mass + sum.before(held) : 0);
    cut = 256 * found.bin + memory.found.bin, better = memory.found.number;
    const int of_one = in_mass ? mass(cut) : 1;
    missing = (target - (in_mass ? memory.found.mass : better) + of_one - 1) / of_one;
    __syncthreads();  // all have read it
  };
  __syncthreads();  // what all hold is written
  const int candidates = memory.number;
  int count = work.top_k();
  bool found = false;
  if (by_mass) {
    const float share = (rule.value - above.mass) * kMassUnit;
    if (!(fabsf(share) < 2 * kMassUnit)) return refuse();
    const int target = static_cast<int>(ceilf(share));
    // Where the cut lies on another side of the band, only the bounds of the number can be among the candidates.
    count = target <= 0 ? 0 : s.num_keys;
    if (0 < target && target <= memory.mass) find(true, target), count = above.count + better + missing, found = true;
    const int bounded = min(max(count, rule.min_keys), min(rule.max_keys, s.num_keys));
    found = found && bounded == count, count = bounded;
  }
  if (!found) {
    if (count <= above.count || count > above.count + candidates) return refuse();
    find(false, count - above.count);
  }

  each_listed([&](uint32_t candidate, int first) {
    const int step = candidate & 0xFFFF;
    const int key = static_cast<int>(candidate >> 16) + first;
    atomicOr(bits + key / 32, step > cut ? 1u << key % 32 : 0u);  // no branch
    if (step != cut) return;
    const int tie = atomicAdd(&memory.num_ties, 1);
    if (tie < RankMemory::kMostTies) memory.ties[tie] = key;
  });
  __syncthreads();  // all ties are listed
  const int ties = memory.num_ties;
  if (ties > RankMemory::kMostTies) return refuse();
  // The first ones stay.
  for (int i = thread; i < ties; i += kSelectThreads) {
    const int key = memory.ties[i];
    int earlier = 0;
    for (int j = 0; j < ties; ++j) earlier += memory.ties[j] < key ? 1 : 0;
    if (earlier < missing) atomicOr(bits + key / 32, 1u << key % 32);
  }
  __syncthreads();  // all bits are set
  for (int i = thread; i < s.num_words / 4; i += kSelectThreads) {
    reinterpret_cast<uint4*>(row_bits)[i] = reinterpret_cast<const uint4*>(bits)[i];
  }
  if (thread == 0) *work.flag(row) = 0, work.args.counts[row] = count;
}

}  // namespace fgattn
