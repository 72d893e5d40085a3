// entropy as a function of C++, for the ops that go on from there.
#pragma once

#include "ops/cuda/device.h"

namespace blt {

// logits [..., V] on a GPU -> [...], float32, or float64 for float64 logits. `op` is named in errors.
Tensor entropy_cuda(const char* op, const Tensor& logits);

}  // namespace blt
