// Masks of mean queries (FG-Attn, arXiv 2509.16518, section 5.2): the softmax of every mean over all keys, in two
// passes: one for its LSE, one for what becomes of the probabilities.
//
// A line is the mean of a row's queries, or of a part of them, in the queries' dtype. A block takes 256 lines of a
// head, half for each consumer, which hold them in registers, and a part of the keys; the LSE of a line comes from the
// parts. A consumer's scores come in two groups of 64 lines, as in scores.cuh, with its barriers: while the tensor
// cores make one, it looks at the other. Products take 128 keys: with 64 a call took 219 us instead of 206
// (docs/notes/mask_kernels.md). The means of a row with more than one are neighbours, and so are the lanes that have
// them.
#pragma once
#include <cstdint>

#include "masks/carry.cuh"
#include "masks/scores.cuh"
#include "masks/select_scores.cuh"
#include "softmax.cuh"

namespace fgattn {

template <class Element_, int kHeadDim_>
struct MeanConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileKeys = 128, kLines = kMeanLines, kConsumers = 2;
  static constexpr int kGroups = kLines / kConsumers / 64;  // of a consumer
  static constexpr int kScores = kTileKeys / 2;             // of a thread, in a group
  static constexpr int kThreads = 384;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kMeanBytes = kLines * kHeadDim * 2;
  static constexpr int kTileBytes = kTileKeys * kHeadDim * 2;
  static constexpr int kStages = kHeadDim == 128 ? 4 : 8;
};

template <class C>
struct alignas(1024) MeanMemory {
  char means[C::kMeanBytes];
  char tiles[C::kStages][C::kTileBytes];
  uint64_t means_full;
  uint64_t keys_full[C::kStages], keys_empty[C::kStages];
};

// What a block does.
struct MeanItem {
  int head;  // of batch * heads
  int first_line, part;
  int first_tile, step, num_tiles;  // step: 1 or -1
};

// Where the score of the last key that a row keeps is thought to lie (rank_kernel.cuh), in powers of two.
struct Band {
  float lower, width, lse;
};

struct MeanWork {
  MeanMaskArgs args;
  int lines;                 // of a head, up to a multiple of kMeanLines
  int first_head;            // of the pass
  int parts, tiles_of_part;  // of the keys, in this pass
  int summed_parts;          // parts of the pass that made the sums
  bool only_flagged;         // the pass is for rows whose flag is set
  bool last_first;           // the last keys of a part come first: a pass begins with what the one before left in L2

