// rowwise_adagrad_update on CUDA.
#include "ops/rowwise_adagrad_update.h"

#include "cuda/rowwise_adagrad_update.h"
#include "ops/cuda/device.h"

namespace {

using blt::Tensor;

void rowwise_adagrad_update_cuda(const Tensor& table, const Tensor& state, const Tensor& rows, const Tensor& values,
                                 const std::optional<Tensor>& scale, double lr, double eps, double weight_decay) {
  constexpr const char* op = "rowwise_adagrad_update";
  blt::check_rowwise_adagrad(op, table, state, rows, values, scale);
  const blt::cuda::OnDevice device(blt::device_index(table));
  const Tensor rows_dense = blt::contiguous(rows), values_dense = blt::contiguous(values);
  if (values.numel() > 0) {
    blt::cuda::rowwise_adagrad_update(
        {blt::dtype_of(op, "table", table), table.size(0), table.size(1), rows.numel(), table.mutable_data_ptr(),
         state.mutable_data_ptr(), rows_dense.const_data_ptr<int64_t>(), values_dense.const_data_ptr(),
         scale ? scale->const_data_ptr() : nullptr, lr, eps, weight_decay},
        device.stream());
  }
}

}  // namespace

BLT_CUDA_OPS(m) { m.impl("rowwise_adagrad_update", TORCH_BOX(&rowwise_adagrad_update_cuda)); }
