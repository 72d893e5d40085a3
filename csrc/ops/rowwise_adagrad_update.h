// What the CPU and the CUDA op of rowwise_adagrad_update check alike.
#pragma once

#include "ops/tensor.h"

namespace blt {

inline void check_rowwise_adagrad(const char* op, const Tensor& table, const Tensor& state, const Tensor& rows,
                                  const Tensor& values, const std::optional<Tensor>& scale) {
  const ScalarType arithmetic = table.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const char* arithmetic_name = arithmetic == ScalarType::Double ? "float64" : "float32";
  check_dim(op, "table", table, 2);
  dtype_of(op, "table", table);
  check_sizes(op, "state", state, {table.size(0)});
  check_dtype(op, "state", state, arithmetic, arithmetic_name);
  check_dim(op, "rows", rows, 1);
  check_dtype(op, "rows", rows, ScalarType::Long, "int64");
  check_sizes(op, "values", values, {rows.size(0), table.size(1)});
  BLT_CHECK(values.scalar_type() == table.scalar_type(), op, ": values: expected the dtype of table");
  BLT_CHECK(table.is_contiguous(), op, ": table: expected a contiguous tensor");
  BLT_CHECK(state.is_contiguous(), op, ": state: expected a contiguous tensor");
  check_same_device(op, "state", state, table);
  check_same_device(op, "rows", rows, table);
  check_same_device(op, "values", values, table);
  if (scale) {
    check_same_device(op, "scale", *scale, table);
    check_dtype(op, "scale", *scale, arithmetic, arithmetic_name);
    BLT_CHECK(scale->numel() == 1, op, ": scale: expected one element, got ", scale->numel());
  }
}

}  // namespace blt
