#pragma once

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

struct PatchGatherArgs {
  int64_t num_bytes, capacity, row_bytes;  // N, C, D * size of an element
  bool stream;                             // out is written past the caches
  const int32_t* ids;                      // [B, N]; a negative id gives zeros
  const void* y;                           // [B, C, D]
  void* out;                               // [B, N, D]
};

// Rows begin .. end - 1 of the flattened [B * N] bytes.
BLT_CPU_KERNEL(patch_gather, const PatchGatherArgs& args, int64_t begin, int64_t end)

}  // namespace blt::cpu
