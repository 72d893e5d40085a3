#pragma once

#include "common/dtype.h"
#include "common/ngram_hash.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

// A position is one of the flattened [B * N] tokens. There are G columns g = prime * num_sizes + size number.
struct HashArgs : NgramHash {
  const int64_t* bounds;  // [num_bounds]: where sequences start, ascending from 0, then B * N
  int64_t num_bounds;
  const int64_t* sizes;  // [num_sizes], ascending, and the size number of each in the caller's order
  const int64_t* size_numbers;
  const int64_t* primes;  // [num_primes]
};

// Writes ids [B * N, G] of positions begin .. end - 1.
BLT_CPU_KERNEL(hash_ngram_ids, const HashArgs& args, int64_t* ids, int64_t begin, int64_t end)

struct HashEmbeddingArgs {
  HashArgs hash;
  DType table_dtype, out_dtype;  // equal, or both in fp32, bf16, fp16
  int64_t width;                 // D
  const void* table;             // [G * V, D], rows table_stride elements apart
  int64_t table_stride;
  const void* base;  // [B * N, D] or null
  void* out;         // [B * N, D]
  bool streaming;    // out is written past the caches
  double divisor;    // of the sums
};

// Writes out of positions begin .. end - 1.
BLT_CPU_KERNEL(hash_ngram_embedding, const HashEmbeddingArgs& args, int64_t begin, int64_t end)

// The table gradient. Each position and column has one key, id << position_bits | position. When the keys are sorted,
// the keys of one table row are neighbours, in order of position. The gradient of a row that one position reads (a sole
// row) is a copy of a row of grad; only a row that several positions read (a shared row) needs a sum.
struct HashRowCounts {
  int64_t rows, shared_rows, shared_entries;
};

struct HashSortArgs {
  HashArgs hash;
  int64_t num_positions, position_bits;
  uint64_t* keys;         // [G, B * N]
  uint64_t* scratch;      // [G, B * N]
  HashRowCounts* counts;  // [G]
};

// Writes the keys of positions begin .. end - 1.
BLT_CPU_KERNEL(hash_ngram_keys, const HashSortArgs& args, int64_t begin, int64_t end)
// Sorts the keys of columns begin .. end - 1 and counts their rows.
BLT_CPU_KERNEL(hash_ngram_sort, const HashSortArgs& args, int64_t begin, int64_t end)

struct HashGradArgs {
  DType grad_dtype, table_dtype;  // as out_dtype and table_dtype above
  int64_t width, tables;          // D, G
  bool dense;                     // out is [G * V, D], else [at least rows, D]
  bool streaming;                 // out is written past the caches
  double divisor;
  const void* grad;  // [B * N, D]
  void* out;
  int64_t* rows;              // [rows]: the table rows that are read, ascending
  int64_t* sole_rows;         // [B * N, G]: the row of out that this position is alone to read, or -1
  int64_t* shared_rows;       // [shared_rows]: the rows of out that several positions read, ascending
  int64_t* shared_begin;      // [shared_rows + 1]: where the positions of each begin in shared_positions
  int64_t* shared_positions;  // [shared_entries]
};

// Lists the rows of columns begin .. end - 1. before[g] holds the counts of all columns before column g.
BLT_CPU_KERNEL(hash_ngram_list_rows, const HashSortArgs& sort, const HashGradArgs& args, const HashRowCounts* before,
               int64_t begin, int64_t end)
// Writes the rows of out that positions begin .. end - 1 are alone to read.
BLT_CPU_KERNEL(hash_ngram_sole_rows, const HashGradArgs& args, int64_t begin, int64_t end)
// Writes columns d_begin .. d_end - 1 (at most kSharedTile) of the shared rows of out whose first entry is one of
// begin .. end - 1.
constexpr int64_t kSharedTile = 512;
BLT_CPU_KERNEL(hash_ngram_shared_rows, const HashGradArgs& args, int64_t num_shared, int64_t begin, int64_t end,
               int64_t d_begin, int64_t d_end)
// Writes zeros to rows begin .. end - 1 of out, except those that rows[0 .. num_rows - 1] lists.
BLT_CPU_KERNEL(hash_ngram_unread_rows, const HashGradArgs& args, int64_t num_rows, int64_t begin, int64_t end)

}  // namespace blt::cpu
