// Portable SIMD for the CPU kernels, on the vector extensions of GCC and Clang.
//
// It is our own: xsimd and torch's Vectorized include the C++ standard library, whose inline functions the copies for
// several instruction sets would share, and Highway would be one more dependency for the few operations below.
//
// Only csrc/cpu/<op>.cpp includes this header. CMake compiles these files once for each instruction set, and
// BLT_CPU_CAPABILITY names the namespace. Two rules keep an AVX-512 instruction from reaching an older processor
// through an inline function that two copies share: everything here and in the kernels lives in that namespace, and
// none of them includes a header of torch or of the C++ standard library.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "common/kernel.h"

#define BLT_INLINE_LAMBDA __attribute__((always_inline))

namespace blt::cpu::BLT_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int64_t kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVecBytes = 32;
#else
constexpr int64_t kVecBytes = 16;
#endif

template <class T, int64_t Bytes = kVecBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
// A register of floats or doubles, the two types in which the kernels compute.
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int64_t kLanes = kVecBytes / int64_t(sizeof(A));

// The integer as wide as an element.
template <size_t Bytes>
struct IntOf {
  using type = int32_t;
};
template <>
struct IntOf<8> {
  using type = int64_t;
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <class To, class From>
BLT_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class A>
BLT_INLINE Vec<A> splat(A value) {
  return Vec<A>{} + value;  // {} is +0, and x + 0 is x for every x except -0, which no caller tells from 0
}

BLT_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
BLT_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- conversions between fp32 and 16 bits, a register at a time -----------------------------------------------------

using F32 = Vec<float>;
using I32 = VecOf<int32_t>::type;
using U32 = VecOf<uint32_t>::type;
using U16 = VecOf<uint16_t, kVecBytes / 2>::type;  // as many lanes as F32

BLT_INLINE F32 widen(U16 bits, bfloat16) { return bit_cast<F32>(__builtin_convertvector(bits, U32) << 16); }

BLT_INLINE U16 narrow(F32 x, bfloat16) {
  const U32 bits = bit_cast<U32>(x);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // nearest, ties to even
  const I32 is_nan = x != x;
  return __builtin_convertvector(is_nan ? (U32{} + 0x7fc0u) : rounded, U16);
}

#if defined(__F16C__)
#if defined(__AVX512F__)
BLT_INLINE F32 widen(U16 bits, float16) { return bit_cast<F32>(_mm512_cvtph_ps(bit_cast<__m256i>(bits))); }
BLT_INLINE U16 narrow(F32 x, float16) {
  return bit_cast<U16>(_mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
BLT_INLINE F32 widen(U16 bits, float16) { return bit_cast<F32>(_mm256_cvtph_ps(bit_cast<__m128i>(bits))); }
BLT_INLINE U16 narrow(F32 x, float16) {
  return bit_cast<U16>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#endif
#else
// Integer shifts put the exponent in place; a multiplication by 2^112 then corrects its bias and renormalises
// subnormals.
BLT_INLINE F32 widen(U16 bits, float16) {
  const U32 h = __builtin_convertvector(bits, U32);
  const U32 magnitude = (h & 0x7fffu) << 13;
  const F32 scaled = bit_cast<F32>(magnitude) * 0x1p112f;
  const U32 special = bit_cast<U32>((h & 0x7c00u) == 0x7c00u);
  const U32 value = (special & (magnitude | 0x7f800000u)) | (~special & bit_cast<U32>(scaled));
  return bit_cast<F32>(value | ((h & 0x8000u) << 16));
}
BLT_INLINE U16 narrow(F32 x, float16) {
  const U32 bits = bit_cast<U32>(x);
  const U32 sign = (bits >> 16) & 0x8000u;
  const U32 magnitude = bits & 0x7fffffffu;
  // For normal results the bias is changed, and the 13 dropped bits are rounded to nearest even.
  const U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // For subnormal results an addition of 0.5 leaves the value in the low mantissa bits, rounded by the hardware.
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(magnitude) + 0.5f) - 0x3f000000u;
  const U32 is_small = bit_cast<U32>(magnitude < (113u << 23));
  const U32 is_large = bit_cast<U32>(magnitude >= 0x477ff000u);  // rounds to 2^16 or above: infinity
  const U32 is_nan = bit_cast<U32>(magnitude > 0x7f800000u);
  U32 result = (is_small & subnormal) | (~is_small & normal);
  result = (is_large & 0x7c00u) | (~is_large & result);
  result = (is_nan & 0x7e00u) | (~is_nan & result);
  return __builtin_convertvector(result | sign, U16);
}
#endif

// ---- unaligned loads and stores of whole registers or of the first n lanes ------------------------------------------

template <class T>
BLT_INLINE Vec<Acc<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    U16 bits;
    memcpy(&bits, p, sizeof(bits));
    return widen(bits, T{});
  } else {
    Vec<T> v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <class T>
BLT_INLINE void store(T* p, Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const U16 bits = narrow(v, T{});
    memcpy(p, &bits, sizeof(bits));
  } else {
    memcpy(p, &v, sizeof(v));
  }
}

#if defined(__AVX512F__)
BLT_INLINE uint32_t first_lanes(int64_t n) { return (1u << n) - 1; }
#elif defined(__AVX2__)
BLT_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// Lanes n and above are `fill`. Nothing beyond p[n - 1] is read; the loads are masked where the instruction set can.
template <class T>
BLT_INLINE Vec<Acc<T>> load_n(const T* p, int64_t n, T fill = T{}) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const __m256i bits = _mm256_mask_loadu_epi16(_mm256_set1_epi16(bit_cast<int16_t>(fill)), first_lanes(n), p);
    return widen(bit_cast<U16>(bits), T{});
  } else if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256i mask = first_lanes(n);
    return bit_cast<Vec<T>>(
        _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask)));
  }
