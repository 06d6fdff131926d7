// Shared memory, its barriers, and copies into it.
#include <algorithm>

#include "runtime.h"

namespace emulation {

namespace {

std::vector<Region> regions;

// What stands in a barrier's eight bytes, so that a store over them is noticed.
uint64_t image(const Barrier& b) {
  return 0xBA221E2000000000ull | uint64_t{static_cast<uint8_t>(b.number)} << 24 | (b.phases & 0xFFF) << 12 |
         (b.pending & 0xFFF);
}

Barrier& barrier_at(Cta& c, uint32_t address, Site site) {
  char* bytes = at_shared(c, address, 8, 8, site);
  const auto found = c.barriers.find(address);
  if (found == c.barriers.end()) fail(site, "no barrier was made at shared address %u", address);
  uint64_t there;
  std::memcpy(&there, bytes, 8);
  if (there != image(found->second)) fail(site, "barrier %d was overwritten", found->second.number);
  return found->second;
}

void write_image(Cta& c, uint32_t address, const Barrier& b) {
  const uint64_t x = image(b);
  std::memcpy(c.shared + (address - kFirstShared), &x, 8);
}

Granule& granule_at(Cta& c, uint32_t address) { return c.granules[(address - kFirstShared) / kGranule]; }

}  // namespace

void reset_threads(uint64_t seed);

void begin(const Region* list, int n, uint64_t seed) {
  regions.assign(list, list + n);
  reset_threads(seed);
}

void check_global(const void* pointer, size_t bytes, size_t alignment, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) fail(site, "global address is no multiple of %zu", alignment);
  const char* p = static_cast<const char*>(pointer);
  for (const Region& r : regions) {
    if (p >= r.base && p + bytes <= r.base + r.bytes) {
      if (r.readable != nullptr && !r.readable[(p - r.base) / kGranule]) {
        fail(site, "reads what no row keeps: byte %lld of the array", static_cast<long long>(p - r.base));
      }
      return;
    }
  }
  fail(site, "reads %zu bytes outside of every array", bytes);
}

void check_atomic(const void* pointer, size_t bytes, size_t alignment, Site site) {
  const char* p = static_cast<const char*>(pointer);
  if (p < cta->shared || p + bytes > cta->shared + cta->shared_bytes) return check_global(pointer, bytes, alignment, site);
  if ((p - cta->shared) % alignment != 0) fail(site, "shared address is no multiple of %zu", alignment);
}

char* dynamic_shared() { return cta->shared; }

uint32_t shared_address(const void* pointer, Site site) {
  const char* p = static_cast<const char*>(pointer);
  if (p < cta->shared || p >= cta->shared + cta->shared_bytes) fail(site, "address of something not in shared memory");
  return kFirstShared + static_cast<uint32_t>(p - cta->shared);
}

char* at_shared(Cta& c, uint32_t address, uint32_t bytes, uint32_t alignment, Site site) {
  if (address % alignment != 0) fail(site, "shared address %u is no multiple of %u", address, alignment);
  if (address < kFirstShared || address + uint64_t{bytes} > kFirstShared + c.shared_bytes) {
    fail(site, "shared address %u is outside of the block's %zu bytes", address, c.shared_bytes);
  }
  return c.shared + (address - kFirstShared);
}

const char* shared_pointer(uint32_t address, uint32_t bytes, Site site) {
  return at_shared(*cta, address, bytes, bytes, site);
}

void barrier_init(uint32_t address, int count, Site site) {
  Cta& c = *cta;
  at_shared(c, address, 8, 8, site);
  if (c.barriers.count(address)) fail(site, "a barrier is made twice");
  if (count <= 0 || count >= 1 << 20) fail(site, "a barrier of %d arrivals", count);
  Barrier& b = c.barriers[address];
  b.number = static_cast<int>(c.barriers.size()) - 1;
  b.count = b.pending = count;
  b.site = site;
  b.gathering.assign(c.threads, 0), b.completed.assign(c.threads, 0);
  write_image(c, address, b);
}

void arrive_at(Cta& c, uint32_t address, const uint32_t* clock, bool from_copy, Site site) {
  Barrier& b = barrier_at(c, address, site);
  join(b.gathering.data(), clock, c.threads);
  b.copies |= from_copy;
  if (--b.pending == 0) {
    ++b.phases;
    b.pending = b.count;
    b.completed = b.gathering;
    std::fill(b.gathering.begin(), b.gathering.end(), 0);
    b.copies_before = b.copies, b.copies = false;
    for (const int t : b.waiters) wake(c, t);
    b.waiters.clear();
  }
  write_image(c, address, b);
}

void barrier_arrive(uint32_t address, Site site) {
  maybe_yield();
  Cta& c = *cta;
  arrive_at(c, address, c.clock(thread), false, site);
  ++c.clock(thread)[thread];
  maybe_yield();
}

