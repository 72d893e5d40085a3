// What the kernels (.cuh) need of CUDA beyond the language. Each has a version for the host, because nvcc includes this
// file, and so does g++ with BLT_EMULATE_CUDA, where csrc/testing/emulator.h runs CUDA's execution model on host
// threads.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

#if defined(BLT_EMULATE_CUDA)
#include <cmath>
#include <cstring>

#include "testing/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace blt::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// ---- conversions ----------------------------------------------------------------------------------------------------

template <class To, class From>
__device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(float16 x) {
#if defined(BLT_EMULATE_CUDA)
  return float(bit_cast<_Float16>(x.bits));
#else
  return __half2float(bit_cast<__half>(x.bits));
#endif
}

template <class T>
__device__ __forceinline__ T narrow(Acc<T> x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double narrow<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float x) {
#if defined(BLT_EMULATE_CUDA)
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};  // round to nearest, ties to even
#else
  return bit_cast<bfloat16>(__float2bfloat16_rn(x));
#endif
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float x) {
#if defined(BLT_EMULATE_CUDA)
  return bit_cast<float16>(_Float16(x));
#else
  return bit_cast<float16>(__float2half_rn(x));
#endif
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp_of(float x) {
#if defined(BLT_EMULATE_CUDA)
  return std::exp(x);
#else
  return __expf(x);
#endif
}
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

// One instruction of the special function unit each. Subnormal arguments and results count as 0.
__device__ __forceinline__ float exp2_approx(float x) {  // 2 ulp
#if defined(BLT_EMULATE_CUDA)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float log2_approx(float x) {  // absolute error 2^-22 between 0.5 and 2, relative elsewhere
#if defined(BLT_EMULATE_CUDA)
  return std::log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float reciprocal_approx(float x) {  // 1 ulp
#if defined(BLT_EMULATE_CUDA)
  return 1 / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The larger or smaller of two numbers; NaN if one of them is NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}
__device__ __forceinline__ float min_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a < b || a != a ? a : b;
#endif
}
__device__ __forceinline__ double max_or_nan(double a, double b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ double min_or_nan(double a, double b) { return a < b || a != a ? a : b; }

// ---- pairs: two 16-bit elements in a register, the first of them in the low half
// ----------------------------------------

template <class T>
__device__ __forceinline__ float low_of(uint32_t pair) {
  static_assert(sizeof(T) == 2);
  return widen(bit_cast<T>(uint16_t(pair)));
}
template <class T>
__device__ __forceinline__ float high_of(uint32_t pair) {
  static_assert(sizeof(T) == 2);
  return widen(bit_cast<T>(uint16_t(pair >> 16)));
}
template <>
__device__ __forceinline__ float high_of<bfloat16>(uint32_t pair) {
  return bit_cast<float>(pair & 0xffff0000u);
}

#if defined(BLT_EMULATE_CUDA)
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  return uint32_t(narrow<T>(high).bits) << 16 | narrow<T>(low).bits;
}
// Pair by pair the larger or smaller element; NaN where one of the two is NaN.
template <class T>
__device__ __forceinline__ uint32_t max_or_nan_pair(uint32_t a, uint32_t b) {
  return pair_of<T>(max_or_nan(low_of<T>(a), low_of<T>(b)), max_or_nan(high_of<T>(a), high_of<T>(b)));
}
template <class T>
__device__ __forceinline__ uint32_t min_or_nan_pair(uint32_t a, uint32_t b) {
  return pair_of<T>(min_or_nan(low_of<T>(a), low_of<T>(b)), min_or_nan(high_of<T>(a), high_of<T>(b)));
}
// Pair by pair 1 where the elements are equal, as numbers are, and 0 elsewhere.
template <class T>
__device__ __forceinline__ uint32_t equal_pair(uint32_t a, uint32_t b) {
  return pair_of<T>(low_of<T>(a) == low_of<T>(b) ? 1.0f : 0.0f, high_of<T>(a) == high_of<T>(b) ? 1.0f : 0.0f);
}
template <class T>
__device__ __forceinline__ uint32_t add_pair(uint32_t a, uint32_t b) {
  return pair_of<T>(low_of<T>(a) + low_of<T>(b), high_of<T>(a) + high_of<T>(b));
}
template <class T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  return pair_of<T>(low_of<T>(a) * low_of<T>(b), high_of<T>(a) * high_of<T>(b));
}
#else
// CUDA's type of a pair and what CUDA calls our element types. Its functions work on every architecture, and are one
// instruction from sm_80 on.
template <class T>
struct CudaPair;
template <>
struct CudaPair<bfloat16> {
  using type = __nv_bfloat162;
  static __device__ __forceinline__ type of(float low, float high) { return __floats2bfloat162_rn(low, high); }
};
template <>
struct CudaPair<float16> {
  using type = __half2;
  static __device__ __forceinline__ type of(float low, float high) { return __floats2half2_rn(low, high); }
};
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  return bit_cast<uint32_t>(CudaPair<T>::of(low, high));
}
template <class T>
__device__ __forceinline__ uint32_t max_or_nan_pair(uint32_t a, uint32_t b) {
  using P = typename CudaPair<T>::type;
  return bit_cast<uint32_t>(__hmax2_nan(bit_cast<P>(a), bit_cast<P>(b)));
}
template <class T>
__device__ __forceinline__ uint32_t min_or_nan_pair(uint32_t a, uint32_t b) {
  using P = typename CudaPair<T>::type;
  return bit_cast<uint32_t>(__hmin2_nan(bit_cast<P>(a), bit_cast<P>(b)));
}
template <class T>
__device__ __forceinline__ uint32_t equal_pair(uint32_t a, uint32_t b) {
  using P = typename CudaPair<T>::type;
  return bit_cast<uint32_t>(__heq2(bit_cast<P>(a), bit_cast<P>(b)));
}
template <class T>
__device__ __forceinline__ uint32_t add_pair(uint32_t a, uint32_t b) {
  using P = typename CudaPair<T>::type;
  return bit_cast<uint32_t>(__hadd2(bit_cast<P>(a), bit_cast<P>(b)));
}
template <class T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  using P = typename CudaPair<T>::type;
  return bit_cast<uint32_t>(__hmul2(bit_cast<P>(a), bit_cast<P>(b)));
}
#endif

