// The segment reduction that patch_pool and the backward of patch_gather share.
#pragma once

#include "common/tensor.h"
#include "cpu/patch_pool.h"

namespace blt {

// Reduces each of the batch * C patches of `args`, whose begin and end the caller has checked.
void pool_segments(int64_t batch, const cpu::PatchPoolArgs& args);

}  // namespace blt
