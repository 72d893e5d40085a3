// What entropy and its gradient compute, whatever the length of a row.
// At least these bytes must move: the logits once and one entropy for each row; in backward the logits once and their
// gradient once.
//
// With d_i = x_i - m, where m is the largest logit, S = sum e^d_i and W = sum d_i e^d_i:   H = ln S - W / S. The
// largest logit is subtracted before anything is multiplied, so that its d is exactly 0, and so is H where it is
// certain.
//
// The lane that takes a logit depends on the logit's position alone, so that the entropy of a row does not depend on
// where the row lies.
#pragma once

#include <type_traits>

#include "cuda/device.h"

namespace blt::cuda {

constexpr int kEntropyQuad = 4;  // logits that follow each other in a lane
constexpr int kEntropyThreads = 256, kEntropyWarps = kEntropyThreads / kWarp;

// e^d is 0 here and below.
template <class A>
constexpr A kExpFloor = sizeof(A) == 8 ? A(-800) : A(-150);

// x - max, clamped so that -inf contributes 0 * floor = 0. NaN stays NaN.
template <class A>
__device__ __forceinline__ A below_max(A x, A max) {
  const A d = x - max;
  return d < kExpFloor<A> ? kExpFloor<A> : d;
}

__device__ __forceinline__ float power_of(float d) { return exp2_approx(d * 1.44269504f); }  // e^d
__device__ __forceinline__ double power_of(double d) { return exp(d); }

__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

__device__ __forceinline__ double max_or_nan(double a, double b) { return a > b || a != a ? a : b; }

// Logits that follow each other, as they are loaded.
template <class T>
using Quad = std::conditional_t<sizeof(T) == 2, uint2, Pack<T, kEntropyQuad>>;

template <class T>
__device__ __forceinline__ void widen_quad(const Quad<T>& quad, Acc<T> (&x)[kEntropyQuad]) {
  if constexpr (sizeof(T) == 2) {
    x[0] = low_of<T>(quad.x), x[1] = high_of<T>(quad.x), x[2] = low_of<T>(quad.y), x[3] = high_of<T>(quad.y);
  } else {
#pragma unroll
    for (int e = 0; e < kEntropyQuad; ++e) x[e] = quad.data[e];
  }
}

template <class T>
__device__ __forceinline__ Quad<T> narrow_quad(const Acc<T> (&x)[kEntropyQuad]) {
  if constexpr (sizeof(T) == 2) {
    return {pair_of<T>(x[0], x[1]), pair_of<T>(x[2], x[3])};
  } else {
    return {x[0], x[1], x[2], x[3]};
  }
}

// Loads and stores quads that are aligned and not used again.
template <class T>
__device__ __forceinline__ Quad<T> load_quad(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return __ldcs(reinterpret_cast<const uint2*>(p));
  } else {
    constexpr int kN = 16 / int(sizeof(T));
    Quad<T> quad;
#pragma unroll
    for (int k = 0; k < kEntropyQuad; k += kN) {
      const Pack<T, kN> part = load_once<kN>(p + k);
#pragma unroll
      for (int e = 0; e < kN; ++e) quad.data[k + e] = part.data[e];
    }
    return quad;
  }
}
template <class T>
__device__ __forceinline__ void store_quad(T* p, const Quad<T>& quad) {
  if constexpr (sizeof(T) == 2) {
    __stcs(reinterpret_cast<uint2*>(p), quad);
  } else {
    constexpr int kN = 16 / int(sizeof(T));
#pragma unroll
    for (int k = 0; k < kEntropyQuad; k += kN) {
      Pack<T, kN> part;
#pragma unroll
      for (int e = 0; e < kN; ++e) part.data[e] = quad.data[k + e];
      store_once<kN>(p + k, part);
    }
  }
}

