// What the registered ops need of torch's stable ABI. Nothing else includes torch headers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dtype.h"

namespace blt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      fail(op, ": ", argument, ": expected dtype float32, float64, bfloat16 or float16");
  }
}

inline void check_dim(const char* op, const char* argument, const Tensor& t, int64_t dim) {
  BLT_CHECK(t.dim() == dim, op, ": ", argument, ": expected ", dim, " dimensions, got ", t.dim());
}

inline void check_size(const char* op, const char* argument, const Tensor& t, int64_t dim, int64_t size) {
  BLT_CHECK(t.size(dim) == size, op, ": ", argument, ": expected size ", size, " in dimension ", dim, ", got ",
            t.size(dim));
}

inline void check_sizes(const char* op, const char* argument, const Tensor& t, const std::vector<int64_t>& sizes) {
  check_dim(op, argument, t, int64_t(sizes.size()));
  for (size_t d = 0; d < sizes.size(); ++d) {
    check_size(op, argument, t, int64_t(d), sizes[d]);
  }
}

inline void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType dtype, const char* name) {
  BLT_CHECK(t.scalar_type() == dtype, op, ": ", argument, ": expected dtype ", name);
}

// Every tensor of a CPU op must lie on the CPU, and the dispatcher looks at one of them only.
inline void check_cpu(const char* op, const char* argument, const Tensor& t) {
  BLT_CHECK(t.device().type() == torch::headeronly::DeviceType::CPU, op, ": ", argument, ": expected a CPU tensor");
}

// The dispatcher looks at one of an op's tensors only.
inline void check_same_device(const char* op, const char* argument, const Tensor& t, const Tensor& like) {
  BLT_CHECK(t.device() == like.device(), op, ": ", argument, ": expected a tensor on the device of the others");
}

// `t`, whose memory kernels may touch from here on. Only the emulated library keeps count of that (csrc/testing/ptx),
// where the tensors that an op gets from torch go through here.
#if defined(BLT_EMULATE_CUDA)
Tensor touchable(const Tensor& t);
#else
inline Tensor touchable(const Tensor& t) { return t; }
#endif

inline Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : touchable(torch::stable::contiguous(t)); }

// `t`, contiguous, after a check that it has these sizes, and the dtype and device of the argument `grad`.
inline Tensor dense_like_grad(const char* op, const char* argument, const Tensor& t, const Tensor& grad,
                              const std::vector<int64_t>& sizes) {
  check_sizes(op, argument, t, sizes);
  BLT_CHECK(t.scalar_type() == grad.scalar_type(), op, ": ", argument, ": expected the dtype of grad");
  check_same_device(op, argument, t, grad);
  return blt::contiguous(t);
}

// A result on the CPU. Beyond 32 MB malloc maps fresh memory on every call, and every page of it faults when it is
// first written. With huge pages there are 512 times fewer faults, and the call is up to twice as fast. Below 32 MB
// malloc recycles memory, and there huge pages were seen to stall.
inline Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) {
  const Tensor out = torch::stable::empty(sizes, dtype);
#if defined(__linux__)
  // Whole huge pages must cover kWorthIt bytes.
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20, kWorthIt = uintptr_t(30) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out.const_data_ptr()) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(out.const_data_ptr()) + uintptr_t(out.numel()) * out.element_size()) / kHugePage *
      kHugePage;
  if (end > begin && end - begin >= kWorthIt) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // this is advice, which the system may ignore
  }
#endif
  return out;
}

// Runs body(begin, end) on chunks of at least `grain` items, on torch's threads. The body must not throw.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count > 0) {
    torch::stable::parallel_for(0, count, grain < 1 ? 1 : grain, body);
  }
}

// The smallest number of rows of this width for which another thread pays.
inline int64_t grain(int64_t width) { return width < 1 ? 1 : (32768 + width - 1) / width; }

// Whether the rows (the last dimension) of a fresh output are better written past the caches (`stream` in cpu/vec.h).
// That is so if the output is too large to be found in a cache later, and whole aligned registers cover its rows.
inline bool wants_streaming(const Tensor& out) {
  constexpr int64_t kLargerThanCaches = int64_t(32) << 20, kLine = 64;
  const int64_t element = int64_t(out.element_size()), row = out.size(out.dim() - 1) * element;
  return out.numel() * element >= kLargerThanCaches && row % kLine == 0 &&
         reinterpret_cast<uintptr_t>(out.const_data_ptr()) % kLine == 0;
}

}  // namespace blt
