#include "ops/cross_attention.h"

#include <algorithm>
#include <cmath>

namespace blt {

namespace {

using cpu::AttentionItem;
using cpu::CrossAttentionArgs;
using cpu::CrossAttentionScratch;
using Kernel = void (*)(const CrossAttentionArgs&, int64_t, int64_t, const CrossAttentionScratch&);

constexpr int64_t kWorkPerThread = 1 << 15;  // elements; for fewer it does not pay to wake a thread
constexpr int64_t kLine = 64;                // bytes; threads share no cache line, and kernels may pad to a register

int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// How many keys the queries of item i see, and how many queries see its keys at most (those of empty patches do not).
int64_t visible_keys(const std::vector<AttentionItem>& items, int64_t i) {
  const AttentionItem& item = items[i];
  return item.first <= i ? item.kv_end - items[item.first].kv_begin : 0;
}
int64_t viewing_queries(const std::vector<AttentionItem>& items, int64_t i) {
  int64_t queries = 0;
  for (int64_t other = i; other < items[i].last; ++other) {
    queries += items[other].q_end - items[other].q_begin;
  }
  return queries;
}

class Attention {
 public:
  Attention(AttentionPlan&& plan, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale)
      : items_(std::move(plan.items)), q_(blt::contiguous(q)), k_(blt::contiguous(k)), v_(blt::contiguous(v)) {
    args.dtype = dtype_of(plan.op, "q", q);
    args.heads = q.size(2);
    args.kv_heads = k.size(2);
    args.width = q.size(3);
    args.scale = scale.value_or(1.0 / std::sqrt(double(args.width)));
    args.q = q_.const_data_ptr();
    args.k = k_.const_data_ptr();
    args.v = v_.const_data_ptr();
    args.num_items = int64_t(items_.size());
    int64_t cost = 0;
    for (int64_t i = 0; i < args.num_items; ++i) {
      AttentionItem& item = items_[i];
      item.cost = cost;
      cost += item.q_end - item.q_begin + std::max(visible_keys(items_, i), item.kv_end - item.kv_begin);
    }
    AttentionItem total{};
    total.cost = cost;
    items_.push_back(total);
    args.items = items_.data();
  }

  enum class Blocks { of_queries, of_keys, none };

  // Runs the kernel over all items on torch's threads. `blocks` says which side's rows the kernel takes in blocks.
  void run(Kernel kernel, Blocks blocks) const {
    const int64_t total = items_.back().cost * args.kv_heads;
    const int64_t threads =
        std::min<int64_t>(torch::stable::get_num_threads(), 1 + total * args.width / kWorkPerThread);
    int64_t max_queries = 0, max_keys = 0, max_numbers = 0;
    for (int64_t i = 0; i < args.num_items; ++i) {
      const AttentionItem& item = items_[i];
      const bool of_keys = blocks == Blocks::of_keys;
      int64_t queries = of_keys ? viewing_queries(items_, i) : item.q_end - item.q_begin;
      int64_t keys = of_keys ? item.kv_end - item.kv_begin : visible_keys(items_, i);
      queries *= args.heads / args.kv_heads;
      max_queries = std::max(max_queries, queries);
      max_keys = std::max(max_keys, keys);
      if (of_keys) {
        keys = std::min(keys, cpu::cross_attention_block(args.kv_heads, queries));
      } else if (blocks == Blocks::of_queries) {
        queries = std::min(queries, cpu::cross_attention_block(args.kv_heads, keys));
      }
      max_numbers = std::max(max_numbers, cpu::cross_attention_numbers(args.kv_heads, queries, keys));
    }
    const int64_t number_bytes = args.dtype == DType::f64 ? 8 : 4;
    const int64_t q_bytes = lines(max_queries * 8), kv_bytes = lines(max_keys * 8);
    const int64_t bytes = q_bytes + kv_bytes + lines(max_numbers * number_bytes);
    Tensor space = empty({threads * bytes}, ScalarType::Byte);
    char* const base = static_cast<char*>(space.mutable_data_ptr());
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        char* const own = base + i * bytes;
        kernel(args, total * i / threads, total * (i + 1) / threads,
               {reinterpret_cast<int64_t*>(own), reinterpret_cast<int64_t*>(own + q_bytes), own + q_bytes + kv_bytes});
      }
    });
  }

  CrossAttentionArgs args{};

 private:
  std::vector<AttentionItem> items_;
  Tensor q_, k_, v_;
};

}  // namespace

