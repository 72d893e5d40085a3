#pragma once

#include "common/dtype.h"
#include "common/ngram_hash.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

// Positions are those of the flattened [B * N] tokens; columns g = prime * num_sizes + size number, G of them.
struct HashArgs : NgramHash {
  const int64_t* bounds;  // [num_bounds]: where sequences start, ascending from 0, then B * N
  int64_t num_bounds;
  const int64_t* sizes;  // [num_sizes], ascending, and the size number of each in the caller's order
  const int64_t* size_numbers;
  const int64_t* primes;  // [num_primes]
};

// ids [B * N, G] of positions begin..end.
BLT_CPU_KERNEL(hash_ngram_ids, const HashArgs& args, int64_t* ids, int64_t begin, int64_t end)

struct HashEmbeddingArgs {
  HashArgs hash;
  DType table_dtype, out_dtype;  // equal, or both in fp32, bf16, fp16
  int64_t width;                 // D
  const void* table;             // [G * V, D], rows table_stride elements apart
  int64_t table_stride;
  const void* base;              // [B * N, D] or null
  void* out;                     // [B * N, D]
  bool streaming;                // write out past the caches
  double divisor;
};

// out of positions begin..end.
BLT_CPU_KERNEL(hash_ngram_embedding, const HashEmbeddingArgs& args, int64_t begin, int64_t end)

// The table gradient. One key for each position and column, id << position_bits | position: sorted, the keys of one
// table row are neighbours, in order of position. Rows that one position reads are copies of its row of grad; only rows
// that several positions read are sums.
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

// Writes the keys of positions begin..end.
BLT_CPU_KERNEL(hash_ngram_keys, const HashSortArgs& args, int64_t begin, int64_t end)
// Sorts the keys of columns begin..end and counts their rows.
BLT_CPU_KERNEL(hash_ngram_sort, const HashSortArgs& args, int64_t begin, int64_t end)

struct HashGradArgs {
  DType grad_dtype, table_dtype;  // as out_dtype and table_dtype above
  int64_t width, tables;          // D, G
  bool dense;                     // out is [G * V, D], else [at least rows, D]
  bool streaming;                 // write out past the caches
  double divisor;
  const void* grad;               // [B * N, D]
  void* out;
  int64_t* rows;                  // [rows]: the table rows that are read, ascending
  int64_t* sole_rows;             // [B * N, G]: the row of out that gets this position's grad and no other, or -1
  int64_t* shared_rows;           // [shared_rows]: the other rows of out, ascending
  int64_t* shared_begin;          // [shared_rows + 1]: their first entry in
  int64_t* shared_positions;      // [shared_entries]
};

// Lists the rows of columns begin..end; `before` are the counts of all columns before each.
BLT_CPU_KERNEL(hash_ngram_list_rows, const HashSortArgs& sort, const HashGradArgs& args, const HashRowCounts* before,
               int64_t begin, int64_t end)
// The rows of out that positions begin..end are alone to read.
BLT_CPU_KERNEL(hash_ngram_sole_rows, const HashGradArgs& args, int64_t begin, int64_t end)
// Columns d_begin..d_end (at most kSharedTile) of the shared rows of out whose first entry lies in begin..end.
constexpr int64_t kSharedTile = 512;
BLT_CPU_KERNEL(hash_ngram_shared_rows, const HashGradArgs& args, int64_t num_shared, int64_t begin, int64_t end,
               int64_t d_begin, int64_t d_end)
// Zeros the rows begin..end of out, but for those that rows[0 .. num_rows - 1] lists.
BLT_CPU_KERNEL(hash_ngram_unread_rows, const HashGradArgs& args, int64_t num_rows, int64_t begin, int64_t end)

}  // namespace blt::cpu
