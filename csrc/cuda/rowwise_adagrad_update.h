#pragma once

#include "common/dtype.h"
#include "cuda/stream.h"

namespace blt::cuda {

struct RowwiseAdagradArgs {
  DType dtype;                // of table and values
  int64_t table_rows, width;  // R, D
  int64_t count;              // n
  void* table;                // [R, D]
  void* state;                // accumulators [R]
  const int64_t* rows;        // [n], each once; those outside of 0 .. R - 1 are left out
  const void* values;         // [n, D]
  const void* scale;          // an accumulator, or null
  double lr, eps, weight_decay;
};

void rowwise_adagrad_update(const RowwiseAdagradArgs& args, Stream stream);

}  // namespace blt::cuda
