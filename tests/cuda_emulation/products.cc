// Matrix products of a warp: its 16 rows of the warpgroup's 64.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime.h"

namespace emulation {

namespace {

// A shared-memory operand as the hardware reads it from the 64 bits (PTX ISA, "matrix descriptor").
struct Operand {
  uint32_t start, leading, stride;
  Operand(uint64_t bits, Site site)
      : start((bits & 0x3FFF) << 4), leading((bits >> 16 & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4) {
    if ((bits >> 62) != 1) fail(site, "a descriptor without the 128-byte swizzle");
    if (bits & 0x3FFFC000C000C000ull) fail(site, "a descriptor with bits set that have no meaning: 0x%llx",
                                           static_cast<unsigned long long>(bits));
  }
  // 16 bytes: `line` along the strided axis, `panel` of 64 columns, `chunk` of 8 columns.
  uint32_t chunk(int line, int panel, int chunk) const {
    const uint32_t plain = start + line / 8 * stride + line % 8 * 128 + panel * leading + chunk * 16;
    return plain ^ (plain >> 7 & 7) << 4;
  }
};

template <class Visit>
void visit_lines(const Product& p, int warp, Visit visit) {  // (line, first column, address) of an A operand in memory
  if (p.a == 0) return;
  const Operand a(p.a, p.site);
  for (int line = 0; line < 16; ++line) {
    for (int k = 0; k < 2; ++k) visit(line, 8 * k, a.chunk(warp % 4 * 16 + line, 0, k));
  }
}

template <class Visit>
void visit_chunks(const Product& p, Visit visit) {  // (line, first column, address) of the B operand
  const Operand b(p.b, p.site);
  if (p.transposed) {
    for (int line = 0; line < p.columns; ++line) {
      for (int k = 0; k < 2; ++k) visit(line, 8 * k, b.chunk(line, 0, k));
    }
  } else {
    for (int line = 0; line < 16; ++line) {
      for (int n = 0; n < p.columns; n += 8) visit(line, n, b.chunk(line, n / 64, n % 64 / 8));
    }
  }
}

const float* half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> all(65536);
    for (int i = 0; i < 65536; ++i) all[i] = half_as_float(static_cast<uint16_t>(i));
    return all;
  }();
  return table.data();
}

float as_float(uint32_t bits16, bool half, const float* table) {
  return half ? table[bits16] : bits_as<float>(bits16 << 16);
}

// Where thread and register of an accumulator stand: row 0..15, column.
int place(int lane, int i, int columns) { return (lane / 4 + i / 2 % 2 * 8) * columns + i / 4 * 8 + lane % 4 * 2 + i % 2; }

void execute(Cta& c, int warp, Product& p) {
  const float* table = half_table();
  alignas(64) float a[16][16];  // [row][k]
  alignas(64) float b[16][256];  // [k][column]
  visit_chunks(p, [&](int line, int first, uint32_t address) {
    uint16_t raw[8];
    std::memcpy(raw, at_shared(c, address, 16, 16, p.site), 16);
    for (int i = 0; i < 8; ++i) {
      (p.transposed ? b[first + i][line] : b[line][first + i]) = as_float(raw[i], p.half, table);
    }
  });
  visit_lines(p, warp, [&](int line, int first, uint32_t address) {
    uint16_t raw[8];
    std::memcpy(raw, at_shared(c, address, 16, 16, p.site), 16);
    for (int i = 0; i < 8; ++i) a[line][first + i] = as_float(raw[i], p.half, table);
  });
  for (int lane = 0; lane < 32 && p.a == 0; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i % 2 * 8, column = i / 2 * 8 + lane % 4 * 2;
      a[row][column] = as_float(p.fragment[lane][i] & 0xFFFF, p.half, table);
      a[row][column + 1] = as_float(p.fragment[lane][i] >> 16, p.half, table);
    }
  }
  float* sums = p.sums->sums.data();
  const int columns = p.columns;
  if (!p.accumulate) std::fill(p.sums->sums.begin(), p.sums->sums.end(), 0.0f);
  for (int row = 0; row < 16; ++row) {
    float* __restrict__ line = sums + row * columns;
    for (int k = 0; k < 16; ++k) {
      const float x = a[row][k];
      const float* __restrict__ y = b[k];
      for (int n = 0; n < columns; ++n) line[n] += x * y[n];
    }
  }
}

