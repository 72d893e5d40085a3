#pragma once

#include <stdint.h>

#include "common/rule.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

struct SegmentArgs {
  Rule rule;
  bool bos_patch;
  int64_t max_patch_length;  // 0: there is none
  float threshold, delta;
  int64_t byte_offset, patch_size;
  const float* entropies;              // [B, N]: threshold, monotonic, combined
  const int64_t* tokens;               // [B, N]: spaces
  const int64_t *seq_begin, *seq_end;  // [S], in the flattened [B * N]
  uint8_t* starts;                     // [B, N]; bytes outside the sequences are left alone
  uint8_t* next_is_start;              // [S]: the byte after the sequence starts a patch
};

// Sequences begin .. end - 1.
BLT_CPU_KERNEL(segment, const SegmentArgs& args, int64_t begin, int64_t end)

}  // namespace blt::cpu
