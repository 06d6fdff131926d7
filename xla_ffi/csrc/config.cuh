// Sizes of one instantiation of the attention kernel, and its shared memory.
#pragma once
#include <cstdint>

namespace fgattn {

#ifndef FG_TILE128
#define FG_TILE128 128
#endif
#ifndef FG_STAGES
#define FG_STAGES 0
#endif
#ifndef FG_PROD
#define FG_PROD 1
#endif
#ifndef FG_PAIR
#define FG_PAIR 0.74f
#endif
#ifndef FG_R0
#define FG_R0 56
#define FG_R2 224
#endif

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
  static constexpr int kConsumers = kQueries / 64;
  static constexpr int kProducers = kForm == Form::kRow64 ? 1 : FG_PROD;
  static constexpr int kThreads = (kProducers + kConsumers) * 128;
  static constexpr int kFirstGatherWarp = kProducers == 2 ? 4 : 2;
  static constexpr int kGatherThreads = kProducers == 2 ? 128 : 64;
  static constexpr int kTileKeys = kForm == Form::kRow64 ? 64 : FG_TILE128;

  static constexpr int kQueryBytes = kQueries * kHeadDim * 2;
  static constexpr int kTileBytes = kTileKeys * kHeadDim * 2;
  static constexpr int kItems = 4;
  static constexpr int kKeyLists = 4;
  // An SM has 228 KiB for its blocks, each of which costs 1 KiB; a block may have 227. Lists, items, barriers: < 3 KiB.
  static constexpr int kBlockBytes = kBlocksPerSm == 1 ? 227 * 1024 : 113 * 1024;
  static constexpr int kStages = FG_STAGES ? FG_STAGES : (kBlockBytes - 3 * 1024 - kQueryBytes) / (2 * kTileBytes);
  // Tiles that may be under way between decoder and consumers, whose kept bits must not be overwritten.
  static constexpr int kKeptTiles = kPaired ? kKeyLists + kStages + 2 : 1;

  // A pair runs as one when the union of its keys is at most this share of the sum: below, tiles of 128 queries at their
  // higher rate win over fewer keys.
  static constexpr float kPairPays = FG_PAIR;

  static constexpr int kProducerRegisters = kForm == Form::kRow128 ? FG_R0 : kPaired ? 72 : 56;
  static constexpr int kConsumerRegisters = kForm == Form::kRow128 ? FG_R2 : kPaired ? 216 : 200;
};

// A row, or the first of a pair of rows.
struct alignas(16) WorkItem {
  static constexpr int kNoMore = -1;
  int head;   // batch * num_heads + head
  int row;    // or kNoMore
  int count;  // keys to gather
  int unused;
};

template <class C>
struct alignas(1024) SharedMemory {
  char query[C::kQueryBytes];
  char tiles[C::kStages][2][C::kTileBytes];  // keys of a tile, values of the tile before it
  int lists[C::kKeyLists][C::kTileKeys];
  WorkItem items[C::kItems];
  uint32_t kept[C::kKeptTiles][C::kPaired ? 2 : 1][C::kPaired ? C::kTileKeys / 32 : 1];  // which rows keep a tile's keys
  uint64_t query_full, query_empty;
  uint64_t tile_full[C::kStages], key_empty[C::kStages], value_empty[C::kStages];
  uint64_t list_full[C::kKeyLists], list_empty[C::kKeyLists];
  uint64_t item_full[C::kItems], item_empty[C::kItems];
};

}  // namespace fgattn
