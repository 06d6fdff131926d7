// What the kernels' sources use of the CUDA runtime, for the emulation: one device, launches that run at once.
#pragma once
#include <cstddef>
#include <cstring>

struct EmulatedStream;
using cudaStream_t = EmulatedStream*;

enum cudaError_t { cudaSuccess = 0, cudaErrorEmulation = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulation {
extern int num_sms;                    // what the device says of itself
extern size_t most_dynamic_shared;     // what launches may ask for: 48 KiB, or what the kernel has permission for
}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulation::num_sms, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
  if (value > 227 * 1024) return cudaErrorEmulation;
  return emulation::most_dynamic_shared = value, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return std::memset(pointer, value, bytes), cudaSuccess;
}

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 grid, block;  // the others' names are macros
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
