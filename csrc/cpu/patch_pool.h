#pragma once

#include "common/dtype.h"
#include "common/reduce.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

// Rows of the longest piece: a longer patch is divided, so that threads can share it. Whatever their number, so that
// the result does not depend on it.
constexpr int64_t kPieceRows = 512;

// Rows begin .. end - 1 of x as [B * N, D]: a patch, a part of a divided one, or bytes that are in none.
struct PatchPiece {
  int64_t begin, end;
  int64_t patch;    // of [B * C]; -1: none
  int64_t divided;  // the patch as a divided one; -1: it is whole
};

// A patch of more than kPieceRows rows; its parts are rows first_part, first_part + 1, ... of `parts`.
struct DividedPatch {
  int64_t begin, end, patch, first_part;
};

struct PatchPoolArgs {
  DType dtype;
  Reduce reduce;
  int64_t width;  // D
  const PatchPiece* pieces;
  const DividedPatch* divided;
  const void* x;  // [B * N, D]
  void* out;      // [B * C, D]
  void* parts;    // accumulators [parts, parts_stride]: the result of each part; in backward, see below
  int64_t parts_stride;
};

struct PatchPoolBackwardArgs {
  PatchPoolArgs forward;  // x and out are read by max and min only
  bool stream;            // non-temporal stores of grad_x
  const void* grad;       // [B * C, D]
  void* grad_x;           // [B * N, D]; bytes in no patch get 0
};

// Pieces begin .. end - 1; then the divided patches, from their parts.
BLT_CPU_KERNEL(patch_pool, const PatchPoolArgs& args, int64_t begin, int64_t end)
BLT_CPU_KERNEL(patch_pool_join, const PatchPoolArgs& args, int64_t begin, int64_t end)

// For max and min with divided patches, first: for each part how often it equals the result, to its row of `parts`;
// then, to a divided patch's first row, what each of its equals receives. Last, and for all: grad_x of the pieces.
BLT_CPU_KERNEL(patch_pool_ties, const PatchPoolBackwardArgs& args, int64_t begin, int64_t end)
BLT_CPU_KERNEL(patch_pool_shares, const PatchPoolBackwardArgs& args, int64_t begin, int64_t end)
BLT_CPU_KERNEL(patch_pool_backward, const PatchPoolBackwardArgs& args, int64_t begin, int64_t end)

}  // namespace blt::cpu
