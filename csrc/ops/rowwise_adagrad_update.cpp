// rowwise_adagrad_update is one step of row-wise Adagrad for the rows of a table that a sparse gradient lists.
#include "ops/rowwise_adagrad_update.h"

#include "cpu/rowwise_adagrad_update.h"

namespace {

using blt::Tensor;

void rowwise_adagrad_update_cpu(const Tensor& table, const Tensor& state, const Tensor& rows, const Tensor& values,
                                const std::optional<Tensor>& scale, double lr, double eps, double weight_decay) {
  constexpr const char* op = "rowwise_adagrad_update";
  blt::check_cpu(op, "table", table);
  blt::check_rowwise_adagrad(op, table, state, rows, values, scale);
  const Tensor rows_dense = blt::contiguous(rows), values_dense = blt::contiguous(values);
  const int64_t* const row = rows_dense.const_data_ptr<int64_t>();
  const int64_t count = rows.numel(), width = table.size(1);
  // Each row is listed once, so that no two threads write the same one.
  for (int64_t i = 0; i < count; ++i) {
    BLT_CHECK(row[i] >= (i == 0 ? 0 : row[i - 1] + 1) && row[i] < table.size(0), op,
              ": rows: expected ascending rows below ", table.size(0), ", got ", row[i], " at place ", i);
  }
  double factor = 1;
  if (scale) {
    factor = scale->scalar_type() == blt::ScalarType::Double ? *scale->const_data_ptr<double>()
                                                             : double(*scale->const_data_ptr<float>());
  }
  const blt::cpu::RowwiseAdagradArgs args{blt::dtype_of(op, "table", table),
                                          width,
                                          table.mutable_data_ptr(),
                                          state.mutable_data_ptr(),
                                          row,
                                          values_dense.const_data_ptr(),
                                          factor,
                                          lr,
                                          eps,
                                          weight_decay};
  const auto kernel = blt::cpu::rowwise_adagrad_update_cpu();
  blt::parallel_for(width == 0 ? 0 : count, blt::grain(width),
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def(
      "rowwise_adagrad_update(Tensor(a!) table, Tensor(b!) state, Tensor rows, Tensor values, Tensor? scale, float lr, "
      "float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("rowwise_adagrad_update", TORCH_BOX(&rowwise_adagrad_update_cpu));
}
