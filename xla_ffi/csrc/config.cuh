// Sizes of one instantiation of the attention kernel, and its shared memory.
#pragma once
#include <cstdint>

namespace fgattn {

// What one block of threads works on at a time.
enum class Form {
  kRow128,  // one row of 128 queries, a block an SM
  kPair64,  // two neighbouring rows of 64 queries on the union of their keys, a block an SM
  kRow64,   // one row of 64 queries, two blocks an SM
};

template <class Element_, int kHeadDim_, Form kForm>
struct Config {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kPaired = kForm == Form::kPair64;
  static constexpr int kBlocksPerSm = kForm == Form::kRow64 ? 2 : 1;
  static constexpr int kQueryBlock = kForm == Form::kRow128 ? 128 : 64;  // queries a row of the mask (M)
  static constexpr int kQueries = kForm == Form::kRow64 ? 64 : 128;      // queries a block of threads
  // A consumer holds queries, scores, weights and output in registers: as many keys as these allow. kRow64 has half of
  // the shared memory; pairs need words of kept bits, so a multiple of 32.
  static constexpr int kTileKeys = kForm == Form::kRow64    ? 64
                                   : kForm == Form::kPair64 ? (kHeadDim == 128 ? 64 : 96)
                                                            : (kHeadDim == 128 ? 96 : 144);

  // Warpgroups: one decodes, one gathers, the others consume, 64 queries each. Gathering takes issue slots from the
  // consumers' warps beside it, and the slowest warp sets a consumer's pace: four gathering warps, one on each
  // scheduler, cost less than two. Pairs and two blocks an SM leave registers for one producing warpgroup only.
  static constexpr bool kGatherApart = kForm == Form::kRow128;
  static constexpr int kProducers = kGatherApart ? 2 : 1;
  static constexpr int kConsumers = kQueries / 64;
  static constexpr int kThreads = (kProducers + kConsumers) * 128;
  static constexpr int kFirstGatherWarp = kGatherApart ? 4 : 2;
  static constexpr int kDecodeWarps = kPaired ? 1 : kFirstGatherWarp;
  static constexpr int kGatherThreads = (4 * kProducers - kFirstGatherWarp) * 32;
  // A block starts with 65536 / (kThreads * kBlocksPerSm) registers a thread, rounded down to 8, and shares them out.
  static constexpr int kDecodeRegisters = kPaired ? 88 : 72;
  static constexpr int kGatherRegisters = 40;
  static constexpr int kConsumerRegisters = kGatherApart ? 200 : kPaired ? 208 : 184;

  static constexpr int kQueryBytes = kQueries * kHeadDim * 2;
  static constexpr int kTileBytes = kTileKeys * kHeadDim * 2;
  static constexpr int kItems = 4;
  static constexpr int kListedKeys = kForm == Form::kRow64 ? 384 : kPaired ? 512 : 640;  // what decoders may be ahead
  static constexpr int kKeyLists = (kListedKeys + kTileKeys - 1) / kTileKeys;
  // An SM has 228 KiB for its blocks, each of which costs 1 KiB besides. Lists, items and barriers take below 3 KiB.
  static constexpr int kBlockBytes = kBlocksPerSm == 1 ? 227 * 1024 : 113 * 1024;
  static constexpr int kStages = (kBlockBytes - 3 * 1024 - kQueryBytes) / (2 * kTileBytes);
  // Tiles that may be under way between decoder and consumers, whose kept bits must not be overwritten.
  static constexpr int kKeptTiles = kPaired ? kKeyLists + kStages + 2 : 1;

  // A pair runs as one when the union of its keys is at most this share of the sum: 128 queries at a time run at 1.24
  // times the rate (docs/notes/cuda_kernel.md), which pays for the keys of one row that the other skips.
  static constexpr float kPairPays = 0.62f;
};

// A row, or the first of a pair of rows.
struct alignas(16) WorkItem {
  static constexpr int kNoMore = -1;
  int batch, head;
  int row;    // or kNoMore
  int count;  // keys to gather
};

template <class C>
struct alignas(1024) SharedMemory {
  char query[C::kQueryBytes];
  char tiles[C::kStages][2][C::kTileBytes];  // keys of a tile, values of the tile before it
  int lists[C::kKeyLists][C::kTileKeys];
  WorkItem items[C::kItems];
  uint32_t kept[C::kKeptTiles][C::kPaired ? 2 : 1]
               [C::kPaired ? C::kTileKeys / 32 : 1];  // which row keeps a tile's keys
  uint32_t too_high[C::kConsumers][2];  // number of the last tile, of odd and even ones, with too high a score
  uint64_t query_full, query_empty, voted[C::kConsumers];
  uint64_t tile_full[C::kStages], tile_empty[C::kStages];
  uint64_t list_full[C::kKeyLists], list_empty[C::kKeyLists];
  uint64_t item_full[C::kItems], item_empty[C::kItems];
};

}  // namespace fgattn
