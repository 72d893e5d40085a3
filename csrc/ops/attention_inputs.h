// What encoder_cross_attention and decoder_cross_attention check on every device.
#pragma once

#include "ops/tensor.h"

namespace blt {

// Of lse and of every sum.
inline ScalarType arithmetic_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_attention_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, int64_t batch) {
  check_dim(op, "q", q, 4);
  check_dim(op, "k", k, 4);
  check_dim(op, "v", v, 4);
  dtype_of(op, "q", q);
  for (const auto& [name, t] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    check_size(op, name, *t, 0, batch);
    check_size(op, name, *t, 1, k.size(1));
    check_size(op, name, *t, 2, k.size(2));
    check_size(op, name, *t, 3, q.size(3));
    BLT_CHECK(t->scalar_type() == q.scalar_type(), op, ": ", name, ": expected the dtype of q");
    check_same_device(op, name, *t, q);
  }
  check_size(op, "q", q, 0, batch);
  BLT_CHECK(q.size(3) >= 1, op, ": q: expected a head dimension of at least 1, got ", q.size(3));
  BLT_CHECK(q.size(2) >= 1 && k.size(2) >= 1 && q.size(2) % k.size(2) == 0, op,
            ": q: expected a positive multiple of the ", k.size(2), " heads of k, got ", q.size(2));
}

// `slotted` (q of the encoder, k of the decoder) has K rows for each of the C slots. Returns K, 0 without slots.
inline int64_t slots_of(const char* op, const char* argument, const Tensor& slotted, int64_t capacity) {
  const int64_t slots = capacity == 0 ? 0 : slotted.size(1) / capacity;
  BLT_CHECK(slots * capacity == slotted.size(1) && (slots >= 1 || capacity == 0), op, ": ", argument,
            ": expected C*K rows with C = ", capacity, " and K >= 1, got ", slotted.size(1));
  return slots;
}

// Returns the number of sequences that cu_patches delimits.
inline int64_t check_window(const char* op, const Tensor& cu_patches, int64_t batch, int64_t window) {
  check_dim(op, "cu_patches", cu_patches, 1);
  check_dtype(op, "cu_patches", cu_patches, ScalarType::Int, "int32");
  BLT_CHECK(window >= 1, op, ": window: expected at least 1, got ", window);
  const int64_t sequences = cu_patches.size(0) - 1;
  BLT_CHECK(batch == 1 ? sequences >= 0 : sequences == batch, op, ": cu_patches: expected size ", batch + 1, ", got ",
            sequences + 1);
  return sequences;
}

inline void check_attention_grad(const char* op, const Tensor& grad, const Tensor& lse, const Tensor& q) {
  check_dim(op, "grad", grad, 4);
  check_dim(op, "lse", lse, 3);
  for (int64_t d = 0; d < 4; ++d) {
    check_size(op, "grad", grad, d, q.size(d));
    if (d < 3) check_size(op, "lse", lse, d, q.size(d));
  }
  BLT_CHECK(grad.scalar_type() == q.scalar_type(), op, ": grad: expected the dtype of q");
  BLT_CHECK(lse.scalar_type() == arithmetic_type(q), op, ": lse: expected float32, or float64 where q is");
  check_same_device(op, "grad", grad, q);
  check_same_device(op, "lse", lse, q);
}

}  // namespace blt
