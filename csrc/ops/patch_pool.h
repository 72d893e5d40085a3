// The segment reduction that patch_pool and the backward of patch_gather share.
#pragma once

#include "ops/tensor.h"
#include "cpu/patch_pool.h"

namespace blt {

// Where the patches of a batch lie: patch c of row b is bytes begin[b * stride + c] .. end[b * stride + c] - 1 of that
// row; begin never decreases within a row. The caller has checked the values.
struct Segments {
  int64_t batch, num_bytes, capacity;  // B, N, C
  const int32_t *begin, *end;
  int64_t stride;
};

// out [B, C, D] = each patch of x [B, N, D], both contiguous, reduced.
void pool_segments(const Segments& segments, Reduce reduce, DType dtype, const Tensor& x, const Tensor& out);

}  // namespace blt
