// patch_gather on CUDA.
#include "cuda/patch_gather.h"

#include "ops/cuda/patch_pool.h"

namespace {

using blt::Tensor;

void check_ids(const char* op, const Tensor& ids, const Tensor& like) {
  blt::check_dim(op, "ids", ids, 2);
  blt::check_size(op, "ids", ids, 0, like.size(0));
  blt::check_dtype(op, "ids", ids, blt::ScalarType::Int, "int32");
  blt::check_same_device(op, "ids", ids, like);
}

Tensor patch_gather_cuda(const Tensor& y, const Tensor& ids) {
  constexpr const char* op = "patch_gather";
  blt::check_dim(op, "y", y, 3);
  blt::dtype_of(op, "y", y);
  check_ids(op, ids, y);
  const blt::cuda::OnDevice device(blt::device_index(y));
  const Tensor y_dense = blt::contiguous(y), ids_dense = blt::contiguous(ids);
  const int64_t batch = y.size(0), num_bytes = ids.size(1), width = y.size(2);
  Tensor out = blt::empty_on(y, {batch, num_bytes, width}, y.scalar_type());
  if (out.numel() > 0) {
    blt::cuda::patch_gather({batch * num_bytes, num_bytes, y.size(1), width * int64_t(y.element_size()),
                             ids_dense.const_data_ptr<int32_t>(), y_dense.const_data_ptr(), out.mutable_data_ptr()},
                            device.stream());
  }
  return out;
}

Tensor patch_gather_backward_cuda(const Tensor& grad, const Tensor& ids, int64_t capacity) {
  constexpr const char* op = "patch_gather_backward";
  blt::check_dim(op, "grad", grad, 3);
  blt::dtype_of(op, "grad", grad);
  BLT_CHECK(capacity >= 0, op, ": capacity: expected at least 0, got ", capacity);
  check_ids(op, ids, grad);
  const int64_t batch = grad.size(0), num_bytes = grad.size(1), width = grad.size(2);
  blt::check_size(op, "ids", ids, 1, num_bytes);
  const blt::cuda::OnDevice device(blt::device_index(grad));
  const Tensor grad_dense = blt::contiguous(grad), ids_dense = blt::contiguous(ids);
  Tensor grad_y = blt::empty_on(grad, {batch, capacity, width}, grad.scalar_type());
  if (grad_y.numel() > 0) {
    const Tensor segments = blt::empty_on(grad, {2, batch * capacity}, blt::ScalarType::Int);
    int32_t* const begin = segments.mutable_data_ptr<int32_t>();
    int32_t* const end = begin + batch * capacity;
    blt::cuda::segments_of_ids(
        {batch * num_bytes, num_bytes, capacity, ids_dense.const_data_ptr<int32_t>(), begin, end}, batch,
        device.stream());
    blt::pool_on_cuda({batch, num_bytes, capacity, begin, end, capacity}, blt::Reduce::sum,
                      blt::dtype_of(op, "grad", grad), grad_dense, grad_y, device);
  }
  return grad_y;
}

}  // namespace

BLT_CUDA_OPS(m) {
  m.impl("patch_gather", TORCH_BOX(&patch_gather_cuda));
  m.impl("patch_gather_backward", TORCH_BOX(&patch_gather_backward_cuda));
}
