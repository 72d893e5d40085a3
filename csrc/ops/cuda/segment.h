// Segmentation by entropies as a C++ function, for the ops that compute the entropies themselves.
#pragma once

#include "ops/cuda/layout.h"
#include "ops/segment.h"

namespace blt {

// entropies: float32 [B, N] on a GPU; rule: threshold, monotonic or combined.
LayoutFields segment_entropies_cuda(const char* op, const Tensor& entropies, double threshold, const std::string& rule,
                                    std::optional<double> delta, const SegmentOptions& options);

}  // namespace blt