  template <class C>
  __device__ __forceinline__ MeanItem at(int block) const {
    const int tiles = lines / C::kLines, all = (args.scores.num_keys + C::kTileKeys - 1) / C::kTileKeys;
    const int part = block % parts, tile = block / parts % tiles, head = first_head + block / parts / tiles;
    const int first = min(part * tiles_of_part, all), number = min(tiles_of_part, all - first);
    return {head, tile * C::kLines, part, last_first ? first + number - 1 : first, last_first ? -1 : 1, number};
  }
  __host__ __device__ __forceinline__ int64_t heads() const {
    return int64_t{args.scores.batch} * args.scores.num_heads;
  }
  __device__ __forceinline__ char* means(int head) const {
    return reinterpret_cast<char*>(args.workspace) + 2 * int64_t{head} * lines * args.scores.head_dim;
  }
  // Reference and sum of a line's part of the keys, in powers of two.
  __device__ __forceinline__ float2* partial(int head, int line, int part) const {
    float2* first = reinterpret_cast<float2*>(args.workspace + heads() * lines * args.scores.head_dim / 2);
    return first + (int64_t{head} * lines + line) * kMostKeyParts + part;
  }
  __host__ __device__ __forceinline__ int32_t* probabilities() const {
    return args.workspace + heads() * lines * (args.scores.head_dim / 2 + 2 * kMostKeyParts);
  }
  // A row's sample: words of two scores, in powers of two as float16, four of each of so many whole tiles: tile t gives
  // sample t * sampled_share() >> 16, if the tile before it gives another one.
  __host__ __device__ __forceinline__ int sampled_share() const {
    constexpr int kMostTiles = kSampleWords / 4;
    const int tiles = args.scores.num_keys / 128;
    return tiles <= kMostTiles ? 1 << 16 : (kMostTiles << 16) / tiles;
  }
  __host__ __device__ __forceinline__ int sample_words() const {
    const int tiles = args.scores.num_keys / 128;
    return tiles == 0 ? 0 : 4 * ((tiles - 1) * sampled_share() >> 16) + 4;
  }
  __device__ __forceinline__ uint32_t* samples(int64_t row) const { return guesses() + row * kSampleWords; }
  __device__ __forceinline__ Band* band(int64_t row) const {
    return reinterpret_cast<Band*>(guesses() + rows() * kSampleWords) + row;
  }
  __host__ __device__ __forceinline__ int32_t* flag(int64_t row) const {
    return reinterpret_cast<int32_t*>(guesses() + rows() * (kGuessNumbers - 1)) + row;
  }
  __host__ __device__ __forceinline__ int64_t rows() const { return heads() * args.scores.num_rows; }
  __host__ __device__ __forceinline__ uint32_t* guesses() const {
    return reinterpret_cast<uint32_t*>(
        probabilities() + args.workspace_heads * (int64_t{args.scores.num_rows} * args.scores.num_words * 32 + 4));
  }
  // Keys that a row keeps by `top_k`.
  __device__ __forceinline__ int top_k() const {
    return min(max(args.rule.top_k, args.rule.min_keys), min(args.rule.max_keys, args.scores.num_keys));
  }
  // The share of a line in its row: parts without a query count as nothing.
  __device__ __forceinline__ float share(int line) const {
    const int of_part = args.scores.query_block / args.num_means, row = line / args.num_means;
    const int queries = min(args.scores.query_block, args.scores.num_queries - row * args.scores.query_block);
    const int present = (queries + of_part - 1) / of_part;
    return line % args.num_means < present ? 1.0f / present : 0.0f;
  }
  // What scores are measured from while they are added up: their maximum, as long as that is a number.
  __device__ __forceinline__ static float finite_or_zero(float x) { return fabsf(x) < INFINITY ? x : 0.0f; }
  // LSE of a line over all keys, in powers of two.
  __device__ __forceinline__ float lse(int head, int line) const {
    float most = -INFINITY, sum = 0;
    for (int part = 0; part < summed_parts; ++part) most = fmaxf(most, partial(head, line, part)->x);
    for (int part = 0; part < summed_parts; ++part) {
      const float2 some = *partial(head, line, part);
      sum += some.y * ptx::exp2(some.x - finite_or_zero(most));
    }
    return finite_or_zero(most) + ptx::log2(sum);
  }
};

// One block a line: its mean; zeros behind the last. And zeros to the counts that mean_bits_kernel adds to.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(128) mean_queries_kernel(const __grid_constant__ MeanWork work) {
  constexpr int kChunks = kHeadDim / 8, kAtOnce = 128 / kChunks, kLoads = 8;  // queries; 16 bytes a thread
  extern __shared__ __align__(16) float sums[];                               // [kAtOnce, H]
  ptx::wait_for_kernels_before();  // for the next one's sake; this one begins the chain
  const ScoreArgs& args = work.args.scores;
  // Blocks that run together read neighbours: queries of a token lie head by head.
  const int heads = static_cast<int>(work.heads()), head = blockIdx.x % heads, line = blockIdx.x / heads;
  const int batch = head / args.num_heads, of_batch = head % args.num_heads;
  const int mine = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const Element* queries =
      static_cast<const Element*>(args.query) + batch * args.query_strides.batch + of_batch * args.query_strides.head;
  const int32_t* order = args.query_order == nullptr ? nullptr
                                                     : args.query_order + batch * args.query_order_strides.batch +
                                                           of_batch * args.query_order_strides.head;
  if (threadIdx.x == 0 && line < args.num_rows) work.args.counts[head * args.num_rows + line] = 0;
  const int of_line = args.query_block / work.args.num_means;
  const int first = min(line * of_line, args.num_queries), last = min(first + of_line, args.num_queries);
  float sum[8] = {};
  for (int next = first + mine; next < last; next += kLoads * kAtOnce) {
    // Loads that depend on nothing: many are under way at a time.
    uint4 raw[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int position = min(next + i * kAtOnce, last - 1);
      const int token = min(max(order == nullptr ? position : __ldg(order + position), 0), args.num_queries - 1);
      raw[i] = __ldg(reinterpret_cast<const uint4*>(queries + token * args.query_strides.token) + chunk);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t pairs[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w}, inside = next + i * kAtOnce < last ? ~0u : 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] += ptx::unpack<Element>(pairs[j / 2] & inside, j % 2);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[mine * kHeadDim + 8 * chunk + i] = sum[i];
  __syncthreads();
  uint32_t* means = reinterpret_cast<uint32_t*>(work.means(head) + 2 * int64_t{line} * kHeadDim);
  for (int pair = threadIdx.x; pair < kHeadDim / 2; pair += 128) {
    float mean[2] = {0, 0};
    for (int i = 0; i < kAtOnce; ++i) {
      mean[0] += sums[i * kHeadDim + 2 * pair], mean[1] += sums[i * kHeadDim + 2 * pair + 1];
    }
    const float share = last > first ? 1.0f / (last - first) : 0.0f;
    means[pair] = ptx::pack<Element>(mean[0] * share, mean[1] * share);
  }
}