AttentionPlan::AttentionPlan(const char* op, int64_t batch, int64_t capacity, const Tensor& cu_patches, int64_t window)
    : op(op), windowed(window > 1), items(size_t(batch * capacity)) {
  const int64_t sequences = check_window(op, cu_patches, batch, window);
  check_cpu(op, "cu_patches", cu_patches);
  // The first slot of each sequence of a row, and the end of the row. The only row of a packed batch has the sequences
  // of cu_patches, and slots after the last one count as one more sequence; otherwise every row is one sequence.
  std::vector<int64_t> starts{0};
  if (batch == 1) {
    const Tensor dense = blt::contiguous(cu_patches);
    const int32_t* cu = dense.const_data_ptr<int32_t>();
    for (int64_t s = 0; s <= sequences; ++s) {
      BLT_CHECK(s == 0 ? cu[0] == 0 : cu[s] >= cu[s - 1] && cu[s] <= capacity, op,
                ": cu_patches: expected non-decreasing values from 0 to at most ", capacity, ", got ", cu[s],
                " at index ", s);
      starts.push_back(cu[s]);
    }
  }
  starts.push_back(capacity);
  window = std::min(window, std::max<int64_t>(capacity, 1));
  for (int64_t b = 0; b < batch; ++b) {
    for (size_t s = 0; s + 1 < starts.size(); ++s) {
      for (int64_t p = starts[s]; p < starts[s + 1]; ++p) {
        cpu::AttentionItem& item = items[b * capacity + p];
        item.first = b * capacity + std::max(starts[s], p - window + 1);
        item.last = b * capacity + std::min(starts[s + 1], p + window);
      }
    }
  }
}

void AttentionPlan::add_queries_without_keys(int64_t begin, int64_t end) {
  if (begin < end) {
    const int64_t self = int64_t(items.size());
    items.push_back({begin, end, 0, 0, self + 1, self, 0});
  }
}

void AttentionPlan::add_keys_without_queries(int64_t begin, int64_t end) {
  if (begin < end) {
    const int64_t self = int64_t(items.size());
    items.push_back({0, 0, begin, end, self, self, 0});
  }
}

std::tuple<Tensor, Tensor> attention_forward(AttentionPlan plan, const Tensor& q, const Tensor& k, const Tensor& v,
                                             std::optional<double> scale) {
  Attention attention(std::move(plan), q, k, v, scale);
  Tensor out = empty({q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
  Tensor lse = empty({q.size(0), q.size(1), q.size(2)}, arithmetic_type(q));
  attention.args.out = out.mutable_data_ptr();
  attention.args.lse = lse.mutable_data_ptr();
  attention.run(cpu::cross_attention_cpu(), Attention::Blocks::of_queries);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(AttentionPlan plan, const Tensor& grad, const Tensor& q,
                                                      const Tensor& k, const Tensor& v, const Tensor& lse,
                                                      std::optional<double> scale, bool need_q, bool need_k,
                                                      bool need_v) {
  const char* op = plan.op;
  const bool windowed = plan.windowed;
  check_attention_grad(op, grad, lse, q);
  const Tensor grad_dense = blt::contiguous(grad);
  Attention attention(std::move(plan), q, k, v, scale);
  CrossAttentionArgs& args = attention.args;
  args.grad = grad_dense.const_data_ptr();
  const auto gradient = [](const Tensor& t, bool needed, void*& data) {
    Tensor out =
        needed ? empty({t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type()) : empty({0}, t.scalar_type());
    data = needed ? out.mutable_data_ptr() : nullptr;
    return out;
  };
  Tensor grad_q = gradient(q, need_q, args.grad_q);
  Tensor grad_k = gradient(k, need_k, args.grad_k);
  Tensor grad_v = gradient(v, need_v, args.grad_v);
  if (windowed) {
    Tensor row_terms = empty({q.size(0), q.size(1), q.size(2), 3}, arithmetic_type(q));
    args.row_terms = row_terms.mutable_data_ptr();
    attention.run(cpu::cross_attention_backward_queries_cpu(), Attention::Blocks::of_queries);
    attention.run(cpu::cross_attention_backward_keys_cpu(), Attention::Blocks::of_keys);
  } else {
    attention.run(cpu::cross_attention_backward_cpu(), Attention::Blocks::none);
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace blt
