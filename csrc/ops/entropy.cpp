// entropy: logits -> entropy of each row's softmax, in nats.
#include "common/tensor.h"
#include "cpu/entropy.h"

namespace {

using blt::Tensor;

constexpr const char* kOp = "entropy";
constexpr int64_t kGrain = 32;  // rows a thread takes at least: some microseconds

// [..., V] -> [...], checked.
std::vector<int64_t> row_sizes(const Tensor& logits) {
  BLT_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1, kOp, ": logits: expected shape [..., V] with V >= 1");
  const auto sizes = logits.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

blt::ScalarType result_dtype(const Tensor& logits) {
  return logits.scalar_type() == blt::ScalarType::Double ? blt::ScalarType::Double : blt::ScalarType::Float;
}

Tensor entropy(const Tensor& logits) {
  const blt::DType dtype = blt::dtype_of(kOp, "logits", logits);
  Tensor out = blt::empty(row_sizes(logits), result_dtype(logits));
  const Tensor dense = blt::contiguous(logits);
  const blt::cpu::EntropyArgs args{dtype, logits.size(-1), dense.const_data_ptr(), out.mutable_data_ptr()};
  const auto kernel = blt::cpu::entropy_cpu();
  blt::parallel_for(out.numel(), kGrain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensor entropy_backward(const Tensor& grad, const Tensor& logits) {
  const blt::DType dtype = blt::dtype_of(kOp, "logits", logits);
  const auto sizes = row_sizes(logits);
  blt::check_cpu(kOp, "grad", grad);
  blt::check_dim(kOp, "grad", grad, int64_t(sizes.size()));
  for (size_t i = 0; i < sizes.size(); ++i) {
    blt::check_size(kOp, "grad", grad, int64_t(i), sizes[i]);
  }
  BLT_CHECK(grad.scalar_type() == result_dtype(logits), kOp, ": grad: expected the dtype of the entropies");
  const Tensor grad_dense = blt::contiguous(grad), dense = blt::contiguous(logits);
  const auto full = logits.sizes();
  Tensor out = blt::empty({full.begin(), full.end()}, logits.scalar_type());
  const blt::cpu::EntropyBackwardArgs args{dtype, logits.size(-1), grad_dense.const_data_ptr(), dense.const_data_ptr(),
                                           out.mutable_data_ptr()};
  const auto kernel = blt::cpu::entropy_backward_cpu();
  blt::parallel_for(grad.numel(), kGrain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def("entropy(Tensor logits) -> Tensor");
  m.def("entropy_backward(Tensor grad, Tensor logits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("entropy", TORCH_BOX(&entropy));
  m.impl("entropy_backward", TORCH_BOX(&entropy_backward));
}