// ---- memory ---------------------------------------------------------------------------------------------------------

// N consecutive elements, which are loaded and stored in one access. N * sizeof(T) is a power of two up to 16, to which
// the address must be aligned.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T data[N];
};

template <int Bytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Loads data that no thread writes during the launch.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  using W = typename Word<int(sizeof(T)) * N>::type;
  return bit_cast<Pack<T, N>>(__ldg(reinterpret_cast<const W*>(p)));
}
// Loads and stores data that is not used again, so that it leaves the caches first.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_once(const T* p) {
  using W = typename Word<int(sizeof(T)) * N>::type;
  return bit_cast<Pack<T, N>>(__ldcs(reinterpret_cast<const W*>(p)));
}
template <int N, class T>
__device__ __forceinline__ void store_once(T* p, const Pack<T, N>& x) {
  using W = typename Word<int(sizeof(T)) * N>::type;
  __stcs(reinterpret_cast<W*>(p), bit_cast<W>(x));
}

// ---- warps ----------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T warp_max(T x) {  // NaN where any lane has NaN
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, x, lanes);
    x = other > x || other != other ? other : x;
  }
  return x;
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, lanes);
  }
  return x;
}

template <class A>
__device__ __forceinline__ A minus_infinity() {
  return -A(__builtin_huge_val());
}

template <class T>
__host__ __device__ __forceinline__ T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__host__ __device__ __forceinline__ T max_of(T a, T b) {
  return a < b ? b : a;
}

}  // namespace blt::cuda