// The largest logit, or NaN where there is one. Logits of 16 bits are compared in pairs.
template <class T>
class Largest {
 public:
  __device__ __forceinline__ void add(const Quad<T>& x) {
    if constexpr (sizeof(T) == 2) {
      top_ = max_or_nan_pair<T>(max_or_nan_pair<T>(top_, x.x), x.y);
    } else {
#pragma unroll
      for (int e = 0; e < kEntropyQuad; ++e) top_ = max_or_nan(top_, x.data[e]);
    }
  }
  __device__ __forceinline__ void add(T x) {
    if constexpr (sizeof(T) == 2) {
      top_ = max_or_nan_pair<T>(top_, x.bits * 0x10001u);
    } else {
      top_ = max_or_nan(top_, x);
    }
  }

  template <int Lanes>
  __device__ __forceinline__ Acc<T> over_lanes() const {
    Top top = top_;
#pragma unroll
    for (int lanes = Lanes / 2; lanes > 0; lanes /= 2) {
      const Top other = __shfl_xor_sync(kFullWarp, top, lanes);
      if constexpr (sizeof(T) == 2) {
        top = max_or_nan_pair<T>(top, other);
      } else {
        top = max_or_nan(top, other);
      }
    }
    if constexpr (sizeof(T) == 2) {
      return max_or_nan(low_of<T>(top), high_of<T>(top));
    } else {
      return top;
    }
  }

 private:
  using Top = std::conditional_t<sizeof(T) == 2, uint32_t, T>;
  static __device__ __forceinline__ Top lowest() {
    if constexpr (sizeof(T) == 2) {
      return std::is_same_v<T, bfloat16> ? 0xff80ff80u : 0xfc00fc00u;
    } else {
      return minus_infinity<T>();
    }
  }
  Top top_ = lowest();
};

// The sums of a lane, relative to a maximum: S and W of the file's head. Each of the logits of a pack has its own sum,
// for accuracy and because such additions need not wait for each other.
template <class A>
struct EntropySums {
  A s[kEntropyQuad] = {-A(0), -A(0), -A(0), -A(0)};  // -0 + x is x, so that the first addition vanishes
  A w[kEntropyQuad] = {};

  // The multiply-add is spelled out: were the compiler free to fuse it with another addition, the sums of rows with and
  // without a clamp could differ.
  __device__ __forceinline__ void add(int e, A d) {
    const A power = power_of(d);
    s[e] += power;
    w[e] = fused_multiply_add(power, d, w[e]);
  }
  // Makes the sums relative to a maximum that is larger by -shift.
  __device__ __forceinline__ void scale(A shift) {
    const A factor = power_of(shift);
#pragma unroll
    for (int e = 0; e < kEntropyQuad; ++e) {
      w[e] = factor * (w[e] + shift * s[e]);
      s[e] *= factor;
    }
  }
  __device__ __forceinline__ A sum() const { return (s[0] + s[1]) + (s[2] + s[3]); }
  __device__ __forceinline__ A dot() const { return (w[0] + w[1]) + (w[2] + w[3]); }
};

template <int Lanes, class A>
__device__ __forceinline__ A sum_over_lanes(A x) {
#pragma unroll
  for (int lanes = Lanes / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kFullWarp, x, lanes);
  return x;
}

// NaN where every logit is -inf: 0 / 0.
template <class A>
__device__ __forceinline__ A entropy_of(A sum, A dot) {
  return log_of(sum) - dot / sum;
}

// dH/dx_i = p_i (W / S - d_i), in which no large terms cancel, and p_i = 0 gives 0.
template <class T>
struct EntropyGradient {
  using A = Acc<T>;
  A max, mean, scale;

  __device__ __forceinline__ EntropyGradient(A max, A sum, A dot, A grad)
      : max(max), mean(dot / sum), scale(grad / sum) {}

  __device__ __forceinline__ A of(A x) const {
    const A d = below_max(x, max);
    return power_of(d) * scale * (mean - d);
  }
  __device__ __forceinline__ Quad<T> of(const Quad<T>& quad) const {
    A x[kEntropyQuad];
    widen_quad<T>(quad, x);
#pragma unroll
    for (int e = 0; e < kEntropyQuad; ++e) x[e] = of(x[e]);
    return narrow_quad<T>(x);
  }
};

}  // namespace blt::cuda
