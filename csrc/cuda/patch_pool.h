#pragma once

#include "common/dtype.h"
#include "common/reduce.h"
#include "common/segments.h"
#include "cuda/stream.h"

namespace blt::cuda {

struct PatchPoolArgs : Segments {
  DType dtype;
  Reduce reduce;
  int64_t width;  // D
  const void* x;  // [B, N, D]
  void* out;      // [B, C, D]
  // For the launches that follow the first one. Both are null where no patch can be long.
  void* parts;          // accumulators [B * pool_tiles, 2, D]
  int32_t* long_slots;  // [B * pool_tiles, 2]
};

struct PatchPoolBackwardArgs {
  PatchPoolArgs forward;  // x and out are read by max and min only
  const void* grad;       // [B, C, D]
  void* grad_x;           // [B, N, D]
};

// The bytes plus slots of a tile: a row is cut into tiles, where each slot comes just before its bytes.
constexpr int64_t kPoolTile = 64;
inline int64_t pool_tiles(int64_t num_bytes, int64_t capacity) {
  return (num_bytes + capacity + kPoolTile - 1) / kPoolTile;
}

void patch_pool(const PatchPoolArgs& args, Stream stream);
void patch_pool_backward(const PatchPoolBackwardArgs& args, Stream stream);

}  // namespace blt::cuda
