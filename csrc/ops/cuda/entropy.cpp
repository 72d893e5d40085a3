// entropy on CUDA.
#include "ops/cuda/entropy.h"

#include "cuda/entropy.h"
#include "ops/entropy.h"

namespace blt {

namespace {

Tensor entropy_op(const Tensor& logits) { return entropy_cuda("entropy", logits); }

Tensor entropy_backward_op(const Tensor& grad, const Tensor& logits) {
  constexpr const char* op = "entropy";
  const DType dtype = dtype_of(op, "logits", logits);
  check_entropy_grad(op, grad, logits);
  check_same_device(op, "grad", grad, logits);
  const cuda::OnDevice device(device_index(logits));
  const Tensor grad_dense = blt::contiguous(grad), dense = blt::contiguous(logits);
  const auto full = logits.sizes();
  Tensor out = empty_on(logits, {full.begin(), full.end()}, logits.scalar_type());
  if (out.numel() > 0) {
    cuda::entropy_backward({dtype, grad.numel(), logits.size(-1), grad_dense.const_data_ptr(), dense.const_data_ptr(),
                            out.mutable_data_ptr()},
                           device.stream());
  }
  return out;
}

}  // namespace

Tensor entropy_cuda(const char* op, const Tensor& logits) {
  const DType dtype = dtype_of(op, "logits", logits);
  const cuda::OnDevice device(device_index(logits));
  const Tensor dense = blt::contiguous(logits);
  Tensor out = empty_on(logits, row_sizes(op, logits), entropy_dtype(logits));
  if (out.numel() > 0) {
    cuda::entropy({dtype, out.numel(), logits.size(-1), dense.const_data_ptr(), out.mutable_data_ptr()},
                  device.stream());
  }
  return out;
}

}  // namespace blt

BLT_CUDA_OPS(m) {
  m.impl("entropy", TORCH_BOX(&blt::entropy_op));
  m.impl("entropy_backward", TORCH_BOX(&blt::entropy_backward_op));
}
