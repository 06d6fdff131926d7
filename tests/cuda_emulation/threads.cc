// Fibers and their schedule, collectives of a warp, barriers of a block.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <stdexcept>

#include "fiber.h"
#include "runtime.h"

namespace emulation {

ThreadView view;
int num_sms = 1;
size_t most_dynamic_shared = 48 * 1024;
Random rng;
Cta* cta = nullptr;
int thread = 0;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr uint64_t kCanary = 0xC0FFEE0DDBA11ull;

std::string message;
bool failed = false;
void* scheduler = nullptr;
const std::function<void()>* body = nullptr;
unsigned threads_in_block = 0, blocks_in_grid = 0;

struct Stacks {
  std::vector<std::unique_ptr<char[]>> all;
  std::vector<char*> free;
  char* take() {
    if (free.empty()) {
      all.emplace_back(new char[kStackBytes]);
      free.push_back(all.back().get());
    }
    char* stack = free.back();
    free.pop_back();
    std::memcpy(stack, &kCanary, 8);
    return stack;
  }
} stacks;

void enter() {
  (*body)();
  fiber().done = true;
  switch_context(&fiber().context, scheduler);
}

void start(Cta& c, int block, unsigned threads, size_t shared_bytes) {
  c.block = block;
  c.threads = threads;
  c.shared_bytes = shared_bytes;
  c.storage.assign(shared_bytes + 1024, static_cast<char>(0xFF));
  c.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(c.storage.data()) + 1023) & ~uintptr_t{1023});
  const int num_warps = (threads + 31) / 32;
  c.fibers.resize(threads);
  c.warps.resize(num_warps);
  c.clocks.assign(static_cast<size_t>(threads) * threads, 0);
  c.segment_clocks.resize(threads);
  c.copies.resize(threads);
  c.granules.resize(shared_bytes / kGranule + 1);
  c.reads.assign(c.granules.size() * num_warps, 0);
  c.live = threads;
  // Blocks share an SM as far as their shared memory lets them, and get the registers that __launch_bounds__ says.
  const int blocks_per_sm = std::max<int>(1, std::min<size_t>(2, 228 * 1024 / (shared_bytes + 1024)));
  const int registers = std::min(248, 65536 / blocks_per_sm / static_cast<int>(threads) / 8 * 8);
  c.free_registers = 0;
  for (unsigned t = 0; t < threads; ++t) {
    c.clock(t)[t] = 1;
    c.fibers[t].stack = stacks.take();
    c.fibers[t].context = make_context(c.fibers[t].stack, kStackBytes, enter);
    Warp& w = c.warps[t / 32];
    w.ready |= 1u << t % 32, w.live |= 1u << t % 32;
    w.registers = registers;
  }
  c.ready_warps = num_warps == 32 ? ~0u : (1u << num_warps) - 1;
}

void finish(Cta& c) {
  for (Fiber& f : c.fibers) {
    uint64_t canary;
    std::memcpy(&canary, f.stack, 8);
    stacks.free.push_back(f.stack);
    free_context(f.context);
    if (canary != kCanary && !failed) throw std::runtime_error("emulation: a fiber's stack is too small");
  }
  c.fibers.clear();
}

void resume(Cta& c, int t) {
  cta = &c;
  thread = t;
  view = ThreadView{{static_cast<unsigned>(t), 0, 0},
                    {static_cast<unsigned>(c.block), 0, 0},
                    {threads_in_block, 1, 1},
                    {blocks_in_grid, 1, 1}};
  switch_context(&scheduler, c.fibers[t].context);
  cta = nullptr;
  if (failed) throw std::runtime_error(message);
  if (c.fibers[t].done) {
    Warp& w = c.warps[t / 32];
    w.ready &= ~(1u << t % 32), w.live &= ~(1u << t % 32);
    if (w.ready == 0) c.ready_warps &= ~(1u << t / 32);
    --c.live;
  }
}

void draw_stretch(Cta& c) {
  static constexpr uint32_t kOdds[] = {1, 4, 32, 1u << 30};  // 1: everything lands at once; last: as late as can be
  c.async_odds = kOdds[rng.below(4)];
  c.steps_left = 64 << rng.below(8);
  for (Warp& w : c.warps) w.priority = rng.next();
}