template <class C>
__device__ __forceinline__ void produce_means(MeanMemory<C>& shared, const MeanWork& work, const MeanItem& item,
                                              int thread) {
  const ScoreArgs& args = work.args.scores;
  const int line = thread / 8, chunk = thread % 8;
  const uint32_t place = line * kPanelLineBytes + ((chunk ^ (line % 8)) * 16);
  // As keys are copied: means are lines of H numbers, one behind the other.
  const char* lines = work.means(item.head) + 2 * int64_t{item.first_line} * C::kHeadDim + chunk * 16;
  start_keys<C::kHeadDim, C::kLines>(ptx::shared_address(shared.means) + place, lines, C::kHeadDim, 0, C::kLines, line);
  ptx::copy_async_arrive(ptx::shared_address(&shared.means_full));
  const int batch = item.head / args.num_heads, kv = item.head % args.num_heads / (args.num_heads / args.num_kv_heads);
  const char* keys = static_cast<const char*>(args.key) + chunk * 16 +
                     2 * (batch * args.key_strides.batch + kv * args.key_strides.head);
  const uint32_t tiles = ptx::shared_address(shared.tiles) + place;
  const uint32_t full = ptx::shared_address(shared.keys_full), empty = ptx::shared_address(shared.keys_empty);
  Stage<C::kStages> stage;
  int first_key = item.first_tile * C::kTileKeys;
#pragma unroll 1
  for (int left = item.num_tiles; left > 0; --left) {
    ptx::barrier_wait(empty + 8 * stage.slot(), stage.phase() ^ 1);
    start_keys<C::kHeadDim, C::kTileKeys>(tiles + stage.slot() * C::kTileBytes, keys, args.key_strides.token, first_key,
                                          args.num_keys, line);
    ptx::copy_async_arrive(full + 8 * stage.slot());
    stage.advance();
    first_key += item.step * C::kTileKeys;
  }
}

