// entropy and its gradient. Each row has a warp.
// At least these bytes must move: the logits once and one entropy for each row; in backward the logits once and their
// gradient once. A row of up to 512 logits stays in registers, 16 for each lane. A longer row is read in chunks of that
// size, in backward twice.
//
// With d_i = x_i - m, where m is the largest logit so far, S = sum e^d_i and W = sum d_i e^d_i:   H = ln S - W / S.
// The lane of a logit depends on its position alone, so that the entropy of a row does not depend on where the row
// lies.
#pragma once

#include "cuda/device.h"
#include "cuda/entropy.h"

namespace blt::cuda {

constexpr int kEntropyThreads = 256, kEntropyWarps = kEntropyThreads / kWarp;
constexpr int kEntropyPack = 4, kEntropyPacks = 4;  // logits that follow each other in a lane, and such packs in a lane
constexpr int kEntropyChunk = kWarp * kEntropyPack * kEntropyPacks;

// e^d is 0 here and below.
template <class A>
constexpr A kExpFloor = sizeof(A) == 8 ? A(-800) : A(-150);

// x - max, clamped so that -inf contributes 0 * floor = 0. NaN stays NaN.
template <class A>
__device__ __forceinline__ A below_max(A x, A max) {
  const A d = x - max;
  return d < kExpFloor<A> ? kExpFloor<A> : d;
}

// Loads the logits of a lane in a chunk, and -inf past the end of the row.
template <class T>
__device__ __forceinline__ void load_chunk(const T* row, int64_t begin, int64_t vocab, int width,
                                           Acc<T> (&x)[kEntropyPacks][kEntropyPack]) {
  const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
  for (int p = 0; p < kEntropyPacks; ++p) {
    const int64_t i = begin + (p * kWarp + lane) * kEntropyPack;
    if (width == kEntropyPack && i + kEntropyPack <= vocab) {
      constexpr int kN = sizeof(T) == 8 ? 2 : 4;  // elements of an access of at most 16 bytes
#pragma unroll
      for (int k = 0; k < kEntropyPack; k += kN) {
        const Pack<T, kN> pack = load_once<kN>(row + i + k);
#pragma unroll
        for (int e = 0; e < kN; ++e) x[p][k + e] = widen(pack.data[e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kEntropyPack; ++e) {
        x[p][e] = i + e < vocab ? widen(row[i + e]) : minus_infinity<Acc<T>>();
      }
    }
  }
}

// The sums of a row so far, relative to `max`. Every lane of the warp has the same ones.
template <class A>
struct EntropySums {
  A max = minus_infinity<A>(), sum = 0, dot = 0;

  __device__ __forceinline__ void add(const A (&x)[kEntropyPacks][kEntropyPack]) {
    A top = x[0][0];
#pragma unroll
    for (int p = 0; p < kEntropyPacks; ++p) {
#pragma unroll
      for (int e = 0; e < kEntropyPack; ++e) top = x[p][e] > top || x[p][e] != x[p][e] ? x[p][e] : top;
    }
    top = warp_max(top);
    if (top == minus_infinity<A>()) {
      return;  // nothing but masked logits
    }
    const A raised = max > top || max != max ? max : top;
    if (sum != 0) {  // the sums so far become relative to the new maximum
      const A shift = below_max(max, raised), factor = exp_of(shift);
      dot = factor * (dot + shift * sum);
      sum *= factor;
    }
    max = raised;
    A s = 0, w = 0;
#pragma unroll
    for (int p = 0; p < kEntropyPacks; ++p) {
      A pack_s = 0, pack_w = 0;  // short sums, for accuracy
#pragma unroll
      for (int e = 0; e < kEntropyPack; ++e) {
        const A d = below_max(x[p][e], max), power = exp_of(d);
        pack_s += power;
        pack_w += power * d;
      }
      s += pack_s;
      w += pack_w;
    }
    sum += warp_sum(s);
    dot += warp_sum(w);
  }

  // NaN where every logit is -inf: 0 / 0.
  __device__ __forceinline__ A entropy() const { return log_of(sum) - dot / sum; }
};

template <class T>
__global__ void __launch_bounds__(kEntropyThreads) entropy_kernel(EntropyArgs args, int width) {
  using A = Acc<T>;
  const int64_t r = int64_t(blockIdx.x) * kEntropyWarps + threadIdx.x / kWarp;
  if (r >= args.rows) {
    return;
  }
  const T* row = static_cast<const T*>(args.logits) + r * args.vocab;
  EntropySums<A> sums;
  A x[kEntropyPacks][kEntropyPack];
  for (int64_t begin = 0; begin < args.vocab; begin += kEntropyChunk) {
    load_chunk(row, begin, args.vocab, width, x);
    sums.add(x);
  }
  if (threadIdx.x % kWarp == 0) {
    static_cast<A*>(args.out)[r] = sums.entropy();
  }
}

// dH/dx_i = p_i (W / S - d_i), in which no large terms cancel, and p_i = 0 gives 0.
template <class T>
__global__ void __launch_bounds__(kEntropyThreads) entropy_backward_kernel(EntropyBackwardArgs args, int width) {
  using A = Acc<T>;
  const int64_t r = int64_t(blockIdx.x) * kEntropyWarps + threadIdx.x / kWarp;
  if (r >= args.rows) {
    return;
  }
  const T* row = static_cast<const T*>(args.logits) + r * args.vocab;
  T* out = static_cast<T*>(args.out) + r * args.vocab;
  EntropySums<A> sums;
  A x[kEntropyPacks][kEntropyPack];
  for (int64_t begin = 0; begin < args.vocab; begin += kEntropyChunk) {
    load_chunk(row, begin, args.vocab, width, x);
    sums.add(x);
  }
  const A mean = sums.dot / sums.sum, scale = static_cast<const A*>(args.grad)[r] / sums.sum;
  const int lane = int(threadIdx.x) % kWarp;
  for (int64_t begin = 0; begin < args.vocab; begin += kEntropyChunk) {
    if (args.vocab > kEntropyChunk) {
      load_chunk(row, begin, args.vocab, width, x);
    }
#pragma unroll
    for (int p = 0; p < kEntropyPacks; ++p) {
      const int64_t i = begin + (p * kWarp + lane) * kEntropyPack;
      T g[kEntropyPack];
#pragma unroll
      for (int e = 0; e < kEntropyPack; ++e) {
        const A d = below_max(x[p][e], sums.max);
        g[e] = narrow<T>(exp_of(d) * (mean - d) * scale);
      }
      if (width == kEntropyPack && i + kEntropyPack <= args.vocab) {
        constexpr int kN = sizeof(T) == 8 ? 2 : 4;
#pragma unroll
        for (int k = 0; k < kEntropyPack; k += kN) {
          Pack<T, kN> pack;
#pragma unroll
          for (int e = 0; e < kN; ++e) pack.data[e] = g[k + e];
          store_once<kN>(out + i + k, pack);
        }
      } else {
#pragma unroll
        for (int e = 0; e < kEntropyPack; ++e) {
          if (i + e < args.vocab) out[i + e] = g[e];
        }
      }
    }
  }
}

}  // namespace blt::cuda
