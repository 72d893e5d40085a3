#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/ngram_hash.h"
#include "cuda/stream.h"

namespace blt::cuda {

constexpr int kFewNumbers = 64;

// A position is one of the flattened [B * N] tokens. There are G columns g = prime * num_sizes + size number. With
// offsets B = 1, and the last offset at or before a position is where its sequence starts; values are clamped.
struct HashArgs : NgramHash {
  int64_t positions, row_length;  // B * N, N
  const int32_t* offsets32;       // [num_offsets]; one of the two is set, or neither, and then each row is a sequence
  const int64_t* offsets64;
  int64_t num_offsets;
  const int64_t* numbers;  // null where the numbers fit in `few`
  int64_t few[kFewNumbers];
};

// How many numbers `numbers`, or `few`, holds: first the sizes, ascending, then the size number of each in the caller's
// order, and then the primes.
inline int64_t hash_numbers(int64_t num_sizes, int64_t num_primes) { return 2 * num_sizes + num_primes; }

struct HashEmbeddingArgs {
  HashArgs hash;
  DType table_dtype, out_dtype;  // equal, or both in fp32, bf16, fp16
  int64_t width;                 // D
  const void* table;             // [G * V, D], rows table_stride elements apart
  int64_t table_stride;
  const void* base;  // [B * N, D] or null
  void* out;         // [B * N, D]
  double factor;     // by which the sums are multiplied
};

// The table gradient sums rows of grad over runs of equal keys. A key is a table row, g * V + id; before the sort, key
// number g * B * N + p is that of position p.
constexpr int kRunTile = 32;  // sorted keys in a tile
inline int64_t run_tiles(int64_t entries) { return (entries + kRunTile - 1) / kRunTile; }

struct SortedKeys {
  int64_t entries;        // G * B * N
  const int32_t* keys32;  // [entries], ascending; one of the two is set
  const int64_t* keys64;
  uint32_t* heads;  // [tiles]: bit i says that key i of the tile is the first of its run
};

struct HashGradArgs {
  SortedKeys sorted;
  DType grad_dtype, table_dtype;  // as out_dtype and table_dtype above
  int64_t width;                  // D
  const int32_t* positions;       // [entries]: the position of each sorted key
  const int64_t* runs;  // [tiles]: how many runs start in a tile or before; null: out is dense, and zeros so far
  const void* grad;     // [B * N, D]
  void* out;            // [at least runs, D], or [G * V, D]
  void* parts;          // accumulators [tiles, D]
  double factor;        // by which the sums are multiplied
};

// Copies numbers to the device without waiting for it: they travel as kernel arguments.
void store_numbers(const int64_t* numbers, int64_t count, int64_t* out, Stream stream);
// Writes ids [B * N, G].
void hash_ngram_ids(const HashArgs& args, int64_t* ids, Stream stream);
void hash_ngram_embedding(const HashEmbeddingArgs& args, Stream stream);
// Writes keys [G, B * N]; one of the two is set.
void hash_ngram_keys(const HashArgs& args, int32_t* keys32, int64_t* keys64, Stream stream);
// Writes, from the sorted keys and the places they had before, the heads, the position of each key, and in `counts` how
// many runs start in each tile.
void hash_ngram_runs(const SortedKeys& sorted, const int64_t* places, int64_t num_positions, int32_t* positions,
                     int32_t* counts, Stream stream);
// Writes rows [num_rows]: the key of each run, and then the last key again and again. num_rows is at least the number
// of runs.
void hash_ngram_rows(const SortedKeys& sorted, const int64_t* runs, int64_t* rows, int64_t num_rows, Stream stream);
// Writes zeros to the rows of out [num_rows], of row_bytes bytes each, from row *count on; count lies on the device.
void hash_ngram_padding(const int64_t* count, int64_t num_rows, int64_t row_bytes, void* out, Stream stream);
void hash_ngram_table_gradient(const HashGradArgs& args, Stream stream);

}  // namespace blt::cuda
