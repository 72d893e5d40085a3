#pragma once

#include <stdint.h>

#include "common/rule.h"
#include "cuda/stream.h"

namespace blt::cuda {

// The sequences of a batch. Each row is one sequence, or all sequences are packed in the only row.
struct SequenceArgs {
  int64_t batch;      // B
  int32_t num_bytes;  // N
  bool packed;
  int32_t in_row;       // how many sequences a row has: S when packed, otherwise 1
  const void* ends;     // packed: where each sequence ends, [S] (cu_seqlens + 1); otherwise seq_lens [B], or null for N
  bool ends_are_int64;  // otherwise they are int32
  // [S]: whether the byte after the sequence starts a patch. If null, the rule or the lengths say so, or else it does
  // not.
  const uint8_t* next_is_start;
};

struct LayoutOut {
  int32_t capacity;      // C
  int32_t* offsets;      // [B, C+1]
  int32_t* patch_ids;    // [B, N]
  int32_t* visible_ids;  // [B, N]
  int32_t* num_patches;  // [B]
  int32_t* cu_patches;   // [S+1]
  int32_t* overflow;     // [B]
};

constexpr int kLayoutTile = 1024;  // bytes of a row that a block does

// A summary of the patch starts in a run of bytes; JoinStarts in layout.cuh makes one of two adjacent runs.
struct alignas(16) Starts {
  int32_t first, last, count, begin;
};

// How many patches start in the bytes of each warp of a tile, in layout_whole_rows.cuh.
struct alignas(16) StartCounts {
  int32_t of_warp[4];
};

struct StartsArgs {
  SequenceArgs sequences;
  LayoutOut out;
  bool merge;  // a capacity was given: starts beyond it share slots
  Rule rule;
  const void* values;        // [B, N]: mask uint8; threshold, monotonic, combined: entropies float32; spaces: int64
  float threshold, delta;    // threshold, monotonic, combined
  int64_t byte_offset;       // spaces
  int32_t patch_size;        // fixed
  bool bos_patch;            // false for a mask
  int32_t max_patch_length;  // INT32_MAX: there is none
  // Scratch; where rows are whole (`whole_rows`) it is the last two, otherwise the first.
  Starts* tiles;        // [B * layout_tiles(N)]
  StartCounts* counts;  // [B * layout_tiles(N)]
  uint16_t* decisions;  // [B * layout_tiles(N), kLayoutTile / 8]
};

// Whether each row is one sequence, in which patches may be of any length: that takes less work.
inline bool whole_rows(const StartsArgs& args) { return !args.sequences.packed && args.max_patch_length == INT32_MAX; }

struct LengthsArgs {
  SequenceArgs sequences;
  LayoutOut out;
  const void* lengths;  // [B, C]
  bool lengths_are_int64;
  int32_t* closes;  // [B], scratch: whether a slot starts at the byte after the last real one
};

// How many tiles a row has; each has a block.
int64_t layout_tiles(int64_t num_bytes);

void layout_from_starts(const StartsArgs& args, Stream stream);
void layout_from_lengths(const LengthsArgs& args, Stream stream);

}  // namespace blt::cuda
