// What the CUDA ops share that make a PatchLayout.
#pragma once

#include "cuda/layout.h"
#include "ops/cuda/device.h"
#include "ops/layout.h"

namespace blt {

// Where the sequences of a batch lie. This is known to the device only, and the kernels clamp what they read there.
struct DeviceSequences {
  cuda::SequenceArgs args;
  std::vector<Tensor> owned;  // what `args` points into

  int64_t count() const { return args.packed ? args.in_row : args.batch; }
};

// `like` is a tensor of the device.
DeviceSequences device_sequences(const char* op, const Tensor& like, int64_t batch, int64_t num_bytes,
                                 const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens);

// The layout of the starts that `args` describes. The caller sets the rule and what it needs; this sets everything
// else.
LayoutFields layout_of_starts(const char* op, const Tensor& like, cuda::StartsArgs args,
                              const DeviceSequences& sequences, std::optional<int64_t> capacity,
                              const cuda::OnDevice& device);

}  // namespace blt