void barrier_wait(uint32_t address, uint32_t parity, Site site) {
  maybe_yield();
  Cta& c = *cta;
  if (parity > 1) fail(site, "parity %u", parity);
  while (true) {
    Barrier& b = barrier_at(c, address, site);
    if ((b.phases & 1) != parity) {
      join(c.clock(thread), b.completed.data(), c.threads);
      fiber().see_async |= b.copies_before;
      return;
    }
    b.waiters.push_back(thread);
    block("barrier", site, address, parity);
  }
}

bool barrier_test(uint32_t address, uint32_t parity, Site site) {
  maybe_yield();
  Cta& c = *cta;
  if (parity > 1) fail(site, "parity %u", parity);
  Barrier& b = barrier_at(c, address, site);
  if ((b.phases & 1) == parity) return false;
  join(c.clock(thread), b.completed.data(), c.threads);
  fiber().see_async |= b.copies_before;
  return true;
}

void copy_async_16(uint32_t shared, const void* global, Site site) {
  maybe_yield();
  Cta& c = *cta;
  check_global(global, 16, 16, site);
  char* to = at_shared(c, shared, 16, 16, site);
  Granule& g = granule_at(c, shared);
  if (g.in_flight) fail(site, "two copies are on their way to shared address %u", shared);
  const uint32_t* mine = c.clock(thread);
  if (g.writer >= 0 && g.writer != thread) {
    const auto& closed = c.segment_clocks[g.writer];
    if (g.segment >= closed.size() || mine[g.writer] < closed[g.segment]) {
      fail(site, "overwrites shared address %u, which thread %d filled, without knowing that its copy is over", shared,
           g.writer);
    }
  }
  const uint32_t* reads = c.reads.data() + static_cast<size_t>(&g - c.granules.data()) * c.warps.size();
  for (size_t w = 0; w < c.warps.size(); ++w) {
    if (reads[w] > mine[w * 32]) {
      fail(site, "overwrites shared address %u, which warp %zu reads, without knowing that it is over", shared, w);
    }
  }
  g.writer = thread;
  g.segment = static_cast<uint32_t>(c.segment_clocks[thread].size());
  g.in_flight = true;
  std::memset(to, 0xFF, 16);
  if (c.copies[thread].empty()) c.copying.push_back(thread);
  c.copies[thread].push_back(Copy{shared, static_cast<const char*>(global), {}});
}

void copy_async_arrive(uint32_t barrier, Site site) {
  maybe_yield();
  Cta& c = *cta;
  barrier_at(c, barrier, site);
  uint32_t* mine = c.clock(thread);
  c.segment_clocks[thread].push_back(++mine[thread]);
  if (c.copies[thread].empty()) c.copying.push_back(thread);
  c.copies[thread].push_back(Copy{barrier, nullptr, Clock(mine, mine + c.threads)});
  ++mine[thread];
  maybe_yield();
}

void check_landed(Cta& c, uint32_t address, const char* what, Site site) {
  at_shared(c, address, 16, 16, site);
  const Granule& g = granule_at(c, address);
  if (g.in_flight) fail(site, "%s reads shared address %u while a copy to it is on its way", what, address);
  if (g.writer < 0) return;
  const auto& closed = c.segment_clocks[g.writer];
  if (g.segment >= closed.size() || c.clock(thread)[g.writer] < closed[g.segment]) {
    fail(site, "%s reads shared address %u without knowing that thread %d's copy to it is over", what, address, g.writer);
  }
}

void load_matrices(uint32_t (&x)[4], uint32_t shared, Site site) {
  uint32_t lines[32];
  std::memcpy(lines, collective(kMatrices, 0xFFFFFFFFu, shared, site), sizeof(lines));
  Cta& c = *cta;
  const int warp = thread / 32, lane = thread % 32;
  for (int i = 0; i < 4; ++i) {
    const uint32_t line = lines[8 * i + lane / 4];
    check_landed(c, line, "a load", site);
    std::memcpy(&x[i], at_shared(c, line, 16, 16, site) + lane % 4 * 4, 4);
    uint32_t& read = c.reads[(line - kFirstShared) / kGranule * c.warps.size() + warp];
    read = std::max(read, c.clock(warp * 32)[warp * 32]);
  }
}

void fence_async_proxy() { fiber().see_async = false; }

void land_some_copy(Cta& c) {
  const size_t chosen = rng.below(c.copying.size());
  auto& queue = c.copies[c.copying[chosen]];
  if (queue.front().from == nullptr) {
    arrive_at(c, queue.front().to, queue.front().clock.data(), true, Site{"an arrival of copies", 0});
  } else {
    size_t n = 1;
    while (n < queue.size() && n < 16 && queue[n].from != nullptr) ++n;
    std::swap(queue.front(), queue[rng.below(n)]);
    const Copy& copy = queue.front();
    std::memcpy(c.shared + (copy.to - kFirstShared), copy.from, 16);
    granule_at(c, copy.to).in_flight = false;
  }
  queue.pop_front();
  if (queue.empty()) c.copying[chosen] = c.copying.back(), c.copying.pop_back();
}

}  // namespace emulation