void update_product_warps(Cta& c, int warp) {
  Warp& w = c.warps[warp];
  const size_t next = w.executed - w.first_product;
  const bool can = next < w.products.size() && w.products[next].arrived == 0xFFFFFFFFu;
  c.product_warps = (c.product_warps & ~(1u << warp)) | uint32_t{can} << warp;
}

Accumulator& find_accumulator(Warp& w, int lane, float* registers, int columns, Site site) {
  for (Accumulator& x : w.accumulators) {
    if ((x.loaded >> lane & 1) && x.registers[lane] == registers) {
      if (x.columns != columns) fail(site, "the same accumulator %d and %d columns wide", x.columns, columns);
      if (bits_as<uint32_t>(registers[0]) != kPoison) fail(site, "an accumulator was written while a product runs");
      return x;
    }
  }
  w.accumulators.emplace_back();
  Accumulator& x = w.accumulators.back();
  x.columns = columns;
  x.sums.assign(16 * columns, 0.0f);
  return x;
}

}  // namespace

void reads_begin(Cta& c, int warp, const Product& p, Site site) {
  auto begin = [&](int, int, uint32_t address) {
    check_landed(c, address, "a product", site);
    c.reads[(address - kFirstShared) / kGranule * c.warps.size() + warp] = kUnknown;
  };
  visit_lines(p, warp, begin);
  visit_chunks(p, begin);
}

void reads_are_over(Cta& c, int warp, const Product& p, uint32_t clock) {
  auto end = [&](int, int, uint32_t address) {
    c.reads[(address - kFirstShared) / kGranule * c.warps.size() + warp] = clock;
  };
  visit_lines(p, warp, end);
  visit_chunks(p, end);
}

void product(float* sums, int columns, bool half, const uint32_t* registers, uint64_t a, uint64_t b, bool transposed,
             bool accumulate, Site site) {
  maybe_yield();
  Cta& c = *cta;
  const int warp = thread / 32, lane = thread % 32;
  Warp& w = c.warps[warp];
  Fiber& f = fiber();
  if (!f.fenced) fail(site, "a product without wgmma.fence since the last wait");
  if (f.see_async) fail(site, "a product without fence.proxy.async since the wait for copies");
  const size_t number = w.lane_products[lane]++;
  const bool first = number == w.first_product + w.products.size();
  if (first) {
    Accumulator& acc = find_accumulator(w, lane, sums, columns, site);
    w.products.emplace_back();
    Product& p = w.products.back();
    p.a = a, p.b = b, p.accumulate = accumulate, p.transposed = transposed, p.half = half;
    p.columns = columns, p.sums = &acc, p.site = site;
    reads_begin(c, warp, p, site);
  }
  Product& p = w.products[number - w.first_product];
  if (p.a != a || p.b != b || p.accumulate != accumulate || p.columns != columns || p.site.line != site.line) {
    fail(site, "lanes of a warp start different products");
  }
  if (registers != nullptr) std::memcpy(p.fragment[lane], registers, 16);
  p.registers[lane] = registers;
  Accumulator& acc = *p.sums;
  if (acc.loaded >> lane & 1) {
    if (acc.registers[lane] != sums) fail(site, "lanes of a warp use different accumulators");
  } else {
    acc.registers[lane] = sums;
    acc.loaded |= 1u << lane;
    for (int i = 0; i < columns / 2; ++i) {
      acc.sums[place(lane, i, columns)] = sums[i];
      sums[i] = bits_as<float>(kPoison);
    }
  }
  acc.last_product = number;
  p.arrived |= 1u << lane;
  update_product_warps(c, warp);
}

