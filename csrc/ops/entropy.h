// entropy as a C++ function, for the ops that build on it, and what its ops check on every device.
#pragma once

#include "ops/tensor.h"

namespace blt {

// The sizes [...] of the entropies of logits [..., V].
inline std::vector<int64_t> row_sizes(const char* op, const Tensor& logits) {
  BLT_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1, op, ": logits: expected shape [..., V] with V >= 1");
  const auto sizes = logits.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

inline ScalarType entropy_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks that `grad` can be the gradient of the entropies of `logits`.
inline void check_entropy_grad(const char* op, const Tensor& grad, const Tensor& logits) {
  check_sizes(op, "grad", grad, row_sizes(op, logits));
  BLT_CHECK(grad.scalar_type() == entropy_dtype(logits), op, ": grad: expected the dtype of the entropies");
}

// logits [..., V] on the CPU -> [...], float32, or float64 for float64 logits. `op` is named in errors.
Tensor entropy(const char* op, const Tensor& logits);

}  // namespace blt
