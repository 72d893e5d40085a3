// The hash of n-grams: which row of a table an n-gram reads. The CPU and the CUDA kernels share it.
#pragma once

#include "common/kernel.h"

namespace blt {

// Tokens, and what the hash needs to know besides the n-gram sizes and the primes.
struct NgramHash {
  const int32_t* tokens32;  // one of the two is set
  const int64_t* tokens64;
  int num_sizes, num_primes;
  int64_t num_rows;     // V
  uint64_t reciprocal;  // (2^64 - 1) / V
  uint64_t wrap;        // 2^64 mod V
};

constexpr int kMaxTables = 1024;  // the largest number of tables, num_sizes * num_primes

}  // namespace blt

namespace BLT_KERNEL_NAMESPACE {

// The upper half of the product.
BLT_INLINE uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDACC__)
  return __umul64hi(a, b);
#else
  return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// h, read as int64, floor-mod V. The quotient by the rounded-down reciprocal is right or one too small.
BLT_INLINE int64_t floor_mod(const NgramHash& hash, uint64_t h) {
  const uint64_t v = uint64_t(hash.num_rows);
  uint64_t rest = h - multiply_high(h, hash.reciprocal) * v;
  rest = rest >= v ? rest - v : rest;
  if (int64_t(h) < 0) {  // h stands for h - 2^64
    rest = rest >= hash.wrap ? rest - hash.wrap : rest + v - hash.wrap;
  }
  return int64_t(rest);
}

BLT_INLINE uint64_t token(const NgramHash& hash, int64_t j) {
  return hash.tokens64 != nullptr ? uint64_t(hash.tokens64[j]) : uint64_t(int64_t(hash.tokens32[j]));
}

BLT_INLINE uint64_t power(uint64_t base, int64_t exponent) {
  uint64_t result = 1;
  for (; exponent > 0; exponent /= 2, base *= base) {
    result *= exponent % 2 == 1 ? base : 1;
  }
  return result;
}

// Calls emit(k, id) for the n-gram of size size_at(k) that ends at position j of a sequence that starts at `start`, for
// k = 0 .. num_sizes - 1. The sizes ascend, so that each hash continues the one before it.
template <class SizeAt, class Emit>
BLT_INLINE void hash_ngrams(const NgramHash& hash, uint64_t prime, int64_t start, int64_t j, const SizeAt& size_at,
                            const Emit& emit) {
  uint64_t h = token(hash, j);
  int64_t size = 1;
  for (int k = 0; k < hash.num_sizes; ++k) {
    const int64_t wanted = size_at(k);
    for (; size < wanted && j - size >= start; ++size) {
      h = token(hash, j - size) + prime * h;
    }
    h *= power(prime, wanted - size);  // the tokens before the start count as zeros
    size = wanted;
    emit(k, floor_mod(hash, h));
  }
}

}  // namespace BLT_KERNEL_NAMESPACE
