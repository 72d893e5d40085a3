// decoder_cross_attention, where bytes attend to the K slots of the last finished patch.
#include "ops/cross_attention.h"

namespace {

using blt::Tensor;

constexpr const char* kOp = "decoder_cross_attention";

// `offsets` is read for the number of slots only; `visible_ids` says which patch a byte sees.
blt::AttentionPlan plan(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& visible_ids,
                        const Tensor& offsets, const Tensor& cu_patches, int64_t window) {
  blt::check_dim(kOp, "visible_ids", visible_ids, 2);
  blt::check_dtype(kOp, "visible_ids", visible_ids, blt::ScalarType::Int, "int32");
  blt::check_cpu(kOp, "visible_ids", visible_ids);
  blt::check_dim(kOp, "offsets", offsets, 2);
  BLT_CHECK(offsets.size(1) >= 1, kOp, ": offsets: expected shape [B, C + 1], got ", offsets.size(1), " columns");
  const int64_t batch = visible_ids.size(0), num_bytes = visible_ids.size(1), capacity = offsets.size(1) - 1;
  blt::check_size(kOp, "offsets", offsets, 0, batch);
  blt::check_attention_inputs(kOp, q, k, v, batch);
  blt::check_size(kOp, "q", q, 1, num_bytes);
  blt::check_cpu(kOp, "q", q);
  const int64_t slots = blt::slots_of(kOp, "k", k, capacity);
  blt::AttentionPlan plan(kOp, batch, capacity, cu_patches, window);
  for (int64_t i = 0; i < batch * capacity; ++i) {
    plan.items[i].kv_begin = i * slots;
    plan.items[i].kv_end = (i + 1) * slots;
  }
  const Tensor dense = blt::contiguous(visible_ids);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* ids = dense.const_data_ptr<int32_t>() + b * num_bytes;
    int64_t last = -1;
    for (int64_t begin = 0, end; begin < num_bytes; begin = end) {
      const int64_t id = ids[begin], first_byte = b * num_bytes;
      for (end = begin + 1; end < num_bytes && ids[end] == id; ++end) {
      }
      if (id == -1) {
        plan.add_queries_without_keys(first_byte + begin, first_byte + end);
        continue;
      }
      BLT_CHECK(id > last && id < capacity, kOp, ": visible_ids: expected ids below ", capacity,
                ", each in one run and in rising order apart from -1, got ", id, " at [", b, ", ", begin, "] after ",
                last);
      last = id;
      plan.items[b * capacity + id].q_begin = first_byte + begin;
      plan.items[b * capacity + id].q_end = first_byte + end;
    }
  }
  return plan;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& visible_ids,
                                   const Tensor& offsets, const Tensor& cu_patches, std::optional<double> scale,
                                   int64_t window) {
  return blt::attention_forward(plan(q, k, v, visible_ids, offsets, cu_patches, window), q, k, v, scale);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& lse, const Tensor& visible_ids, const Tensor& offsets,
                                            const Tensor& cu_patches, std::optional<double> scale, int64_t window,
                                            bool need_q, bool need_k, bool need_v) {
  return blt::attention_backward(plan(q, k, v, visible_ids, offsets, cu_patches, window), grad, q, k, v, lse, scale,
                                 need_q, need_k, need_v);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def(
      "decoder_cross_attention(Tensor q, Tensor k, Tensor v, Tensor visible_ids, Tensor offsets, Tensor cu_patches, "
      "float? scale=None, int window=1) -> (Tensor out, Tensor lse)");
  m.def(
      "decoder_cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor visible_ids, "
      "Tensor offsets, Tensor cu_patches, float? scale, int window, bool need_q, bool need_k, bool need_v) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("decoder_cross_attention", TORCH_BOX(&forward));
  m.impl("decoder_cross_attention_backward", TORCH_BOX(&backward));
}
