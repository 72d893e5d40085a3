// What encoder_cross_attention and decoder_cross_attention share. They differ only in how the layout groups the rows.
#pragma once

#include "cpu/cross_attention.h"
#include "ops/attention_inputs.h"

namespace blt {

struct AttentionPlan {
  // One group for every slot of the batch, row after row, with the window inside the sequences that `cu_patches`
  // delimits; the op fills in the ranges of rows and appends rows that belong to no slot.
  AttentionPlan(const char* op, int64_t batch, int64_t capacity, const Tensor& cu_patches, int64_t window);

  void add_queries_without_keys(int64_t begin, int64_t end);
  void add_keys_without_queries(int64_t begin, int64_t end);

  const char* op;
  bool windowed;
  std::vector<cpu::AttentionGroup> groups;
};

// (out, lse)
std::tuple<Tensor, Tensor> attention_forward(AttentionPlan plan, const Tensor& q, const Tensor& k, const Tensor& v,
                                             std::optional<double> scale);

// (grad_q, grad_k, grad_v); those not needed are empty.
std::tuple<Tensor, Tensor, Tensor> attention_backward(AttentionPlan plan, const Tensor& grad, const Tensor& q,
                                                      const Tensor& k, const Tensor& v, const Tensor& lse,
                                                      std::optional<double> scale, bool need_q, bool need_k,
                                                      bool need_v);

}  // namespace blt