// look(group, first_key, scores) for every tile and group of a consumer that has lines below num_lines:
// scores[4 c + 2 line + b] is that of key first_key + 8 c + 2 (lane % 4) + b with line lane / 4 + 8 line of the warp in
// its group of 64.
template <class C, class Look>
__device__ __forceinline__ void score_means(MeanMemory<C>& shared, const MeanItem& item, int num_lines, int consumer,
                                            int thread, Look look) {
  constexpr int kSums = C::kHeadDim / 16;
  static_assert(C::kGroups == 2);
  const int warp = thread / kWarp, lane = thread % kWarp;
  const uint32_t full = ptx::shared_address(shared.keys_full), empty = ptx::shared_address(shared.keys_empty);
  const uint32_t tiles = ptx::shared_address(shared.tiles);
  Stage<C::kStages> stage;
  auto wait_keys = [&] {
    ptx::barrier_wait(full + 8 * stage.slot(), stage.phase());
    ptx::fence_async_proxy();
    return tiles + stage.slot() * C::kTileBytes;
  };
  if (item.first_line + consumer * C::kGroups * 64 >= num_lines) {
    // Nothing to do but to give tiles back.
    for (int left = item.num_tiles; left > 0; --left) {
      wait_keys();
      arrive_warp(empty + 8 * stage.slot(), lane);
      stage.advance();
    }
    return;
  }
  uint32_t means[C::kGroups][kSums][4];
  ptx::barrier_wait(ptx::shared_address(&shared.means_full), 0);
#pragma unroll
  for (int group = 0; group < C::kGroups; ++group) {
    const int line = (consumer * C::kGroups + group) * 64 + 16 * warp + lane % 16;
    const uint32_t at = ptx::shared_address(shared.means) + line * kPanelLineBytes;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      const int chunk = k % 4 * 2 + lane / 16;
      ptx::load_matrices(means[group][k], at + k / 4 * C::kLines * kPanelLineBytes + ((chunk ^ (line % 8)) * 16));
    }
  }
  __syncwarp();
  if (item.num_tiles <= 0) return;
  float scores[2][C::kScores];
  auto start = [&](int group, uint32_t tile) {
    const Descriptor keys(tile, 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      Wgmma<typename C::Element, C::kTileKeys>::times_transposed(
          scores[group], means[group][k], keys.at(k / 4 * C::kTileKeys * kPanelLineBytes + k % 4 * 32), k > 0);
    }
    wgmma_commit();
  };
  uint32_t here = wait_keys();
  start(0, here);
  start(1, here);
  wgmma_wait<1>();
  int first_key = item.first_tile * C::kTileKeys;
  look(0, first_key, scores[0]);
#pragma unroll 1
  for (int left = item.num_tiles - 1; left > 0; --left) {
    const int slot_before = stage.slot();
    stage.advance();
    here = wait_keys();
    wgmma_wait<0>();
    arrive_warp(empty + 8 * slot_before, lane);
    start(0, here);
    look(1, first_key, scores[1]);
    first_key += item.step * C::kTileKeys;
    start(1, here);
    wgmma_wait<1>();
    look(0, first_key, scores[0]);
  }
  wgmma_wait<0>();
  look(1, first_key, scores[1]);
}

