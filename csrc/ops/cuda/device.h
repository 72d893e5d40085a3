// What a CUDA op needs besides ops/tensor.h. The CUDA ops are built a second time with BLT_EMULATE_CUDA, where they
// serve CPU tensors and the kernels run on host threads (csrc/testing/).
#pragma once

#include "cuda/stream.h"
#include "ops/tensor.h"

#if defined(BLT_EMULATE_CUDA)
#define BLT_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(blt_kernels_emulated, CPU, m)
#else
#define BLT_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CUDA, m)
#endif

namespace blt {

inline int device_index(const Tensor& t) { return t.get_device_index(); }

// Memory on the device of `like`.
inline Tensor empty_on(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return touchable(torch::stable::new_empty(like, sizes, dtype));
}

// Calls an operator of torch. The stack holds the arguments before the call and the results after it. The error code is
// checked here, because torch's own check has another name in the headers of 2.10 than in later ones.
inline void call_torch(const char* op, const char* overload, StableIValue* stack) {
  BLT_CHECK(torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS, "blt_kernels: ", op,
            " failed, as torch says on stderr");
}

}  // namespace blt
