// The 16-bit floats of PTX, computed as PTX does: the exact result is rounded once.
#pragma once

#include <cmath>

#include "testing/ptx/lanes.h"

namespace blt::ptx {

// A result that is NaN has these bits, whatever NaN went in.
constexpr uint32_t kNaN = 0x7fffffff;
constexpr uint16_t kHalfNaN = 0x7fff;

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Half x) { return float(bits_as<_Float16>(x.bits)); }
inline float widen(Bfloat x) { return bits_as<float>(uint32_t(x.bits) << 16); }

template <class T>
T narrow(std::conditional_t<std::is_same_v<T, double>, double, float> x) {
  if constexpr (std::is_same_v<T, Half>) {
    return {x != x ? kHalfNaN : bits_as<uint16_t>(_Float16(x))};
  } else if constexpr (std::is_same_v<T, Bfloat>) {
    const uint32_t bits = bits_as<uint32_t>(x);
    return {x != x ? kHalfNaN : uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
  } else {
    return x;
  }
}

// a * b + c for 16-bit floats. Each step rounds to odd, so that the last rounding, in narrow(), is that of the exact
// result.
inline float fused_to_odd(float a, float b, float c) {
  const double product = double(a) * b, sum = product + c;  // the product is exact
  if (!std::isfinite(sum)) return float(sum);
  const double added = sum - product, error = (product - (sum - added)) + (c - added);
  double odd = sum;
  if (error != 0 && (bits_as<uint64_t>(sum) & 1) == 0) odd = std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
  const float narrowed = float(odd);
  if (double(narrowed) == odd || (bits_as<uint32_t>(narrowed) & 1) != 0 || std::isinf(narrowed)) return narrowed;
  return std::nextafter(narrowed, double(narrowed) < odd ? INFINITY : -INFINITY);
}

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// Zeros have an order here: -0 < +0.
template <class T>
bool below(T a, T b) {
  return a < b || (a == b && std::signbit(a) && !std::signbit(b));
}
template <class T>
T larger(T a, T b) {
  return a != a ? b : b != b ? a : below(a, b) ? b : a;
}
template <class T>
T smaller(T a, T b) {
  return a != a ? b : b != b ? a : below(b, a) ? b : a;
}
template <class T>
T larger_or_nan(T a, T b) {
  return a != a || b != b ? T(NAN) : larger(a, b);
}
template <class T>
T smaller_or_nan(T a, T b) {
  return a != a || b != b ? T(NAN) : smaller(a, b);
}

// Two 16-bit elements in a register, the first of them in the low half.
template <class T>
T half_of(uint32_t pair, int which) {
  return {uint16_t(pair >> (16 * which))};
}
template <class T>
uint32_t pair_of(T low, T high) {
  return uint32_t(high.bits) << 16 | low.bits;
}

inline float without_subnormals(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

}  // namespace blt::ptx
