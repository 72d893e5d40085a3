// entropy as a C++ function, for the ops that build on it.
#pragma once

#include "ops/cuda/device.h"

namespace blt {

// logits [..., V] on a GPU -> [...], float32, or float64 for float64 logits. `op` is named in errors.
Tensor entropy_cuda(const char* op, const Tensor& logits);

}  // namespace blt