// Runs one fiber to its next wait, or something beside them. False: nothing can.
bool step(Cta& c) {
  if (--c.steps_left < 0) draw_stretch(c);
  const bool beside = !c.copying.empty() || c.product_warps != 0;
  if (beside && (c.ready_warps == 0 || rng.one_in(c.async_odds))) {
    const bool copy = c.product_warps == 0 || (!c.copying.empty() && !rng.one_in(4));
    if (copy) land_some_copy(c);
    else execute_some_product(c);
    return true;
  }
  if (c.ready_warps == 0) return false;
  int chosen = -1;
  if (rng.one_in(8)) {
    const int skip = rng.below(__builtin_popcount(c.ready_warps));
    uint32_t left = c.ready_warps;
    for (int i = 0; i < skip; ++i) left &= left - 1;
    chosen = __builtin_ctz(left);
  } else {
    for (uint32_t left = c.ready_warps; left != 0; left &= left - 1) {
      const int w = __builtin_ctz(left);
      if (chosen < 0 || c.warps[w].priority > c.warps[chosen].priority) chosen = w;
    }
  }
  const uint32_t ready = c.warps[chosen].ready;
  const int turn = rng.below(32);
  const uint32_t turned = ready >> turn | (turn == 0 ? 0 : ready << (32 - turn));
  resume(c, chosen * 32 + (__builtin_ctz(turned) + turn) % 32);
  return true;
}

void check_end(Cta& c) {
  for (const auto& queue : c.copies) {
    if (!queue.empty()) throw std::runtime_error("the block ended with copies on their way");
  }
  for (const Warp& w : c.warps) {
    if (!w.products.empty()) throw std::runtime_error("the block ended with matrix products that nobody waited for");
  }
}

}  // namespace

void reset_threads(uint64_t seed) {
  rng = Random(seed);
  failed = false;
  message.clear();
  most_dynamic_shared = 48 * 1024;
}

const char* error() { return failed ? message.c_str() : nullptr; }

void Launch::run(const std::function<void()>& kernel) const {
  if (failed) return;
  body = &kernel;
  threads_in_block = threads_, blocks_in_grid = blocks_;
  std::vector<std::unique_ptr<Cta>> running;
  try {
    if (threads_ == 0 || threads_ > 1024 || blocks_ == 0) throw std::runtime_error("launch: no such block or grid");
    if (shared_bytes_ > most_dynamic_shared) throw std::runtime_error("launch: more shared memory than permitted");
    size_t next = 0;
    constexpr size_t kResident = 3;
    while (next < blocks_ || !running.empty()) {
      while (next < blocks_ && running.size() < kResident) {
        running.push_back(std::make_unique<Cta>());
        start(*running.back(), next++, threads_, shared_bytes_);
      }
      const size_t chosen = rng.below(running.size());
      Cta& c = *running[chosen];
      for (int steps = 1 << (6 + rng.below(10)); steps > 0 && c.live > 0; --steps) {
        if (!step(c)) throw std::runtime_error("deadlock: " + describe_waits(c));
      }
      if (c.live > 0) continue;
      while (!c.copying.empty()) land_some_copy(c);
      check_end(c);
      finish(c);
      running.erase(running.begin() + chosen);
    }
  } catch (const std::exception& e) {
    if (!failed) message = e.what();
    failed = true;
    for (auto& c : running) finish(*c);
  }
}

void fail(Site site, const char* format, ...) {
  char text[1024];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  std::string file = site.file;
  file = file.substr(file.find_last_of('/') + 1);
  message = std::string(text) + " (" + file + ":" + std::to_string(site.line);
  if (cta != nullptr) {
    message += ", block " + std::to_string(cta->block) + ", warp " + std::to_string(thread / 32) + ", lane " +
               std::to_string(thread % 32);
  }
  message += ")";
  if (cta == nullptr) throw std::runtime_error(message);
  failed = true;
  switch_context(&fiber().context, scheduler);
  __builtin_unreachable();
}

Fiber& fiber() { return cta->fibers[thread]; }

void wake(Cta& c, int t) { wake_lanes(c, t / 32, 1u << t % 32); }

void wake_lanes(Cta& c, int warp, uint32_t lanes) {
  c.warps[warp].ready |= lanes;
  if (lanes != 0) c.ready_warps |= 1u << warp;
}

void block(const char* what, Site site, uint32_t detail0, uint32_t detail1) {
  Fiber& f = fiber();
  f.what = what, f.site = site, f.detail[0] = detail0, f.detail[1] = detail1;
  Warp& w = cta->warps[thread / 32];
  w.ready &= ~(1u << thread % 32);
  if (w.ready == 0) cta->ready_warps &= ~(1u << thread / 32);
  switch_context(&f.context, scheduler);
}

void maybe_yield() {
  if (rng.one_in(16)) switch_context(&fiber().context, scheduler);
}

