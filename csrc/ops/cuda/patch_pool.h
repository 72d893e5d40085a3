// The segment reduction that patch_pool and the backward of patch_gather share.
#pragma once

#include "cuda/patch_pool.h"
#include "ops/cuda/device.h"

namespace blt {

// Where the patches of a batch lie, on the device; see cuda::PatchPoolArgs.
struct DeviceSegments {
  int64_t batch, num_bytes, capacity;  // B, N, C
  const int32_t *begin, *end;
  int64_t stride;
};

// out [B, C, D] = each patch of x [B, N, D], both contiguous and with elements, reduced.
void pool_on_cuda(const DeviceSegments& segments, Reduce reduce, DType dtype, const Tensor& x, const Tensor& out,
                  const cuda::OnDevice& device);

}  // namespace blt
