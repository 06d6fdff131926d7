// Sizes of one instantiation of the attention kernel, and its shared memory.
#pragma once
#include <cstdint>

namespace fgattn {

#ifndef FG_TILE128
#define FG_TILE128 128
#endif
#ifndef FG_SLOTS
#define FG_SLOTS 0
#endif
#ifndef FG_PROD
#define FG_PROD 1
#endif
#ifndef FG_R0
#define FG_R0 56
#define FG_R2 224
#endif

template <class Element_, int kHeadDim_, int kQueryBlock_>
struct Config {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kQueryBlock = kQueryBlock_;
  static constexpr int kConsumers = kQueryBlock / 64;
  static constexpr int kBlocksPerSm = kQueryBlock == 128 ? 1 : 2;
  static constexpr int kProducers = kQueryBlock == 128 ? FG_PROD : 1;
  static constexpr int kThreads = (kProducers + kConsumers) * 128;
  static constexpr int kFirstGatherWarp = kProducers == 2 ? 4 : 2;
  static constexpr int kGatherThreads = kProducers == 2 ? 128 : 64;
  static constexpr int kTileKeys = kQueryBlock == 128 ? FG_TILE128 : 64;

  static constexpr int kQueryBytes = kQueryBlock * kHeadDim * 2;
  static constexpr int kTileBytes = kTileKeys * kHeadDim * 2;
  static constexpr int kKeyLists = 4;
  static constexpr int kItems = 4;
  // Of 227 KiB an SM, 1 KiB less for each block: what is left of 6 KiB holds lists, items and barriers.
  static constexpr int kStages = FG_SLOTS ? FG_SLOTS : (kBlocksPerSm == 1 ? 226 * 1024 - kQueryBytes : 110 * 1024 - kQueryBytes) / (2 * kTileBytes);

  static constexpr int kProducerRegisters = kQueryBlock == 128 ? FG_R0 : 56;
  static constexpr int kConsumerRegisters = kQueryBlock == 128 ? FG_R2 : 200;
};

struct WorkItem {
  int batch, head, row;  // row -1: no more work
  int count;
};

template <class C>
struct alignas(1024) SharedMemory {
  char query[C::kQueryBytes];
  char tiles[C::kStages][2][C::kTileBytes];  // keys of a tile, values of the tile before it
  int lists[C::kKeyLists][C::kTileKeys];
  WorkItem items[C::kItems];
  uint64_t query_full, query_empty;
  uint64_t tile_full[C::kStages], key_empty[C::kStages], value_empty[C::kStages];
  uint64_t list_full[C::kKeyLists], list_empty[C::kKeyLists];
  uint64_t item_full[C::kItems], item_empty[C::kItems];
};

}  // namespace fgattn
