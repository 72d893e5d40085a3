#pragma once

#include "common/dtype.h"
#include "cuda/stream.h"

namespace blt::cuda {

struct EntropyArgs {
  DType dtype;
  int64_t rows, vocab;  // V
  const void* logits;   // [rows, V]
  void* out;            // [rows] float32, or float64 for float64 logits
};

struct EntropyBackwardArgs {
  DType dtype;
  int64_t rows, vocab;
  const void* grad;    // [rows], in the dtype of the entropies
  const void* logits;  // [rows, V]
  void* out;           // [rows, V], in the dtype of the logits
};

void entropy(const EntropyArgs& args, Stream stream);
void entropy_backward(const EntropyBackwardArgs& args, Stream stream);

}  // namespace blt::cuda