std::string describe_waits(Cta& c) {
  std::string text;
  for (size_t w = 0; w < c.warps.size(); ++w) {
    for (uint32_t lanes = c.warps[w].live; lanes != 0;) {
      const Fiber& f = c.fibers[w * 32 + __builtin_ctz(lanes)];
      uint32_t same = 0;
      for (uint32_t left = lanes; left != 0; left &= left - 1) {
        const Fiber& g = c.fibers[w * 32 + __builtin_ctz(left)];
        if (g.what == f.what && g.site.line == f.site.line && g.detail[0] == f.detail[0]) same |= left & -left;
      }
      lanes &= ~same;
      std::string file = f.site.file;
      text += "\n  warp " + std::to_string(w) + ", " + std::to_string(__builtin_popcount(same)) + " lanes: " + f.what;
      char detail[96] = "";
      if (const auto found = c.barriers.find(f.detail[0]); found != c.barriers.end()) {
        const Barrier& b = found->second;
        snprintf(detail, sizeof detail, " %d, parity %u, %d of %d to come, %u phases over", b.number, f.detail[1],
                 b.pending, b.count, b.phases);
      } else if (f.detail[1] != 0) {
        snprintf(detail, sizeof detail, " %u of %u threads", f.detail[0], f.detail[1]);
      }
      text += std::string(detail) + " at " + file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(f.site.line);
    }
  }
  return "block " + std::to_string(c.block) + " cannot go on" + text;
}

void join(uint32_t* __restrict__ into, const uint32_t* __restrict__ from, int n) {
  for (int i = 0; i < n; ++i) into[i] = into[i] < from[i] ? from[i] : into[i];
}

void join_warp(Cta& c, int warp) {
  const int first = warp * 32;
  Clock all(c.threads, 0);
  for (int i = 0; i < 32; ++i) ++c.clock(first + i)[first + i], join(all.data(), c.clock(first + i), c.threads);
  for (int i = 0; i < 32; ++i) {
    std::memcpy(c.clock(first + i), all.data(), 4 * c.threads);
  }
}

const uint32_t* collective(Collective kind, uint32_t mask, uint32_t value, Site site) {
  maybe_yield();
  Cta& c = *cta;
  const int warp = thread / 32, lane = thread % 32;
  Warp& w = c.warps[warp];
  if (mask != 0xFFFFFFFFu) fail(site, "a collective of part of a warp (mask 0x%08x) is not emulated", mask);
  if (w.live != 0xFFFFFFFFu) fail(site, "a collective of the whole warp after a lane has ended");
  const uint32_t generation = w.generation;
  if (w.arrived == 0) w.kind = kind, w.site = site;
  if (w.kind != kind || w.site.line != site.line) {
    fail(site, "lanes of a warp meet in different collectives: another lane is at line %d", w.site.line);
  }
  w.values[generation & 1][lane] = value;
  w.arrived |= 1u << lane;
  if (w.arrived != 0xFFFFFFFFu) {
    w.waiting |= 1u << lane;
    while (w.generation == generation) block("collective of the warp", site);
  } else {
    if (kind == kSyncWarp || kind == kWait) join_warp(c, warp);
    const uint32_t waiting = w.waiting;
    w.arrived = 0, w.waiting = 0;
    ++w.generation;
    wake_lanes(c, warp, waiting);
  }
  return w.values[generation & 1];
}

void block_barrier(Site site) {
  maybe_yield();
  Cta& c = *cta;
  BlockBarrier& b = c.block_barrier;
  if (b.clock.empty()) b.clock.assign(c.threads, 0);
  const uint32_t generation = b.generation;
  join(b.clock.data(), c.clock(thread), c.threads);
  ++c.clock(thread)[thread];
  if (++b.arrived == c.threads) {
    const std::vector<int> waiters = std::move(b.waiters);
    b.waiters.clear();
    for (const int t : waiters) join(c.clock(t), b.clock.data(), c.threads), wake(c, t);
    join(c.clock(thread), b.clock.data(), c.threads);
    b.arrived = 0;
    std::fill(b.clock.begin(), b.clock.end(), 0);
    ++b.generation;
  } else {
    b.waiters.push_back(thread);
    while (b.generation == generation) block("__syncthreads", site, b.arrived, c.threads);
  }
}

void set_registers(int registers, bool take, Site site) {
  collective(kRegisters, 0xFFFFFFFFu, registers, site);
  Cta& c = *cta;
  Warp& w = c.warps[thread / 32];
  if (thread % 32 == 0) {
    if (take != (registers >= w.registers)) {
      fail(site, "setmaxnreg from %d to %d goes the wrong way", w.registers, registers);
    }
    const int more = 32 * (registers - w.registers);
    while (c.free_registers < more) {
      c.register_waiters.push_back(thread);
      block("registers that others have to give", site);
    }
    c.free_registers -= more;
    w.registers = registers;
    for (const int t : c.register_waiters) wake(c, t);
    c.register_waiters.clear();
  }
  collective(kRegisters, 0xFFFFFFFFu, registers, site);
}

}  // namespace emulation
