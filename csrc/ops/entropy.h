// entropy as a function of C++, for the ops that go on from there.
#pragma once

#include "common/tensor.h"

namespace blt {

// logits [..., V] on the CPU -> [...], float32, or float64 for float64 logits. `op` is named in errors.
Tensor entropy(const char* op, const Tensor& logits);

}  // namespace blt
