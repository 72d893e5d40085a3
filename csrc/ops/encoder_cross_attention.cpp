// encoder_cross_attention, where the K slots of a patch attend to the bytes of the patch.
#include "ops/cross_attention.h"

namespace {

using blt::Tensor;

constexpr const char* kOp = "encoder_cross_attention";

blt::AttentionPlan plan(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
                        const Tensor& cu_patches, int64_t window) {
  blt::check_dim(kOp, "offsets", offsets, 2);
  blt::check_dtype(kOp, "offsets", offsets, blt::ScalarType::Int, "int32");
  blt::check_cpu(kOp, "offsets", offsets);
  BLT_CHECK(offsets.size(1) >= 1, kOp, ": offsets: expected shape [B, C + 1], got ", offsets.size(1), " columns");
  const int64_t batch = offsets.size(0), capacity = offsets.size(1) - 1;
  blt::check_attention_inputs(kOp, q, k, v, batch);
  blt::check_cpu(kOp, "q", q);
  const int64_t num_bytes = k.size(1), slots = blt::slots_of(kOp, "q", q, capacity);
  blt::AttentionPlan plan(kOp, batch, capacity, cu_patches, window);
  const Tensor dense = blt::contiguous(offsets);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* row = dense.const_data_ptr<int32_t>() + b * (capacity + 1);
    const int64_t first_byte = b * num_bytes;
    for (int64_t p = 0; p <= capacity; ++p) {
      BLT_CHECK(row[p] >= (p == 0 ? 0 : row[p - 1]) && row[p] <= num_bytes, kOp,
                ": offsets: expected non-decreasing values from 0 to ", num_bytes, ", got ", row[p], " at [", b, ", ",
                p, "]");
    }
    for (int64_t p = 0; p < capacity; ++p) {
      const int64_t i = b * capacity + p;
      blt::cpu::AttentionItem& item = plan.items[i];
      item.q_begin = i * slots;
      item.q_end = item.q_begin + slots;
      item.kv_begin = first_byte + row[p];
      item.kv_end = first_byte + row[p + 1];
      if (row[p] == row[p + 1]) {
        item.first = i + 1;  // an empty slot sees nothing, whatever the window
      }
    }
    plan.add_keys_without_queries(first_byte, first_byte + row[0]);
    plan.add_keys_without_queries(first_byte + row[capacity], first_byte + num_bytes);
  }
  return plan;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
                                   const Tensor& cu_patches, std::optional<double> scale, int64_t window) {
  return blt::attention_forward(plan(q, k, v, offsets, cu_patches, window), q, k, v, scale);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& lse, const Tensor& offsets, const Tensor& cu_patches,
                                            std::optional<double> scale, int64_t window, bool need_q, bool need_k,
                                            bool need_v) {
  return blt::attention_backward(plan(q, k, v, offsets, cu_patches, window), grad, q, k, v, lse, scale, need_q, need_k,
                                 need_v);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def(
      "encoder_cross_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor cu_patches, float? scale=None, "
      "int window=1) -> (Tensor out, Tensor lse)");
  m.def(
      "encoder_cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor offsets, "
      "Tensor cu_patches, float? scale, int window, bool need_q, bool need_k, bool need_v) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("encoder_cross_attention", TORCH_BOX(&forward));
  m.impl("encoder_cross_attention_backward", TORCH_BOX(&backward));
}
