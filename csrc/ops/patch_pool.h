// The segment reduction that patch_pool and the backward of patch_gather share.
#pragma once

#include "common/segments.h"
#include "cpu/patch_pool.h"
#include "ops/tensor.h"

namespace blt {

// out [B, C, D] = each patch of x [B, N, D], both contiguous, reduced.
void pool_segments(const Segments& segments, Reduce reduce, DType dtype, const Tensor& x, const Tensor& out);

}  // namespace blt
