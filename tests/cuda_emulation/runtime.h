// Inside of the emulation: fibers, what they wait for, and what runs beside them. One CPU thread, so no locks.
//
// Order of memory accesses is tracked with vector clocks: row t of `Cta::clocks` is what thread t knows of every other
// thread's progress. Arrivals hand a row on, waits take it up. A product may only read what a copy wrote before
// something the reading thread knows of, and a copy may only overwrite what products read before that: both are
// checked at every access, so that a missing wait is found whatever the order of this run.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulation.h"

namespace emulation {

constexpr uint32_t kUnknown = 0xFFFFFFFFu;     // a clock that nobody knows yet
constexpr uint32_t kPoison = 0x7F80DEADu;      // what registers of a product hold while it runs: a signalling NaN,
                                               // which every operation turns into another one
constexpr uint32_t kFirstShared = 1024;        // address of the dynamic shared memory: not 0, as on the device
constexpr int kGranule = 16;                   // bytes of a copy: what is tracked as one

using Clock = std::vector<uint32_t>;

class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed * 0x9E3779B97F4A7C15ull + 0x1234567) {}
  uint32_t next() {
    state_ += 0x9E3779B97F4A7C15ull;
    uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return static_cast<uint32_t>((x ^ (x >> 31)) >> 16);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(uint64_t{next()} * n >> 32); }
  bool one_in(uint32_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

struct Fiber {
  void* context = nullptr;
  char* stack = nullptr;
  bool done = false;
  Site site{"", 0};          // of the instruction it is in
  const char* what = "";     // it waits for, or null while it can run
  uint32_t detail[2] = {0, 0};
  bool see_async = false;    // waited for copies, no proxy fence since
  bool fenced = false;       // wgmma.fence since the last wait
};

// Registers that products of one warp write while they run: 16 rows, `columns` wide.
struct Accumulator {
  std::vector<float> sums;
  float* registers[32];
  int columns;
  uint32_t loaded = 0;  // lanes whose registers are in here
  size_t last_product;
};

struct Product {
  uint64_t a, b;  // operands in memory; 0 for an A in registers
  bool accumulate, transposed, half;
  int columns;
  uint32_t arrived = 0, retired = 0;  // lanes
  uint32_t fragment[32][4];
  const uint32_t* registers[32];
  Accumulator* sums;
  Site site;
};

struct Warp {
  uint32_t ready = 0, live = 0;
  // the collective under way
  uint32_t arrived = 0, waiting = 0;
  Collective kind = kSyncWarp;
  Site site{"", 0};
  uint32_t generation = 0;
  uint32_t values[2][32];
  int registers = 0;  // a thread
  // products, numbered from 0; those before `first_product` are over in all lanes
  std::deque<Product> products;
  std::deque<Accumulator> accumulators;
  size_t first_product = 0, executed = 0;
  size_t lane_products[32] = {}, lane_groups[32] = {};
  std::vector<size_t> group_end;
  uint32_t product_waiters = 0;
  uint32_t priority = 0;
};

struct Barrier {
  int number;  // in the order of initialisation
  int count, pending;
  uint32_t phases = 0;  // completed
  bool copies = false, copies_before = false;  // the phase under way / completed has arrivals of copies
  Clock gathering, completed;
  std::vector<int> waiters;
  Site site;
};

struct BlockBarrier {
  int arrived = 0;
  uint32_t generation = 0;
  Clock clock;
  std::vector<int> waiters;
};

struct Copy {
  uint32_t to;  // a barrier's address for an arrival
  const char* from;  // null: an arrival
  Clock clock;
};

struct Granule {
  int writer = -1;
  uint32_t segment = 0;
  bool in_flight = false;
};

struct Cta {
  int block = 0, threads = 0;
  size_t shared_bytes = 0;
  char* shared = nullptr;
  std::vector<char> storage;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  uint32_t ready_warps = 0, product_warps = 0;
  int live = 0;
  int free_registers = 0;
  std::vector<int> register_waiters;
  std::unordered_map<uint32_t, Barrier> barriers;
  BlockBarrier block_barrier;
  std::vector<uint32_t> clocks;                        // [threads, threads]
  std::vector<std::vector<uint32_t>> segment_clocks;   // of a thread's copies up to its next arrival
  std::vector<Granule> granules;
  std::vector<uint32_t> reads;  // [granules, warps]: clock of the warp's first lane when its last read was over
  std::vector<std::deque<Copy>> copies;  // of each thread
  std::vector<int> copying;              // threads that have some
  // how this stretch of the run is drawn
  uint32_t async_odds = 1;
  int steps_left = 0;

  uint32_t* clock(int thread) { return clocks.data() + static_cast<size_t>(thread) * threads; }
};

extern Random rng;
extern Cta* cta;    // of the fiber that runs
extern int thread;  // in `cta`

Fiber& fiber();
void wake(Cta& c, int thread);
void wake_lanes(Cta& c, int warp, uint32_t lanes);
// Lets others run until somebody wakes this fiber; the caller looks again at what it waits for.
void block(const char* what, Site site, uint32_t detail0 = 0, uint32_t detail1 = 0);
void join(uint32_t* into, const uint32_t* from, int n);
void join_warp(Cta& c, int warp);

void arrive_at(Cta& c, uint32_t address, const uint32_t* clock, bool from_copy, Site site);
void land_some_copy(Cta& c);
void execute_some_product(Cta& c);
char* at_shared(Cta& c, uint32_t address, uint32_t bytes, uint32_t alignment, Site site);
void check_landed(Cta& c, uint32_t address, const char* what, Site site);
void reads_are_over(Cta& c, int warp, const Product& p, uint32_t clock);
void reads_begin(Cta& c, int warp, const Product& p, Site site);
std::string describe_waits(Cta& c);

}  // namespace emulation
