#pragma once

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

enum class Reduce : int32_t { max, mean, min, sum };

// Patch c of row b is rows begin[b * stride + c] .. end[b * stride + c] - 1 of x; begin never decreases within b.
struct PatchPoolArgs {
  DType dtype;
  Reduce reduce;
  int64_t num_bytes, capacity, width;  // N, C, D
  const int32_t *begin, *end;
  int64_t stride;
  const void* x;  // [B, N, D]
  void* out;      // [B, C, D]
};

struct PatchPoolBackwardArgs {
  PatchPoolArgs forward;  // x and out are read by max and min only
  bool stream;            // non-temporal stores of grad_x
  const void* grad;       // [B, C, D]
  void* grad_x;           // [B, N, D]; bytes before the first patch of a row and after its last get 0
};

// Patches begin..end of the flattened [B * C], columns column_begin..column_end.
BLT_CPU_KERNEL(patch_pool, const PatchPoolArgs& args, int64_t begin, int64_t end, int64_t column_begin,
               int64_t column_end)
BLT_CPU_KERNEL(patch_pool_backward, const PatchPoolBackwardArgs& args, int64_t begin, int64_t end,
               int64_t column_begin, int64_t column_end)

}  // namespace blt::cpu
