#pragma once

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

enum class Reduce : int32_t { max, mean, min, sum };

struct PatchPoolArgs {
  DType dtype;
  Reduce reduce;
  int64_t num_bytes, capacity, width;  // N, C, D
  const int32_t* offsets;              // [B, C+1]
  const void* x;                       // [B, N, D]
  void* out;                           // [B, C, D]
};

// Rows begin..end of the flattened [B * C] patches.
BLT_CPU_KERNEL(patch_pool, const PatchPoolArgs& args, int64_t begin, int64_t end)

}  // namespace blt::cpu
