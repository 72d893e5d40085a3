// linear_entropy computes the entropy of each prediction of a linear head. Only the logits of some rows exist at a
// time.
#include "cpu/linear_entropy.h"

#include <algorithm>

#include "ops/linear_entropy.h"

namespace {

using blt::ScalarType;
using blt::Tensor;
using blt::cpu::LinearEntropyArgs;
using blt::cpu::LinearEntropyBlock;

constexpr const char* kOp = "linear_entropy";
constexpr int64_t kGrain = 12;                // rows, the fewest for which a thread pays
constexpr int64_t kBackwardLogits = 1 << 20;  // elements of the logits' gradient in memory at a time
constexpr int64_t kGrainColumns = 64;

// Checks the arguments, which must be contiguous. The caller fills in `grad` and `out`.
LinearEntropyArgs arguments(const Tensor& hidden, const Tensor& weight) {
  blt::check_linear_entropy(kOp, hidden, weight);
  blt::check_cpu(kOp, "hidden", hidden);
  return {blt::dtype_of(kOp, "hidden", hidden),
          blt::dtype_of(kOp, "weight", weight),
          blt::linear_entropy_dtype(hidden, weight) == ScalarType::Double ? blt::DType::f64 : blt::DType::f32,
          weight.size(0),
          weight.size(1),
          hidden.const_data_ptr(),
          weight.const_data_ptr(),
          nullptr,
          nullptr};
}

// Runs kernel(args, begin, end, scratch) on all rows, each thread with scratch of its own.
template <class Kernel>
void for_rows(Kernel kernel, const LinearEntropyArgs& args, ScalarType dtype, int64_t rows) {
  const int64_t threads = std::clamp<int64_t>((rows + kGrain - 1) / kGrain, 1, torch::stable::get_num_threads());
  const int64_t rows_per_thread = (rows + threads - 1) / threads, size = blt::cpu::linear_entropy_scratch(args.vocab);
  Tensor scratch = blt::empty({threads, size}, dtype);
  auto* const base = static_cast<char*>(scratch.mutable_data_ptr());
  const int64_t bytes = size * (dtype == ScalarType::Double ? 8 : 4);
  blt::parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernel(args, t * rows_per_thread, std::min(rows, (t + 1) * rows_per_thread), base + t * bytes);
    }
  });
}

Tensor linear_entropy(const Tensor& hidden, const Tensor& weight) {
  const Tensor hidden_dense = blt::contiguous(hidden), weight_dense = blt::contiguous(weight);
  LinearEntropyArgs args = arguments(hidden_dense, weight_dense);
  const ScalarType dtype = blt::linear_entropy_dtype(hidden, weight);
  Tensor out = blt::empty(blt::check_linear_entropy(kOp, hidden, weight), dtype);
  args.out = out.mutable_data_ptr();
  if (out.numel() > 0) {
    for_rows(blt::cpu::linear_entropy_cpu(), args, dtype, out.numel());
  }
  return out;
}

// A gradient that is not needed comes back with no elements.
std::tuple<Tensor, Tensor> linear_entropy_backward(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                                                   bool needs_hidden, bool needs_weight) {
  const Tensor weight_dense = blt::contiguous(weight), hidden_dense = blt::contiguous(hidden);
  LinearEntropyArgs args = arguments(hidden_dense, weight_dense);
  const ScalarType dtype = blt::linear_entropy_dtype(hidden, weight);
  const int64_t V = args.vocab, D = args.width;
  blt::check_cpu(kOp, "grad", grad);
  BLT_CHECK(grad.scalar_type() == dtype, kOp, ": grad: expected the dtype of the entropies");
  blt::check_sizes(kOp, "grad", grad, blt::check_linear_entropy(kOp, hidden, weight));
  const int64_t rows = grad.numel();
  Tensor grad_1d = blt::contiguous(torch::stable::reshape(grad, {rows}));
  const auto hidden_sizes = hidden.sizes();
  Tensor grad_hidden = blt::empty(
      needs_hidden ? std::vector<int64_t>{hidden_sizes.begin(), hidden_sizes.end()} : std::vector<int64_t>{0},
      hidden.scalar_type());
  Tensor grad_weight = needs_weight ? blt::empty({V, D}, dtype) : blt::empty({0}, dtype);
  if (rows == 0) {
    torch::stable::zero_(grad_weight);
  }

  // The size of a chunk of rows depends on V alone, so that sums over rows are the same for any number of threads.
  const int64_t chunk = std::max<int64_t>(kBackwardLogits / V, LinearEntropyBlock::rows);
  Tensor logit_grad = blt::empty({std::min(chunk, rows), V}, dtype);
  Tensor hidden_flat = torch::stable::reshape(hidden_dense, {rows, D});
  Tensor grad_hidden_flat = needs_hidden ? torch::stable::reshape(grad_hidden, {rows, D}) : grad_hidden;
  const Tensor weight_as = torch::stable::to(weight_dense, dtype);
  const auto kernel = blt::cpu::product_cpu();
  for (int64_t r = 0; r < rows; r += chunk) {
    const int64_t n = std::min(chunk, rows - r);
    const Tensor h = torch::stable::narrow(hidden_flat, 0, r, n), g = torch::stable::narrow(grad_1d, 0, r, n);
    args.hidden = h.const_data_ptr();
    args.grad = g.const_data_ptr();
    args.out = logit_grad.mutable_data_ptr();
    for_rows(blt::cpu::linear_entropy_logit_gradient_cpu(), args, dtype, n);
    if (needs_hidden) {
      Tensor out = torch::stable::narrow(grad_hidden_flat, 0, r, n);
      Tensor product = out.scalar_type() == dtype ? out : blt::empty({n, D}, dtype);
      const blt::cpu::ProductArgs p{
          args.dtype, V, D, args.out, V, 1, weight_as.const_data_ptr(), product.mutable_data_ptr(), false};
      blt::parallel_for(n, kGrain, [&](int64_t begin, int64_t end) { kernel(p, begin, end, 0, D); });
      if (out.scalar_type() != dtype) {
        torch::stable::copy_(out, product);
      }
    }
    if (needs_weight) {
      const Tensor h_as = torch::stable::to(h, dtype);
      const blt::cpu::ProductArgs p{
          args.dtype, n, D, args.out, 1, V, h_as.const_data_ptr(), grad_weight.mutable_data_ptr(), r > 0};
      blt::parallel_for((D + kGrainColumns - 1) / kGrainColumns, 1, [&](int64_t begin, int64_t end) {
        kernel(p, 0, V, begin * kGrainColumns, std::min(D, end * kGrainColumns));
      });
    }
  }
  return {grad_hidden, torch::stable::to(grad_weight, weight.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def("linear_entropy(Tensor hidden, Tensor weight) -> Tensor");
  m.def(
      "linear_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, bool needs_hidden, bool needs_weight) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("linear_entropy", TORCH_BOX(&linear_entropy));
  m.impl("linear_entropy_backward", TORCH_BOX(&linear_entropy_backward));
}
