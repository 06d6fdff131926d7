// Which keys of a row lie above its band, and lists of those inside, the candidates (rank_kernel.cuh).
//
// A list for every row and part of the keys. A candidate is 32 bits: its tile of 128 keys in the part, its key in the
// tile, and its score as one of 65534 equal steps of the band, counted from 1. The four lanes that share a line gather
// those of a tile in shared memory, four or a multiple of it, so that whole sectors are written.
#pragma once
#include <cstdint>

#include "masks/carry.cuh"
#include "masks/mean_bits_kernel.cuh"
#include "masks/mean_kernel.cuh"
#include "softmax.cuh"

namespace fgattn {

constexpr float kBandSteps = 65534;
constexpr int kMostLists = 64;       // of a row; their counts and masses stand where the row's sample was
constexpr int kMostListTiles = 511;  // of a part of the keys
static_assert(2 * kMostLists <= kSampleWords);
constexpr uint32_t kNoCandidate = 0;  // fills up to a multiple of four

// Behind the memory of a pass: for every warp of the consumers, the candidates of a tile in the eight lines of a
// product's lanes. Lines begin in other banks.
constexpr int kGatheredLine = 132;
template <class C>
constexpr size_t kCandidateBytes = sizeof(MeanMemory<C>) + 4 * C::kConsumers * 8 * kGatheredLine * sizeof(uint32_t);

// Second pass: bits of the keys above the band, what they hold (kMass), and the candidates.
template <class C, bool kMass>
__global__ void __launch_bounds__(C::kThreads, 1) mean_candidates_kernel(const __grid_constant__ MeanWork work) {
  pass_over_keys<C>(work, [&](const MeanItem& item, int first_line, auto score) {
    extern __shared__ __align__(1024) char raw[];
    const ScoreArgs& args = work.args.scores;
    const int quad = threadIdx.x % 4;
    const int gathered_line = (threadIdx.x - 128) / 4 * kGatheredLine;
    uint32_t* gathered = reinterpret_cast<uint32_t*>(raw + sizeof(MeanMemory<C>)) + gathered_line;
    const float factor = kLog2E * __ldg(args.scale);
    uint32_t* const lists = reinterpret_cast<uint32_t*>(work.probabilities()) +
                            C::kTileKeys * item.part * work.tiles_of_part -
                            int64_t{work.first_head} * args.num_rows * (32 * args.num_words);
    // Of a thread's four lines, each lane of a quad keeps what belongs to one: registers are few.
    const auto line_of = [&](int group, int line) { return 64 * group + 8 * line; };
    const auto from_owner = [&](auto x, int group, int line) {
      return __shfl_sync(kAllLanes, x, threadIdx.x % kWarp - quad + 2 * group + line);
    };
    const int first_row = item.head * args.num_rows + first_line, rows_left = args.num_rows - first_line;
    const int own_line = line_of(quad / 2, quad % 2);
    const bool owns_row = own_line < rows_left;
    // Scores are taken to -1/2 at the lower end of the band, and to 1/2 at the upper one.
    const Band band = *work.band(owns_row ? first_row + own_line : 0);
    const float own_slope = factor / band.width, own_offset = -band.lower / band.width - 0.5f;
    float own_mass = 0;
    uint32_t own_count = 0;  // what is listed, and candidates * 2^16
    score([&](int group, int first_key, float (&scores)[C::kScores]) {
      constexpr int kOfLine = C::kScores / 2;
      const int left_of_tile = args.num_keys - first_key;
      if (left_of_tile < C::kTileKeys) {
#pragma unroll
        for (int i = 0; i < C::kScores; ++i) {
          if (i / 4 * 8 + quad * 2 + i % 2 >= left_of_tile) scores[i] = factor < 0 ? INFINITY : -INFINITY;
        }
      }
      // Without the upper bits of what it is added to, those of 2^23 as float32.
      const uint32_t tile =
          static_cast<uint32_t>(first_key / C::kTileKeys - item.part * work.tiles_of_part) << 23 | quad << 17;
      const uint32_t place = tile - 0x4B000000u;
      const int word = first_key / 32 + quad, left = args.num_keys - 32 * word;
      const uint32_t valid = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        const int row = first_row + line_of(group, line);
        const float slope = from_owner(own_slope, group, line), offset = from_owner(own_offset, group, line);
        const float lse = kMass ? from_owner(band.lse, group, line) : 0.0f;
        const uint32_t count = from_owner(own_count, group, line) & 0xFFFFu;
        const bool is_own = quad == 2 * group + line, is_row = line_of(group, line) < rows_left;
        // Bit 2 c + b is column 8 c + 2 quad + b.
        const auto score_at = [&](int at) { return scores[at / 2 * 4 + 2 * line + at % 2]; };
        const auto place_at = [&](int at) { return fmaf(score_at(at), slope, offset); };
        uint32_t below[2] = {0, 0}, inside[2] = {0, 0};
        float held[2] = {0, 0};
#pragma unroll
        for (int bit = kOfLine / 2 - 1; bit >= 0; --bit) {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const int at = part * kOfLine / 2 + bit;
            const float here = place_at(at);
            inside[part] = ptx::shift_in_sign(inside[part], fabsf(here) - 0.5f);
            below[part] = ptx::shift_in_sign(below[part], here - 0.5f);
            if (kMass) {
              // 1 from 1/2 on, else 0: the last number below 1/2 is 2^-25 away.
              const float above = ptx::saturating_fma(here, 0x1p59f, -(0x1p58f - 0x1p34f));
              held[part] = fmaf(above, ptx::exp2(fmaf(score_at(at), factor, -lse)), held[part]);
            }
          }
        }
        if (kMass) {
          const float all = quad_sum(held[0] + held[1]);
          if (is_own) own_mass += all;
        }
        // Where this lane's candidates begin among those of the line, and how many all lanes have.
        const int mine = __popc(inside[0] | inside[1] << (kOfLine / 2));
        int up_to = mine;
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
          const int theirs = __shfl_up_sync(kAllLanes, up_to, distance);
          if (quad >= distance) up_to += theirs;
        }
        const int number = __shfl_sync(kAllLanes, up_to, threadIdx.x % kWarp | 3), filled = (number + 3) / 4 * 4;
        if (is_own) own_count += filled | number << 16;
        uint32_t next = ptx::shared_address(gathered + up_to - mine);
#pragma unroll
        for (int at = 0; at < kOfLine; ++at) {
          const float here = place_at(at);
          const int key = at / 2 * 8 + at % 2;
          const uint32_t step = ptx::floor_of_fma(here, kBandSteps, 0x1p23f + kBandSteps / 2 + 1 + (key << 16));
          ptx::store_inside(next, step + place, here, 0.5f);
        }
        if (number + quad < filled) gathered[number + quad] = kNoCandidate;
        __syncwarp();  // all are gathered
        if (is_row) {
          uint32_t* to = lists + int64_t{row} * (32 * args.num_words) + count;
#pragma unroll 1
          for (int i = 4 * quad; i < filled; i += 16) {
            *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(gathered + i);
          }
        }
        __syncwarp();  // before others gather the next
        const uint32_t above = words_of_quad(~(below[0] | below[1] << (kOfLine / 2)), quad) & valid;
        if (is_row) work.args.bits[int64_t{row} * args.num_words + word] = above;
      }
    });
    if (!owns_row) return;
    uint32_t* found = work.samples(first_row + own_line) + item.part;
    found[0] = own_count;
    found[kMostLists] = __float_as_uint(own_mass);
  });
}

}  // namespace fgattn
