// What the CUDA side of an op needs besides ops/tensor.h. Built a second time with BLT_EMULATE_CUDA, where the same
// functions serve CPU tensors and the kernels run on host threads (csrc/testing/).
#pragma once

#include "ops/tensor.h"
#include "cuda/stream.h"

#if defined(BLT_EMULATE_CUDA)
#define BLT_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(blt_kernels_emulated, CPU, m)
#else
#define BLT_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CUDA, m)
#endif

namespace blt {

inline int device_index(const Tensor& t) { return t.get_device_index(); }

// Memory on the device of `like`.
inline Tensor empty_on(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// Calls an operator of torch: arguments on the stack, then results. Not through torch's own check of error codes, which has
// another name in 2.10's headers than in later ones.
inline void call_torch(const char* op, const char* overload, StableIValue* stack) {
  BLT_CHECK(torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS, "blt_kernels: ", op,
            " failed, as torch says on stderr");
}

}  // namespace blt
