// entropy and its gradient of long rows. Each row has a warp, which reads it in chunks, in backward twice.
#pragma once

#include "cuda/entropy.h"
#include "cuda/entropy_sums.cuh"

namespace blt::cuda {

template <class T>
struct LongRow {
  using A = Acc<T>;
  static constexpr int kQuads = 16 / int(sizeof(T)), kStep = kWarp * kEntropyQuad, kChunk = kQuads * kStep;

  int64_t vocab;
  bool packed;  // quads are aligned

  __device__ __forceinline__ static int64_t first_of_lane() { return int64_t(threadIdx.x % kWarp) * kEntropyQuad; }

  // Loads the quads of a lane in a chunk, and -inf past the end of the row.
  __device__ __forceinline__ void load(const T* row, int64_t begin, Quad<T> (&x)[kQuads]) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int64_t i = begin + q * kStep + first_of_lane();
      if (packed && i < vocab) {
        x[q] = load_quad(row + i);
      } else {
        Pack<T, kEntropyQuad> pack;
#pragma unroll
        for (int e = 0; e < kEntropyQuad; ++e) {
          pack.data[e] = i + e < vocab ? row[i + e] : narrow<T>(minus_infinity<A>());
        }
        x[q] = bit_cast<Quad<T>>(pack);
      }
    }
  }

  __device__ __forceinline__ void store(T* row, int64_t begin, int q, const Quad<T>& x) const {
    const int64_t i = begin + q * kStep + first_of_lane();
    if (packed && i < vocab) {
      store_quad(row + i, x);
    } else {
      const auto pack = bit_cast<Pack<T, kEntropyQuad>>(x);
#pragma unroll
      for (int e = 0; e < kEntropyQuad; ++e) {
        if (i + e < vocab) row[i + e] = pack.data[e];
      }
    }
  }

  // The same in every lane. The lanes' sums so far are relative to the largest logit so far.
  __device__ __forceinline__ void sums(const T* row, A& max, A& sum, A& dot) const {
    EntropySums<A> sums;
    max = minus_infinity<A>();
#pragma unroll 1
    for (int64_t begin = 0; begin < vocab; begin += kChunk) {
      Quad<T> quads[kQuads];
      load(row, begin, quads);
      Largest<T> largest;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) largest.add(quads[q]);
      const A raised = max_or_nan(max, largest.template over_lanes<kWarp>());
      if (raised == minus_infinity<A>()) {
        continue;  // nothing but masked logits
      }
      if (raised != max) {
        sums.scale(below_max(max, raised));
        max = raised;
      }
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        A x[kEntropyQuad];
        widen_quad<T>(quads[q], x);
#pragma unroll
        for (int e = 0; e < kEntropyQuad; ++e) sums.add(e, below_max(x[e], max));
      }
    }
    sum = sum_over_lanes<kWarp>(sums.sum());
    dot = sum_over_lanes<kWarp>(sums.dot());
  }
};

template <class T>
__global__ void __launch_bounds__(kEntropyThreads, 2) long_entropy_kernel(EntropyArgs args, bool packed) {
  using A = Acc<T>;
  const int64_t r = int64_t(blockIdx.x) * kEntropyWarps + threadIdx.x / kWarp;
  if (r >= args.rows) {
    return;
  }
  A max, sum, dot;
  LongRow<T>{args.vocab, packed}.sums(static_cast<const T*>(args.logits) + r * args.vocab, max, sum, dot);
  if (threadIdx.x % kWarp == 0) {
    static_cast<A*>(args.out)[r] = entropy_of(sum, dot);
  }
}

template <class T>
__global__ void __launch_bounds__(kEntropyThreads, 2)
    long_entropy_backward_kernel(EntropyBackwardArgs args, bool packed) {
  using A = Acc<T>;
  using Row = LongRow<T>;
  const int64_t r = int64_t(blockIdx.x) * kEntropyWarps + threadIdx.x / kWarp;
  if (r >= args.rows) {
    return;
  }
  const T* logits = static_cast<const T*>(args.logits) + r * args.vocab;
  T* out = static_cast<T*>(args.out) + r * args.vocab;
  const Row row{args.vocab, packed};
  A max, sum, dot;
  row.sums(logits, max, sum, dot);
  const EntropyGradient<T> gradient(max, sum, dot, static_cast<const A*>(args.grad)[r]);
#pragma unroll 1
  for (int64_t begin = 0; begin < args.vocab; begin += Row::kChunk) {
    Quad<T> quads[Row::kQuads];
    row.load(logits, begin, quads);
#pragma unroll
    for (int q = 0; q < Row::kQuads; ++q) row.store(out, begin, q, gradient.of(quads[q]));
  }
}

}  // namespace blt::cuda
