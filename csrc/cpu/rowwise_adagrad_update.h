#pragma once

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

struct RowwiseAdagradArgs {
  DType dtype;          // of table and values
  int64_t width;        // D
  void* table;          // [R, D]
  void* state;          // accumulators [R]
  const int64_t* rows;  // [n], each once
  const void* values;   // [n, D]
  double scale, lr, eps, weight_decay;
};

// Updates the rows that entries begin .. end - 1 list.
BLT_CPU_KERNEL(rowwise_adagrad_update, const RowwiseAdagradArgs& args, int64_t begin, int64_t end)

}  // namespace blt::cpu