// The whole of a pass: look(item, line, scorer), with `line` the thread's first one in its first group, calls
// scorer(what to do with scores).
template <class C, class Look>
__device__ __forceinline__ void pass_over_keys(const MeanWork& work, Look look) {
  extern __shared__ __align__(1024) char raw[];
  MeanMemory<C>& shared = *reinterpret_cast<MeanMemory<C>*>(raw);
  if (threadIdx.x == 0) {
    ptx::barrier_init(ptx::shared_address(&shared.means_full), 128);
    for (int i = 0; i < C::kStages; ++i) {
      ptx::barrier_init(ptx::shared_address(shared.keys_full) + 8 * i, 128);
      ptx::barrier_init(ptx::shared_address(shared.keys_empty) + 8 * i, 4 * C::kConsumers * kArrivalsPerWarp);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  ptx::wait_for_kernels_before();
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0), thread = threadIdx.x % 128;
  const MeanItem item = work.template at<C>(blockIdx.x);
  if (warpgroup == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    produce_means<C>(shared, work, item, thread);
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    const int line = item.first_line + (warpgroup - 1) * C::kGroups * 64 + thread / kWarp * 16 + thread % kWarp / 4;
    const int num_lines = work.args.scores.num_rows * work.args.num_means;
    look(item, line, [&](auto at) { score_means<C>(shared, item, num_lines, warpgroup - 1, thread, at); });
  }
}

constexpr float kLog2E = 1.4426950408889634f;

// Leaves two of a thread's scores for each of its lines, from other columns in other tiles and lanes, and none of
// neighbours, whose scores are alike.
template <class C>
__device__ __forceinline__ void take_sample(const MeanWork& work, int head, int first_line, int first_key, float factor,
                                            const float (&scores)[C::kScores]) {
  const int tile = first_key / C::kTileKeys, share = work.sampled_share(), quad = threadIdx.x % 4;
  const int number = tile * share >> 16;
  if (tile > 0 && number == (tile - 1) * share >> 16) return;
  const uint32_t choice = tile * 2654435761u >> (20 + 2 * quad);
#pragma unroll
  for (int line = 0; line < 2; ++line) {
    const auto of_block = [&](int block, int i) { return scores[4 * block + 2 * line + i]; };
    const float low = (choice & 1) != 0 ? of_block(1, 0) : of_block(6, 1);
    const float high = (choice & 2) != 0 ? of_block(11, 0) : of_block(12, 1);
    const int row = first_line + 8 * line;
    if (row >= work.args.scores.num_rows) continue;
    work.samples(int64_t{head} * work.args.scores.num_rows + row)[4 * number + quad] =
        ptx::pack<__half>(low * factor, high * factor);
  }
}

// First pass: a reference, and the sum of 2^(score - reference), of the line's scores in a part of the keys. Of every
// thread the reference is the maximum of its first tile; later ones are not searched for theirs, unless a sum shows
// that a score stood far above the reference (as in softmax.cuh).
template <class C, bool kSampled>
__global__ void __launch_bounds__(C::kThreads, 1) mean_sums_kernel(const __grid_constant__ MeanWork work) {
  pass_over_keys<C>(work, [&](const MeanItem& item, int first_line, auto score) {
    const int lane = threadIdx.x % kWarp, num_keys = work.args.scores.num_keys;
    const float factor = kLog2E * __ldg(work.args.scores.scale);
    float most[C::kGroups][2], sum[C::kGroups][2];
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
      most[group][0] = most[group][1] = -INFINITY, sum[group][0] = sum[group][1] = 0;
    }
    score([&](int group, int first_key, float (&scores)[C::kScores]) {
      constexpr float kMostSum = 0x1p60f;
      const int left = num_keys - first_key;
      if (kSampled && left >= C::kTileKeys)
        take_sample<C>(work, item.head, first_line + 64 * group, first_key, factor, scores);
      float total[2][2];
#pragma unroll
      for (int i = 0; i < C::kScores; ++i) {
        const float weight = ptx::exp2(fmaf(scores[i], factor, -most[group][i / 2 % 2]));
        float& mine = total[i / 2 % 2][i % 2];
        mine = i < 4 ? weight : mine + weight;
      }
      const float more[2] = {total[0][0] + total[0][1], total[1][0] + total[1][1]};
      const bool good = left >= C::kTileKeys && more[0] <= kMostSum && more[1] <= kMostSum;
      if (__all_sync(kAllLanes, good)) {
        sum[group][0] += more[0], sum[group][1] += more[1];
        return;
      }
#pragma unroll
      for (int i = 0; i < C::kScores; ++i) {
        const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        scores[i] = column < left ? scores[i] * factor : -INFINITY;
      }
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        float here = most[group][line];
#pragma unroll
        for (int i = 2 * line; i < C::kScores; i += 4) here = fmaxf(here, fmaxf(scores[i], scores[i + 1]));
        // A thread whose columns all lie behind the last key has seen none yet.
        const float shift = MeanWork::finite_or_zero(here);
        float all = sum[group][line] * ptx::exp2(most[group][line] - shift);
#pragma unroll
        for (int i = 2 * line; i < C::kScores; i += 4) {
          all += ptx::exp2(scores[i] - shift) + ptx::exp2(scores[i + 1] - shift);
        }
        most[group][line] = here, sum[group][line] = all;
      }
    });
#pragma unroll
    for (int i = 0; i < 2 * C::kGroups; ++i) {
      float &largest = most[i / 2][i % 2], &total = sum[i / 2][i % 2];
      for (int distance = 1; distance < 4; distance *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, largest, distance);
        const float theirs = __shfl_xor_sync(kAllLanes, total, distance), here = fmaxf(largest, other);
        const float shift = MeanWork::finite_or_zero(here);
        total = total * ptx::exp2(largest - shift) + theirs * ptx::exp2(other - shift);
        largest = here;
      }
      if (lane % 4 == 0)
        *work.partial(item.head, first_line + 64 * (i / 2) + 8 * (i % 2), item.part) = {largest, total};
    }
  });
}

}  // namespace fgattn