#endif
  T buffer[kLanes<Acc<T>>];
  for (int64_t i = 0; i < kLanes<Acc<T>>; ++i) {
    buffer[i] = i < n ? p[i] : fill;
  }
  return load(buffer);
}

template <class T>
BLT_INLINE void store_n(T* p, Vec<Acc<T>> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    return _mm256_mask_storeu_epi16(p, first_lanes(n), bit_cast<__m256i>(narrow(v, T{})));
  } else if constexpr (sizeof(T) == 4) {
    return _mm512_mask_storeu_ps(p, first_lanes(n), bit_cast<__m512>(v));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return _mm256_maskstore_ps(p, first_lanes(n), bit_cast<__m256>(v));
  }
#endif
  T buffer[kLanes<Acc<T>>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) {
    p[i] = buffer[i];
  }
}

// Stores a whole register past the caches, so that the cache line need not be read first. This is for outputs that
// would not stay in any cache (see wants_streaming in ops/tensor.h). p must be aligned to the number of bytes stored,
// and the caller must call stream_fence() after the last store.
template <class T>
BLT_INLINE void stream(T* p, Vec<Acc<T>> v) {
#if defined(__SSE2__)
  constexpr int64_t bytes = kLanes<Acc<T>> * int64_t(sizeof(T));
  alignas(64) T buffer[kLanes<Acc<T>>];
  store(buffer, v);
#if defined(__AVX512F__)
  if constexpr (bytes == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(buffer));
  }
#endif
#if defined(__AVX__)
  if constexpr (bytes == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(buffer));
  }
#endif
  if constexpr (bytes == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(buffer));
  } else if constexpr (bytes == 8) {
    _mm_stream_si64(reinterpret_cast<long long*>(p), bit_cast<long long>(buffer));
  }
#else
  store(p, v);
#endif
}

BLT_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Loads and stores of one element.
template <class T>
BLT_INLINE Acc<T> load1(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return load_n(p, 1)[0];
  } else {
    return *p;
  }
}
template <class T>
BLT_INLINE void store1(T* p, Acc<T> value) {
  if constexpr (sizeof(T) == 2) {
    store_n(p, splat<float>(value), 1);
  } else {
    *p = value;
  }
}

// ---- reductions and functions --------------------------------------------------------------------------------------

