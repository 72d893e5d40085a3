// Segmentation by entropies as a C++ function, for the ops that compute the entropies themselves.
#pragma once

#include "ops/layout.h"

namespace blt {

struct SegmentOptions {
  std::optional<int64_t> max_patch_length;
  std::optional<Tensor> seq_lens, cu_seqlens;
  bool bos_patch;
  std::optional<int64_t> capacity;
};

// entropies: float32 [B, N] on the CPU; rule: threshold, monotonic or combined.
LayoutFields segment_entropies(const char* op, const Tensor& entropies, double threshold, const std::string& rule,
                               std::optional<double> delta, const SegmentOptions& options);

}  // namespace blt
