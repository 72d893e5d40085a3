// What linear_entropy checks on every device.
#pragma once

#include "ops/tensor.h"

namespace blt {

// The dtype of logits and entropies.
inline ScalarType linear_entropy_dtype(const Tensor& hidden, const Tensor& weight) {
  const bool f64 = hidden.scalar_type() == ScalarType::Double || weight.scalar_type() == ScalarType::Double;
  return f64 ? ScalarType::Double : ScalarType::Float;
}

// Returns the sizes [...] of the entropies of hidden states [..., D].
inline std::vector<int64_t> check_linear_entropy(const char* op, const Tensor& hidden, const Tensor& weight) {
  check_dim(op, "weight", weight, 2);
  BLT_CHECK(weight.size(0) >= 1, op, ": weight: expected shape [V, D] with V >= 1");
  BLT_CHECK(hidden.dim() >= 1 && hidden.size(-1) == weight.size(1), op, ": hidden: expected shape [..., ",
            weight.size(1), "]");
  check_same_device(op, "weight", weight, hidden);
  const auto sizes = hidden.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

}  // namespace blt
