// What encoder_cross_attention and decoder_cross_attention share on the CPU. They differ only in which rows of the
// layout make an item.
#pragma once

#include "cpu/cross_attention.h"
#include "ops/attention_inputs.h"

namespace blt {

struct AttentionPlan {
  // Makes one item for every slot of the batch, row after row. The window of a slot stays inside its sequence, which
  // `cu_patches` delimits. The op then fills in the ranges of rows, and appends items of rows that belong to no slot.
  AttentionPlan(const char* op, int64_t batch, int64_t capacity, const Tensor& cu_patches, int64_t window);

  void add_queries_without_keys(int64_t begin, int64_t end);
  void add_keys_without_queries(int64_t begin, int64_t end);

  const char* op;
  bool windowed;
  std::vector<cpu::AttentionItem> items;
};

// (out, lse)
std::tuple<Tensor, Tensor> attention_forward(AttentionPlan plan, const Tensor& q, const Tensor& k, const Tensor& v,
                                             std::optional<double> scale);

// (grad_q, grad_k, grad_v); a gradient that is not needed is empty.
std::tuple<Tensor, Tensor, Tensor> attention_backward(AttentionPlan plan, const Tensor& grad, const Tensor& q,
                                                      const Tensor& k, const Tensor& v, const Tensor& lse,
                                                      std::optional<double> scale, bool need_q, bool need_k,
                                                      bool need_v);

}  // namespace blt
