// Launches a kernel on a CUDA stream, or with BLT_EMULATE_CUDA as csrc/testing/launch.h does. Errors name the kernel
// and its grid.
#pragma once

#include "common/check.h"
#include "cuda/device.h"
#include "cuda/stream.h"
#if defined(BLT_EMULATE_CUDA)
#include "testing/launch.h"
#endif

namespace blt::cuda {

#if defined(BLT_EMULATE_CUDA)
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, Stream,
            const Args&... args) {
  emulator::launch(name, kernel, blocks, threads, shared, args...);
}

#else
inline void check(cudaError_t error, const char* what, int64_t blocks = 0, int threads = 0, size_t shared = 0) {
  BLT_CHECK(error == cudaSuccess, "blt_kernels: ", what, " with grid ", blocks, ", block ", threads, ", ", shared,
            " bytes of shared memory: ", cudaGetErrorString(error));
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, Stream stream,
            const Args&... args) {
  if (blocks == 0) {
    return;
  }
  BLT_CHECK(blocks <= INT32_MAX, "blt_kernels: ", name, ": too large: a grid of ", blocks, " blocks");
  kernel<<<unsigned(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<Params>(args)...);
  check(cudaGetLastError(), name, blocks, threads, shared);
}
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The widest access, in elements, with which rows of this many elements can be read and written at these addresses.
template <class... Pointers>
int access_width(int64_t row, size_t element, int widest, Pointers... pointers) {
  uint64_t bits = uint64_t(row) * element;
  ((bits |= reinterpret_cast<uint64_t>(pointers)), ...);
  int n = widest;
  while (n > 1 && bits % (uint64_t(n) * element) != 0) n /= 2;
  return n;
}

}  // namespace blt::cuda
