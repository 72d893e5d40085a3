#pragma once

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

struct EntropyArgs {
  DType dtype;         // of the logits; arithmetic and results are fp32, or fp64 where the logits are
  int64_t vocab;       // V
  const void* logits;  // [rows, V]
  void* out;           // [rows]
};

struct EntropyBackwardArgs {
  DType dtype;
  int64_t vocab;
  const void* grad;    // [rows]
  const void* logits;  // [rows, V]
  void* out;           // [rows, V], dtype of the logits
};

// Rows begin .. end - 1.
BLT_CPU_KERNEL(entropy, const EntropyArgs& args, int64_t begin, int64_t end)
BLT_CPU_KERNEL(entropy_backward, const EntropyBackwardArgs& args, int64_t begin, int64_t end)

}  // namespace blt::cpu
