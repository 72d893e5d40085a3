// entropy on CUDA.
#include "cuda/entropy.h"

#include "ops/cuda/device.h"

namespace {

using blt::ScalarType;
using blt::Tensor;

constexpr const char* kOp = "entropy";

ScalarType result_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::vector<int64_t> row_sizes(const Tensor& logits) {
  BLT_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1, kOp, ": logits: expected shape [..., V] with V >= 1");
  const auto sizes = logits.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

Tensor entropy_cuda(const Tensor& logits) {
  const blt::DType dtype = blt::dtype_of(kOp, "logits", logits);
  const blt::cuda::OnDevice device(blt::device_index(logits));
  const Tensor dense = blt::contiguous(logits);
  Tensor out = blt::empty_on(logits, row_sizes(logits), result_dtype(logits));
  if (out.numel() > 0) {
    blt::cuda::entropy({dtype, out.numel(), logits.size(-1), dense.const_data_ptr(), out.mutable_data_ptr()},
                       device.stream());
  }
  return out;
}

Tensor entropy_backward_cuda(const Tensor& grad, const Tensor& logits) {
  const blt::DType dtype = blt::dtype_of(kOp, "logits", logits);
  const auto sizes = row_sizes(logits);
  blt::check_dim(kOp, "grad", grad, int64_t(sizes.size()));
  for (size_t i = 0; i < sizes.size(); ++i) {
    blt::check_size(kOp, "grad", grad, int64_t(i), sizes[i]);
  }
  BLT_CHECK(grad.scalar_type() == result_dtype(logits), kOp, ": grad: expected the dtype of the entropies");
  blt::check_same_device(kOp, "grad", grad, logits);
  const blt::cuda::OnDevice device(blt::device_index(logits));
  const Tensor grad_dense = blt::contiguous(grad), dense = blt::contiguous(logits);
  const auto full = logits.sizes();
  Tensor out = blt::empty_on(logits, {full.begin(), full.end()}, logits.scalar_type());
  if (out.numel() > 0) {
    blt::cuda::entropy_backward({dtype, grad.numel(), logits.size(-1), grad_dense.const_data_ptr(), dense.const_data_ptr(),
                                 out.mutable_data_ptr()},
                                device.stream());
  }
  return out;
}

}  // namespace

BLT_CUDA_OPS(m) {
  m.impl("entropy", TORCH_BOX(&entropy_cuda));
  m.impl("entropy_backward", TORCH_BOX(&entropy_backward_cuda));
}
