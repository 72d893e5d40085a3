// What the ops of hashed n-grams check and prepare on every device.
#pragma once

#include <algorithm>
#include <numeric>

#include "common/ngram_hash.h"
#include "ops/tensor.h"

namespace blt {

using Ints = std::vector<int64_t>;

// Checks the arguments and fills in `hash`, which points into `tokens`: these must be contiguous. Returns the number of
// tables, G.
inline int64_t set_ngram_hash(const char* op, const Tensor& tokens, const Ints& ngram_sizes, int64_t num_rows,
                              const Ints& primes, NgramHash& hash) {
  check_dim(op, "tokens", tokens, 2);
  BLT_CHECK(!ngram_sizes.empty(), op, ": ngram_sizes: expected at least one size");
  BLT_CHECK(!primes.empty(), op, ": primes: expected at least one prime");
  BLT_CHECK(num_rows >= 1, op, ": num_rows: expected at least 1, got ", num_rows);
  const int64_t tables = int64_t(primes.size() * ngram_sizes.size());
  BLT_CHECK(tables <= kMaxTables, op, ": expected at most ", kMaxTables, " tables, got ", tables);
  for (const int64_t size : ngram_sizes) {
    BLT_CHECK(size >= 1, op, ": ngram_sizes: expected sizes of at least 1, got ", size);
  }
  if (tokens.scalar_type() == ScalarType::Long) {
    hash.tokens64 = tokens.const_data_ptr<int64_t>();
  } else {
    check_dtype(op, "tokens", tokens, ScalarType::Int, "int32 or int64");
    hash.tokens32 = tokens.const_data_ptr<int32_t>();
  }
  hash.num_sizes = int(ngram_sizes.size());
  hash.num_primes = int(primes.size());
  hash.num_rows = num_rows;
  hash.reciprocal = UINT64_MAX / uint64_t(num_rows);
  hash.wrap = (UINT64_MAX % uint64_t(num_rows) + 1) % uint64_t(num_rows);
  return tables;
}

// The numbers of the sizes in the caller's order, from the smallest size to the largest.
inline Ints ascending_order(const Ints& sizes) {
  Ints numbers(sizes.size());
  std::iota(numbers.begin(), numbers.end(), 0);
  std::stable_sort(numbers.begin(), numbers.end(), [&](int64_t a, int64_t b) { return sizes[a] < sizes[b]; });
  return numbers;
}

// fp64 goes with fp64; the other three dtypes mix.
inline void check_hash_dtypes(const char* op, const char* argument, DType dtype, DType table) {
  BLT_CHECK((dtype == DType::f64) == (table == DType::f64), op, ": ", argument,
            ": float64 goes with a float64 table only");
}

inline void check_table(const char* op, const Tensor& table, int64_t tables, int64_t num_rows) {
  check_dim(op, "table", table, 2);
  BLT_CHECK(table.size(0) % tables == 0 && table.size(0) / tables == num_rows, op, ": table: expected ", tables, " * ",
            num_rows, " rows, got ", table.size(0));
  BLT_CHECK(table.size(1) <= 1 || table.stride(1) == 1, op, ": table: expected rows of adjacent elements");
}

// `base`, contiguous, after a check that it goes with the tokens and the table.
inline Tensor dense_base(const char* op, const Tensor& base, const Tensor& tokens, const Tensor& table) {
  check_sizes(op, "base", base, {tokens.size(0), tokens.size(1), table.size(1)});
  check_hash_dtypes(op, "base", dtype_of(op, "base", base), dtype_of(op, "table", table));
  return blt::contiguous(base);
}

// The gradient of the sums. Returns the bits that a position takes, in a key of 63 bits that names a table row, too.
inline int64_t check_hash_grad(const char* op, const Tensor& grad, const Tensor& tokens, int64_t tables,
                               int64_t num_rows) {
  check_dim(op, "grad", grad, 3);
  check_size(op, "grad", grad, 0, tokens.size(0));
  check_size(op, "grad", grad, 1, tokens.size(1));
  const int64_t positions = tokens.numel();
  int64_t position_bits = 0;
  while (positions >> position_bits != 0) {
    ++position_bits;
  }
  BLT_CHECK(num_rows <= (INT64_MAX >> position_bits) / tables, op,
            ": num_rows: expected num_rows * tables * tokens below 2**63, got ", num_rows, " * ", tables, " * ",
            positions);
  return position_bits;
}

}  // namespace blt
