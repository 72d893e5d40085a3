#pragma once

#include "common/dtype.h"
#include "common/reduce.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

// A patch of more rows than this is long: it is cut into parts of this many rows, on which several threads can work.
// It is cut whatever the number of threads, so that the result does not depend on that.
constexpr int64_t kPartRows = 512;

// An item of work: rows begin .. end - 1 of x as [B * N, D], which are a patch, a part of a long patch, or bytes that
// belong to no patch.
struct PoolItem {
  int64_t begin, end;
  int64_t patch;       // of [B * C]; -1: none
  int64_t long_patch;  // which of the long patches; -1: the patch is not long
};

// Its parts are rows first_part, first_part + 1, ... of `parts`.
struct LongPatch {
  int64_t begin, end, patch, first_part;
};

struct PatchPoolArgs {
  DType dtype;
  Reduce reduce;
  int64_t width;  // D
  const PoolItem* items;
  const LongPatch* long_patches;
  const void* x;  // [B * N, D]
  void* out;      // [B * C, D]
  void* parts;    // accumulators [parts, parts_stride]: the result of each part; for backward, see below
  int64_t parts_stride;
};

struct PatchPoolBackwardArgs {
  PatchPoolArgs forward;  // x and out are read by max and min only
  bool stream;            // grad_x is written past the caches
  const void* grad;       // [B * C, D]
  void* grad_x;           // [B * N, D]; bytes in no patch get 0
};

// patch_pool reduces items begin .. end - 1; then patch_pool_join makes long patches begin .. end - 1 from their parts.
BLT_CPU_KERNEL(patch_pool, const PatchPoolArgs& args, int64_t begin, int64_t end)
BLT_CPU_KERNEL(patch_pool_join, const PatchPoolArgs& args, int64_t begin, int64_t end)

// Backward. For max and min with long patches, patch_pool_ties first counts how many rows of each part equal the
// result, in the part's row of `parts`; then patch_pool_shares replaces the first of these rows by what each equal row
// of the long patch receives. At last patch_pool_backward writes grad_x of the items, for every reduction.
BLT_CPU_KERNEL(patch_pool_ties, const PatchPoolBackwardArgs& args, int64_t begin, int64_t end)
BLT_CPU_KERNEL(patch_pool_shares, const PatchPoolBackwardArgs& args, int64_t begin, int64_t end)
BLT_CPU_KERNEL(patch_pool_backward, const PatchPoolBackwardArgs& args, int64_t begin, int64_t end)

}  // namespace blt::cpu
