#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"

namespace blt::cpu {

struct LayoutArgs {
  int64_t num_bytes, capacity;  // N, C
  // Each row is one sequence, or all sequences are packed in row 0. They are ranges of bytes in the flattened [B * N].
  bool packed;
  int64_t num_sequences;               // S
  const int64_t *seq_begin, *seq_end;  // [S]
  const uint8_t* next_is_start;        // [S], 0 or 1
  // For layout_from_starts only.
  const uint8_t* starts;  // [B, N]: not 0 where a patch starts
  bool merge;             // a capacity was given: starts beyond it share slots
  int32_t* overflow;      // [B]
  // layout_from_lengths reads the offsets. Everything else is written.
  int32_t* offsets;      // [B, C+1]
  int32_t* patch_ids;    // [B, N]
  int32_t* visible_ids;  // [B, N]
  int32_t* num_patches;  // [B]
  int32_t* cu_patches;   // [S+1]; written here when packed
};

// Rows begin .. end - 1.
BLT_CPU_KERNEL(layout_from_starts, const LayoutArgs& args, int64_t begin, int64_t end)
BLT_CPU_KERNEL(layout_from_lengths, const LayoutArgs& args, int64_t begin, int64_t end)

}  // namespace blt::cpu