template <class A, int64_t Bytes, class Combine>
BLT_INLINE A fold(const void* lanes, Combine combine) {
  if constexpr (Bytes == 2 * sizeof(A)) {
    A last[2];
    memcpy(last, lanes, Bytes);
    return combine(last[0], last[1]);
  } else {
    typename VecOf<A, Bytes / 2>::type halves[2];
    memcpy(halves, lanes, Bytes);
    const typename VecOf<A, Bytes / 2>::type folded = combine(halves[0], halves[1]);
    return fold<A, Bytes / 2>(&folded, combine);
  }
}

// Adds lane i to lane i + half, again and again, so that the order of additions never depends on the shape of the
// tensor.
template <class A>
BLT_INLINE A horizontal_sum(Vec<A> v) {
  return fold<A, kVecBytes>(&v, [](auto a, auto b) { return a + b; });
}

template <int64_t... I>
struct Indices {};
template <int64_t N, int64_t... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int64_t... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

// a0 + a1, a2 + a3, ..., b0 + b1, b2 + b3, ...
template <class A, int64_t... I>
BLT_INLINE Vec<A> add_pairs(Vec<A> a, Vec<A> b, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
  using Mask = typename VecOf<typename IntOf<sizeof(A)>::type>::type;
  return __builtin_shuffle(a, b, Mask{(2 * I)...}) + __builtin_shuffle(a, b, Mask{(2 * I + 1)...});
#endif
}

// Writes the sums of N registers to sums[0 .. N - 1], and up to the end of the last whole register. Each sum is the
// same tree of neighbouring lanes, whatever N and the place of the register.
template <class A, int64_t N, int64_t Width = kLanes<A>>
BLT_INLINE void horizontal_sums(Vec<A>* v, A* sums) {
  if constexpr (Width > 1) {
    constexpr int64_t half = (N + 1) / 2;
#pragma GCC unroll 16
    for (int64_t i = 0; i < half; ++i) {
      v[i] = add_pairs<A>(v[2 * i], v[2 * i + 1 < N ? 2 * i + 1 : 2 * i], typename MakeIndices<kLanes<A>>::type{});
    }
    horizontal_sums<A, half, Width / 2>(v, sums);
  } else {
    memcpy(sums, v, size_t(N) * sizeof(v[0]));
  }
}

template <class A>
BLT_INLINE A horizontal_max(Vec<A> v) {
  return fold<A, kVecBytes>(&v, [](auto a, auto b) { return a > b ? a : b; });
}

template <class A>
BLT_INLINE Vec<A> maximum(Vec<A> a, Vec<A> b) {  // b where either is NaN
  // An intrinsic is one instruction. GCC makes two of a > b ? a : b, a comparison and a blend, where one side is
  // constant.
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return bit_cast<F32>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    return bit_cast<F32>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
  }
#elif defined(__SSE__)
  if constexpr (sizeof(A) == 4) {
    return bit_cast<F32>(_mm_max_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
  }
#endif
  return a > b ? a : b;
}

// e^x to within 1 ulp for x <= 88.7. Below -87.3 it is 0, because results under 2^-126 are flushed. NaN stays NaN.
BLT_INLINE F32 exp(F32 x) {
  const F32 clamped = x < -87.336544f ? splat<float>(-87.336544f) : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits.
  const F32 shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const F32 n = shifted - 12582912.0f;
  F32 r = clamped - n * 0.693359375f;  // ln 2 has two parts, so that this first product is exact
  r = r + n * 2.12194440e-4f;
  // A minimax polynomial of (e^r - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2] (Cephes).
  F32 p = splat<float>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const F32 e = p * (r * r) + r + 1.0f;
  const U32 scaled = bit_cast<U32>(e) + (bit_cast<U32>(shifted) << 23);
  const F32 result = bit_cast<F32>(scaled);
  const F32 flushed = x < -87.336544f ? F32{} : result;
  return x == x ? flushed : x;
}

BLT_INLINE Vec<double> exp(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) {
    x[i] = ::exp(x[i]);
  }
  return x;
}

// e^x for x <= 0, to within 1 + |x| / 8 ulp (on the baseline |x| / 2). The caller clamps x to kExpFloor, where the
// result is exactly 0. This takes the fewest instructions; it is for sums of many exponentials.
template <class A>
constexpr A kExpFloor = A(-88.0296919);  // 2^-127 has the bits of 0
template <>
constexpr double kExpFloor<double> = -760;

