#pragma once

#include "cuda/stream.h"

#include <stddef.h>
#include <stdint.h>

namespace blt::cuda {

struct PatchGatherArgs {
  int64_t rows, num_bytes;      // B * N, N
  int64_t capacity, row_bytes;  // C, bytes of a row of y
  const int32_t* ids;           // [B * N]; -1 gives zeros
  const void* y;                // [B * C] rows
  void* out;                    // [B * N] rows
};

// Finds the bytes begin .. end - 1 of each slot, for the segment sum that is the gradient. In the ids of a layout equal
// ids are neighbours, and ids never decrease, apart from -1 between them. So begin never decreases either.
struct SegmentsArgs {
  int64_t rows, num_bytes, capacity;  // B * N, N, C
  const int32_t* ids;                 // [B * N]
  int32_t *begin, *end;               // [B * C]
};

void patch_gather(const PatchGatherArgs& args, Stream stream);
void segments_of_ids(const SegmentsArgs& args, int64_t batch, Stream stream);

}  // namespace blt::cuda
