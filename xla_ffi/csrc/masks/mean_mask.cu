// Starts the kernels of mean-query masks: means, sums of exponentials, bits, and the best key of rows that keep
// nothing.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "masks/bands_kernel.cuh"
#include "masks/best_key.cuh"
#include "masks/mask_launch.h"
#include "masks/mean_bits_kernel.cuh"
#include "masks/mean_candidates_kernel.cuh"
#include "masks/mean_kernel.cuh"
#include "masks/rank_kernel.cuh"
#include "masks/start.cuh"
#include "masks/start_select.cuh"

namespace fgattn {
namespace {

// One block a row, as keep_best_kernel of exact_mask.cu.
template <class Element>
__global__ void __launch_bounds__(kBestThreads) keep_best_of_mean_kernel(const __grid_constant__ MeanWork work) {
  extern __shared__ __align__(8) int best_of_threads[];
  ptx::wait_for_kernels_before();
  const ScoreArgs& args = work.args.scores;
  const int64_t row = blockIdx.x;
  if (work.args.counts[row] != 0) return;
  const int head = static_cast<int>(row / args.num_rows), batch = head / args.num_heads;
  const int kv = head % args.num_heads / (args.num_heads / args.num_kv_heads);
  const int first_line = static_cast<int>(row % args.num_rows) * work.args.num_means;
  const Element* means = reinterpret_cast<const Element*>(work.means(head)) + int64_t{first_line} * args.head_dim;
  const Element* keys =
      static_cast<const Element*>(args.key) + batch * args.key_strides.batch + kv * args.key_strides.head;
  const float factor = kLog2E * *args.scale;
  const int best = best_key(args.num_keys, best_of_threads, [&](int key) {
    float here = 0;
    for (int part = 0; part < work.args.num_means; ++part) {
      const float share = work.share(first_line + part);
      if (share == 0) continue;
      const float product = dot(means + part * args.head_dim, keys + key * args.key_strides.token, args.head_dim);
      here += share * ptx::exp2(fmaf(product, factor, -work.lse(head, first_line + part)));
    }
    return here;
  });
  if (threadIdx.x != 0) return;
  work.args.bits[row * args.num_words + best / 32] = 1u << (best % 32);
  work.args.counts[row] = 1;
}

// In how many parts the keys are taken: the fewest waves of blocks, counted in keys.
int key_parts(int blocks, int num_tiles, int most_parts, int num_sms) {
  int best = 1;
  double least = 1e30;
  for (int parts = 1; parts <= std::min(most_parts, num_tiles); ++parts) {
    const int waves = (blocks * parts + num_sms - 1) / num_sms, tiles = (num_tiles + parts - 1) / parts;
    const double cost = waves * (tiles + 4.0);  // to begin and end a block costs some tiles
    if (cost < least) least = cost, best = parts;
  }
  return best;
}

// A pass over the keys of `heads` heads from `work.first_head` on.
template <class C>
cudaError_t launch_pass(void (*kernel)(MeanWork), MeanWork work, int heads, cudaStream_t stream,
                        size_t bytes = sizeof(MeanMemory<C>)) {
  static_assert(sizeof(MeanMemory<C>) <= 227 * 1024);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  // Where keys are ranked, starting early was no faster, and slower for a share (docs/notes/mask_kernels.md).
  const bool early = !work.args.ranks;
  return launch(kernel, heads * (work.lines / C::kLines) * work.parts, C::kThreads, bytes, stream, early, work);
}

template <class C>
void take_keys_in_parts(MeanWork& work, int heads, int most_parts, int num_sms) {
  const int tiles = (work.args.scores.num_keys + C::kTileKeys - 1) / C::kTileKeys;
  work.parts = key_parts(heads * (work.lines / C::kLines), tiles, most_parts, num_sms);
  work.tiles_of_part = (tiles + work.parts - 1) / work.parts;
}

// Whether the cut can be found among candidates, but for a few rows (rank_kernel.cuh).
bool ranks_candidates(const MeanWork& work) {
  constexpr int kFewestWords = 128;  // of a sample
  const MeanMaskArgs& args = work.args;
  const bool by_rule = args.rule.rule == Rule::kTopK || args.rule.rule == Rule::kTopP;
  return args.ranks && args.num_means == 1 && by_rule && args.rule.head_floor == 0 &&
         work.sample_words() >= kFewestWords && args.scores.num_words / 4 <= kMostLists * kMostListTiles;
}

// The best keys of some heads: candidates, and what the rows keep whose sample was right.
template <class C>
cudaError_t launch_candidates(MeanWork work, int heads, int num_sms, cudaStream_t stream) {
  take_keys_in_parts<C>(work, heads, kMostLists, num_sms);
  if (work.tiles_of_part > kMostListTiles) {
    const int tiles = work.args.scores.num_words / 4;
    work.parts = (tiles + kMostListTiles - 1) / kMostListTiles;
    work.tiles_of_part = (tiles + work.parts - 1) / work.parts;
  }
  static_assert(kCandidateBytes<C> <= 227 * 1024);
  auto* pass = work.args.rule.rule == Rule::kTopP ? mean_candidates_kernel<C, true> : mean_candidates_kernel<C, false>;
  cudaError_t error = launch_pass<C>(pass, work, heads, stream, kCandidateBytes<C>);
  if (error != cudaSuccess) return error;
  const int bytes = rank_bytes(work.args.scores.num_words);
  error = cudaFuncSetAttribute(rank_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  return launch(rank_kernel, heads * work.args.scores.num_rows, kSelectThreads, bytes, stream, false, work);
}

// Some heads at a time, as many as the workspace holds: their probabilities, and the best of them.
template <class C>
cudaError_t launch_ranked(MeanWork work, int heads, int num_sms, cudaStream_t stream) {
  const MeanMaskArgs& args = work.args;
  const ScoreArgs& s = args.scores;
  int32_t* probabilities = work.probabilities();
  int32_t* floors = probabilities + int64_t{args.workspace_heads} * s.num_rows * s.num_words * 32;
  SelectArgs selection{};
  selection.scores = probabilities;
  selection.stride = 32 * static_cast<int64_t>(s.num_words);
  selection.rule = args.rule;
  selection.num_keys = s.num_keys, selection.num_words = s.num_words, selection.num_rows = s.num_rows;
  const bool by_candidates = ranks_candidates(work);
  if (by_candidates) {
    constexpr int kRowsOfBlock = kBandThreads / kWarp;
    const int blocks = (heads * s.num_rows + kRowsOfBlock - 1) / kRowsOfBlock;
    const cudaError_t error = launch(bands_kernel, blocks, kBandThreads, kBandBytes, stream, false, work);
    if (error != cudaSuccess) return error;
  }
  work.only_flagged = by_candidates;
  for (int first = 0; first < heads; first += args.workspace_heads) {
    const int some = std::min(args.workspace_heads, heads - first);
    const int64_t row = int64_t{first} * s.num_rows;
    work.first_head = first;
    cudaError_t error = by_candidates ? launch_candidates<C>(work, some, num_sms, stream) : cudaSuccess;
    if (error != cudaSuccess) return error;
    take_keys_in_parts<C>(work, some, 1 << 20, num_sms);
    error = launch_pass<C>(mean_probabilities_kernel<C>, work, some, stream);
    if (error != cudaSuccess) return error;
    selection.counts = args.counts + row;
    selection.bits = args.bits + row * s.num_words;
    selection.flags = by_candidates ? work.flag(row) : nullptr;
    // More keys, and more of them between the bounds of a guess.
    const bool is_long = s.num_keys > 40000;
    error = is_long ? select_rows<HalfScores<8192>>(selection, some, s, floors, stream)
                    : select_rows<HalfScores<4096>>(selection, some, s, floors, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class Element, int kHeadDim>
cudaError_t launch_mean(const MeanMaskArgs& args, int num_sms, cudaStream_t stream) {
  using C = MeanConfig<Element, kHeadDim>;
  const ScoreArgs& s = args.scores;
  MeanWork work{};
  work.args = args;
  work.lines = static_cast<int>(mean_lines(s.num_rows, args.num_means));
  const int heads = s.batch * s.num_heads;
  auto* means = mean_queries_kernel<Element, kHeadDim>;
  means<<<heads * work.lines, 128, 128 * 8 * sizeof(float), stream>>>(work);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  take_keys_in_parts<C>(work, heads, kMostKeyParts, num_sms);
  work.summed_parts = work.parts;
  auto* sums = ranks_candidates(work) ? mean_sums_kernel<C, true> : mean_sums_kernel<C, false>;
  error = launch_pass<C>(sums, work, heads, stream);
  if (error != cudaSuccess) return error;
  work.last_first = true;
  if (args.ranks) return launch_ranked<C>(work, heads, num_sms, stream);

  auto* bits = args.num_means == 1 ? mean_bits_kernel<C, true> : mean_bits_kernel<C, false>;
  error = launch_pass<C>(bits, work, heads, stream);
  if (error != cudaSuccess || !args.keep_best) return error;
  return launch(keep_best_of_mean_kernel<Element>, heads * s.num_rows, kBestThreads, kBestBytes, stream, true, work);
}

template <class Element>
cudaError_t launch_widths(const MeanMaskArgs& args, int num_sms, cudaStream_t stream) {
  return args.scores.head_dim == 128 ? launch_mean<Element, 128>(args, num_sms, stream)
                                     : launch_mean<Element, 64>(args, num_sms, stream);
}

}  // namespace

const char* launch_mean_mask(const MeanMaskArgs& args, cudaStream_t stream) {
  int num_sms = 0;
  if (const char* refused = check_scores(args.scores, num_sms)) return refused;
  if (args.num_means < 1 || args.num_means > kMostMeans || (args.num_means & (args.num_means - 1)) != 0) {
    return "the kernel takes 1, 2, 4 or 8 means per row";
  }
  const cudaError_t error = args.scores.dtype == DType::kBFloat16 ? launch_widths<__nv_bfloat16>(args, num_sms, stream)
                                                                  : launch_widths<__half>(args, num_sms, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fgattn
