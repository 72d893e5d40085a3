// The segment reduction that patch_pool and the backward of patch_gather share.
#pragma once

#include "cuda/patch_pool.h"
#include "ops/cuda/device.h"

namespace blt {

// out [B, C, D] = each patch of x [B, N, D], both contiguous and with elements, reduced.
void pool_on_cuda(const Segments& segments, Reduce reduce, DType dtype, const Tensor& x, const Tensor& out,
                  const cuda::OnDevice& device);

}  // namespace blt
