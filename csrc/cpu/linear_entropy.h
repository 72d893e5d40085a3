#pragma once

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

struct LinearEntropyArgs {
  DType hidden_dtype, weight_dtype;
  DType dtype;           // of the arithmetic and of the results: f64 if either input is, else f32
  int64_t vocab, width;  // V, D
  const void* hidden;    // [rows, D]
  const void* weight;    // [V, D]
  const void* grad;      // [rows], for the gradient only
  void* out;             // entropies [rows], or the gradient of the logits [rows, V]
};

// out[i, j] (+)= sum_k a[i * row_stride + k * depth_stride] * b[k, j], in one dtype, f32 or f64.
struct ProductArgs {
  DType dtype;
  int64_t depth, columns;
  const void* a;
  int64_t row_stride, depth_stride;
  const void* b;  // [depth, columns]
  void* out;      // [rows, columns]
  bool accumulate;
};

// What is multiplied together: some rows of `hidden` (divisible by the rows of every tile) and of `weight`, and `depth`
// of the D elements of each. The rows of `weight` fit into L1.
struct LinearEntropyBlock {
  static constexpr int64_t rows = 48, vocab = 4, depth = 1024;
};
// How many elements of `dtype` a thread needs as scratch, for converted rows of both and for logits.
constexpr int64_t linear_entropy_scratch(int64_t vocab) {
  using Block = LinearEntropyBlock;
  return (Block::rows + Block::vocab) * Block::depth + Block::rows * vocab;
}

// Rows begin .. end - 1.
BLT_CPU_KERNEL(linear_entropy, const LinearEntropyArgs& args, int64_t begin, int64_t end, void* scratch)
BLT_CPU_KERNEL(linear_entropy_logit_gradient, const LinearEntropyArgs& args, int64_t begin, int64_t end, void* scratch)
// Rows begin .. end - 1 and columns first .. last - 1.
BLT_CPU_KERNEL(product, const ProductArgs& args, int64_t begin, int64_t end, int64_t first, int64_t last)

}  // namespace blt::cpu
