// A grid of CUDA threads as fibers on one CPU thread: what the kernels' instructions turn into.
//
// Fibers run in an order drawn from a seed until they have to wait. Copies and matrix products run on their own, at times
// drawn from the same seed. Every rule broken ends the run with a message (docs/notes/cuda_emulation.md has the list).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "cuda_runtime_api.h"

namespace emulation {

// Where the kernel's source calls an instruction. Default arguments carry it in.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
#define EMULATION_SITE ::emulation::Site site = ::emulation::Site::here()

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};
struct ThreadView {
  Dim thread, block, block_dim, grid_dim;
};
extern ThreadView view;  // of the fiber that runs

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Global memory that the kernel may read through __ldg and cp.async. `readable`: a byte per 16 bytes, 0 where nothing
// may be read (keys that no row keeps); null: all of it.
struct Region {
  const char* base;
  int64_t bytes;
  const uint8_t* readable;
};

// kernel<<<...>>>(arguments) becomes Launch(...)(kernel, arguments).
class Launch {
 public:
  Launch(size_t blocks, size_t threads, size_t shared_bytes = 0, cudaStream_t = nullptr)
      : blocks_(blocks), threads_(threads), shared_bytes_(shared_bytes) {}
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), const Arguments&... arguments) const {
    run([=] { kernel(arguments...); });
  }

 private:
  void run(const std::function<void()>& body) const;
  size_t blocks_, threads_, shared_bytes_;
};

void begin(const Region* regions, int num_regions, uint64_t seed);
const char* error();  // of the launches since `begin`, or null

// Threads
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));
void maybe_yield();
void check_global(const void* pointer, size_t bytes, size_t alignment, Site site);
void check_atomic(const void* pointer, size_t bytes, size_t alignment, Site site);  // global memory, or the block's shared
char* dynamic_shared();  // `extern __shared__ char name[]`
uint32_t shared_address(const void* pointer, Site site);
const char* shared_pointer(uint32_t address, uint32_t bytes, Site site);  // checked; aligned to `bytes`

enum Collective { kSyncWarp, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kVote, kReduce, kWait, kRegisters, kMatrices };
// Waits for all lanes of the warp; what each brought.
const uint32_t* collective(Collective kind, uint32_t mask, uint32_t value, Site site);
void block_barrier(Site site);  // __syncthreads
void set_registers(int registers, bool take, Site site);

// Barriers in shared memory
void barrier_init(uint32_t barrier, int count, Site site);
void barrier_arrive(uint32_t barrier, Site site);
void barrier_wait(uint32_t barrier, uint32_t parity, Site site);
bool barrier_test(uint32_t barrier, uint32_t parity, Site site);

// Copies
void copy_async_16(uint32_t shared, const void* global, Site site);
void copy_async_arrive(uint32_t barrier, Site site);
void load_matrices(uint32_t (&x)[4], uint32_t shared, Site site);
void fence_async_proxy();

// Matrix products, 64 x columns x 16. `a`: registers of the A operand. `transposed`: the lines of B lie along the axis
// that is summed over.
void product(float* sums, int columns, bool half, const uint32_t* registers, uint64_t a, uint64_t b, bool transposed,
             bool accumulate, Site site);
void product_fence();
void product_commit(Site site);
void product_wait(int pending, Site site);

float half_as_float(uint16_t bits);
uint16_t float_as_half(float x);
uint16_t float_as_bfloat16(float x);

}  // namespace emulation

// Kernels run one after the other here: those that may start early are right if they wait where they have to.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  emulation::Launch(config->grid.x, config->block.x, config->dynamicSmemBytes)(kernel, arguments...);
  return cudaSuccess;
}