#if defined(__AVX2__)
// The bits of 2^(j / K) for each of K lanes, minus j at the place to which the shift of the exponent moves j.
#if defined(__AVX512F__)
alignas(64) constexpr uint32_t kExp2Powers[16] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
#else
alignas(32) constexpr uint32_t kExp2Powers[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                                 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
#endif

// x / ln 2 = n + j / K + f, where n goes to the exponent, 2^(j / K) comes from a register, and a cubic polynomial is
// enough for 2^f, because |f| <= 1 / 2K.
BLT_INLINE F32 exp_nonpositive(F32 x) {
  constexpr int kExponent = kVecBytes == 64 ? 19 : 20;  // j / K = 1 is bit 23
  U32 powers;
  memcpy(&powers, kExp2Powers, sizeof(powers));
  // Adding 1.5 * 2^23 / K rounds to a multiple of 1 / K and leaves it in the low mantissa bits.
  constexpr float kRound = 12582912.0f / float(kLanes<float>);
  const F32 shifted = x * 1.44269504088896341f + kRound;
  const F32 f = x * 1.44269504088896341f - (shifted - kRound);
#if defined(__AVX512F__)
  const U32 power = bit_cast<U32>(_mm512_permutexvar_epi32(bit_cast<__m512i>(shifted), bit_cast<__m512i>(powers)));
#else
  const U32 power = bit_cast<U32>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(powers), bit_cast<__m256i>(shifted)));
#endif
  const F32 scale = bit_cast<F32>(power + (bit_cast<U32>(shifted) << kExponent));
  F32 p = splat<float>(5.54890037e-2f);  // minimax polynomial of 2^f, 1 at 0
  p = p * f + 2.40257517e-1f;
  p = p * f + 6.93147242e-1f;
  return scale + scale * (p * f);
}
#else
BLT_INLINE F32 exp_nonpositive(F32 x) {
  const F32 t = x * 1.44269504088896341f;
  const F32 shifted = t + 12582912.0f;
  const F32 f = t - (shifted - 12582912.0f);
  F32 p = splat<float>(1.53264729e-4f);  // minimax polynomial of 2^f on [-1/2, 1/2], 1 at 0
  p = p * f + 1.33908074e-3f;
  p = p * f + 9.61850584e-3f;
  p = p * f + 5.55035993e-2f;
  p = p * f + 2.40226477e-1f;
  p = p * f + 6.93147182e-1f;
#if defined(__FP_FAST_FMAF)
  // With fused multiply-adds f is not exactly 0 at kExpFloor, and the bits below would be those of NaN. 2^n is exactly
  // 0.
  const F32 scale = bit_cast<F32>((bit_cast<U32>(shifted) << 23) + 0x3f800000u);
  return scale + scale * (p * f);
#else
  p = p * f + 1.0f;
  return bit_cast<F32>(bit_cast<U32>(p) + (bit_cast<U32>(shifted) << 23));
#endif
}
#endif

BLT_INLINE Vec<double> exp_nonpositive(Vec<double> x) { return exp(x); }

// ln x to within 1 ulp for normal, positive, finite x. NaN stays NaN.
BLT_INLINE F32 log(F32 x) {
  const I32 bits = bit_cast<I32>(x);
  const I32 exponent = (bits - 0x3f3504f3) >> 23;  // x = m * 2^exponent, m in [sqrt(1/2), sqrt(2)]
  const F32 e = __builtin_convertvector(exponent, F32);
  const F32 f = bit_cast<F32>(bits - (exponent << 23)) - 1.0f;
  F32 p = splat<float>(7.0376836292e-2f);  // minimax polynomial of (ln(1 + f) - f + f^2 / 2) / f^3 (Cephes)
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const F32 square = f * f;
  const F32 small = p * f * square - e * 2.12194440e-4f - 0.5f * square;
  const F32 result = e * 0.693359375f + (f + small);
  return x == x ? result : x;
}

BLT_INLINE Vec<double> log(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) {
    x[i] = ::log(x[i]);
  }
  return x;
}

BLT_INLINE float exp1(float x) { return exp(splat<float>(x))[0]; }
BLT_INLINE double exp1(double x) { return ::exp(x); }

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
