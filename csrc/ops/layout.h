// What the CPU ops share that make a PatchLayout.
#pragma once

#include "ops/tensor.h"

namespace blt {

// offsets, patch_ids, visible_ids, num_patches, cu_patches, overflow: the fields of PatchLayout, in order.
using LayoutFields = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Where the sequences of a batch lie in the flattened [B * N] bytes. Each row is one sequence, or all sequences are
// packed in the only row.
struct Sequences {
  int64_t batch, num_bytes;
  bool packed;
  std::vector<int64_t> begin, end;  // [S]

  int64_t count() const { return int64_t(begin.size()); }
};

// Checks the values as well, because nothing else keeps the caller from reading outside of the row.
Sequences parse_sequences(const char* op, int64_t batch, int64_t num_bytes, const std::optional<Tensor>& seq_lens,
                          const std::optional<Tensor>& cu_seqlens);

// The layout of a mask of patch starts [B, N], which is not 0 where a patch starts. next_is_start [S] is 1 where the
// byte after the sequence starts a patch. Without a capacity C = N, and every start has a slot of its own.
LayoutFields layout_of_starts(const char* op, const uint8_t* starts, const Sequences& sequences,
                              const uint8_t* next_is_start, std::optional<int64_t> capacity);

}  // namespace blt