void product_fence() {
  maybe_yield();
  fiber().fenced = true;
}

void product_commit(Site site) {
  Warp& w = cta->warps[thread / 32];
  const int lane = thread % 32;
  const size_t group = w.lane_groups[lane]++, end = w.lane_products[lane];
  if (group == w.group_end.size()) w.group_end.push_back(end);
  if (w.group_end[group] != end) fail(site, "lanes of a warp commit different products");
  maybe_yield();
}

void product_wait(int pending, Site site) {
  collective(kWait, 0xFFFFFFFFu, pending, site);
  Cta& c = *cta;
  const int warp = thread / 32, lane = thread % 32;
  Warp& w = c.warps[warp];
  const size_t groups = w.lane_groups[lane];
  const size_t end = groups > static_cast<size_t>(pending) ? w.group_end[groups - pending - 1] : 0;
  while (w.executed < end) {
    w.product_waiters |= 1u << lane;
    block("matrix products", site);
  }
  for (size_t i = w.first_product; i < end; ++i) {
    Product& p = w.products[i - w.first_product];
    if (p.retired >> lane & 1) continue;
    if (p.a == 0 && std::memcmp(p.fragment[lane], p.registers[lane], 16) != 0) {
      fail(p.site, "the A operand's registers were written while the product runs");
    }
    if (p.retired == 0) reads_are_over(c, warp, p, c.clock(warp * 32)[warp * 32]);
    p.retired |= 1u << lane;
  }
  // Another product on its way may read the same bytes.
  for (size_t i = end; i < w.first_product + w.products.size(); ++i) {
    if (i >= w.first_product) reads_are_over(c, warp, w.products[i - w.first_product], kUnknown);
  }
  for (Accumulator& acc : w.accumulators) {
    if (!(acc.loaded >> lane & 1) || acc.last_product >= end) continue;
    for (int i = 0; i < acc.columns / 2; ++i) {
      if (bits_as<uint32_t>(acc.registers[lane][i]) != kPoison) {
        fail(site, "an accumulator was written while a product runs");
      }
      acc.registers[lane][i] = acc.sums[place(lane, i, acc.columns)];
    }
    acc.loaded &= ~(1u << lane);
  }
  while (!w.products.empty() && w.products.front().retired == 0xFFFFFFFFu) w.products.pop_front(), ++w.first_product;
  while (!w.accumulators.empty() && w.accumulators.front().loaded == 0 &&
         w.accumulators.front().last_product < w.first_product) {
    w.accumulators.pop_front();
  }
  fiber().fenced = false;
}

void execute_some_product(Cta& c) {
  const int skip = rng.below(__builtin_popcount(c.product_warps));
  uint32_t left = c.product_warps;
  for (int i = 0; i < skip; ++i) left &= left - 1;
  const int warp = __builtin_ctz(left);
  Warp& w = c.warps[warp];
  execute(c, warp, w.products[w.executed - w.first_product]);
  ++w.executed;
  update_product_warps(c, warp);
  wake_lanes(c, warp, w.product_waiters);
  w.product_waiters = 0;
}

float half_as_float(uint16_t bits) {
  const int sign = bits >> 15, exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
            : exponent == 31 ? (fraction == 0 ? INFINITY : NAN)
                             : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return sign ? -x : x;
}

uint16_t float_as_half(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000u;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7FFF;
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 6.103515625e-5f) {  // subnormal: multiples of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 24))));
  }
  const uint32_t m = bits & 0x7FFFFFFFu;
  return static_cast<uint16_t>(sign | ((m - 0x38000000u + 0xFFFu + (m >> 13 & 1)) >> 13));
}

uint16_t float_as_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (std::isnan(x)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulation
