// The entropy of rows of logits and its gradient, which entropy and linear_entropy share.
//
// With d_i = x_i - max x <= 0, S = sum e^d_i and W = sum d_i e^d_i:   H = ln S - W / S,
// where both terms are >= 0. This takes one exponential for each logit, and two passes over a row that lies in L1.
// d is clamped where e^d is 0, so that -inf contributes 0 * d = 0. NaN and +inf (as inf - inf) reach W as NaN.
#pragma once

#include "cpu/vec.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

BLT_INLINE float minus_infinity(float) { return -__builtin_inff(); }
BLT_INLINE double minus_infinity(double) { return -__builtin_inf(); }
BLT_INLINE bfloat16 minus_infinity(bfloat16) { return {0xff80}; }
BLT_INLINE float16 minus_infinity(float16) { return {0xfc00}; }

template <class A>
BLT_INLINE Vec<A> below_max(Vec<A> x, A max) {
  return maximum<A>(splat<A>(kExpFloor<A>), x - max);
}

template <class T>
BLT_INLINE Acc<T> row_max(const T* x, int64_t vocab) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t tail = vocab % L, whole = vocab - tail;
  Vec<A> a = load_n(x + whole, tail, minus_infinity(T{})), b = a;
  int64_t i = 0;
  for (; i + 2 * L <= whole; i += 2 * L) {
    a = maximum<A>(load(x + i), a);
    b = maximum<A>(load(x + i + L), b);
  }
  if (i < whole) {
    a = maximum<A>(load(x + i), a);
  }
  return horizontal_max<A>(maximum<A>(a, b));
}

// S and W, as one partial sum for each lane. The order of additions depends on V alone. Rounding errors stay small
// because a block has at least 16 chains of additions, and a long vocabulary has several blocks. `power` computes e^d.
// The entropy is a mean of many exponentials, so exp_nonpositive is exact enough; each element of the gradient has one
// exponential, so it takes exp.
template <class T, class Power>
BLT_INLINE void row_sums(const T* x, int64_t vocab, Acc<T> max, Vec<Acc<T>>& sum, Vec<Acc<T>>& dot,
                         const Power& power) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>, kChains = L < 16 ? 4 : 2, kBlock = 64 * L;
  Vec<A> sums[kChains], dots[kChains];
  const auto add = [&](int64_t chain, Vec<A> v) {
    const Vec<A> d = below_max<A>(v, max);
    const Vec<A> e = power(d);
    sums[chain] += e;
    dots[chain] += e * d;
  };
  sum = dot = Vec<A>{};
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    for (int64_t chain = 0; chain < kChains; ++chain) {
      sums[chain] = dots[chain] = Vec<A>{};
    }
    const int64_t end = min_of(begin + kBlock, vocab);
    int64_t i = begin;
    for (; i + kChains * L <= end; i += kChains * L) {
      for (int64_t chain = 0; chain < kChains; ++chain) {
        add(chain, load(x + i + chain * L));
      }
    }
    for (; i + L <= end; i += L) {
      add(0, load(x + i));
    }
    if (i < end) {
      add(1, load_n(x + i, end - i, minus_infinity(T{})));
    }
    for (int64_t chain = 0; chain < kChains; ++chain) {
      sum += sums[chain];
      dot += dots[chain];
    }
  }
}

template <class T>
BLT_INLINE void prefetch_row(const T* x, int64_t vocab) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < vocab; i += kLine) {
    __builtin_prefetch(x + i);
  }
}

// out[r] = H of row r. Within one row each stage waits for the result of the stage before, so every stage is done for a
// whole block of rows. Meanwhile the next block is fetched; both lie in L1.
template <class T>
BLT_INLINE void row_entropies(const T* x, int64_t rows, int64_t vocab, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>, kBlockBytes = 8192;
  const int64_t block = max_of(1, min_of(L, kBlockBytes / (vocab * int64_t(sizeof(T)))));
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t n = min_of(block, rows - begin);
    const T* row = x + begin * vocab;
    A max[L];
    Vec<A> sum[L], dot[L];
    for (int64_t i = 0; i < n; ++i) {
      max[i] = row_max(row + i * vocab, vocab);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (begin + block + i < rows) {
        prefetch_row(row + (block + i) * vocab, vocab);
      }
      row_sums(row + i * vocab, vocab, max[i], sum[i], dot[i], [](Vec<A> d) { return exp_nonpositive(d); });
    }
    Vec<A> s = splat<A>(1), w{};
    for (int64_t i = 0; i < n; ++i) {
      s[i] = horizontal_sum<A>(sum[i]);
      w[i] = horizontal_sum<A>(dot[i]);
    }
    store_n(out + begin, log(s) - w / s, n);
  }
}

// dH/dx_i = -p_i (ln p_i + H) = p_i (sum_j p_j d_j - d_i). In the last form no large terms cancel, and p_i = 0 gives 0.
template <class T>
BLT_INLINE void row_gradient(const T* x, int64_t vocab, Acc<T> grad, T* out) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  const A max = row_max(x, vocab);
  Vec<A> sum, dot;
  row_sums(x, vocab, max, sum, dot, [](Vec<A> d) { return exp(d); });
  const A s = horizontal_sum<A>(sum), mean = horizontal_sum<A>(dot) / s, scale = grad / s;
  const auto gradient = [&](Vec<A> v) {
    const Vec<A> d = below_max<A>(v, max);
    return exp(d) * (mean - d) * scale;
  };
  const int64_t whole = vocab - vocab % L, tail = vocab - whole;
  for (int64_t i = 0; i < whole; i += L) {
    store(out + i, gradient(load(x + i)));
  }
  store_n(out + whole, gradient(load_n(x + whole, tail)), tail);
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
