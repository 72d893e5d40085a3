// Where the patches of a batch lie, for the ops and kernels of every device.
#pragma once

#include <stdint.h>

namespace blt {

// Patch c of row b is bytes begin[b * stride + c] .. end[b * stride + c] - 1 of that row; begin never decreases within
// a row. The two lie on the device of the op. The CPU's ops have checked the values; the CUDA kernels clamp them.
struct Segments {
  int64_t batch, num_bytes, capacity;  // B, N, C
  const int32_t *begin, *end;
  int64_t stride;
};

}  // namespace blt
