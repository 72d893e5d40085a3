// Arithmetic of floating-point numbers, alone and in pairs. The approximations of the special function unit are those
// of the host's library, which are nearer to the exact result than a GPU's.
#include "testing/ptx/numbers.h"

namespace blt::ptx {

namespace {

template <class T>
void define_arithmetic(Opcodes& opcodes, const std::string& type) {
  for (const char* rounding : {".", ".rn."}) {
    define<T, T, T>(opcodes, "add" + (rounding + type), [](T a, T b) { return narrow<T>(widen(a) + widen(b)); });
    define<T, T, T>(opcodes, "sub" + (rounding + type), [](T a, T b) { return narrow<T>(widen(a) - widen(b)); });
    define<T, T, T>(opcodes, "mul" + (rounding + type), [](T a, T b) { return narrow<T>(widen(a) * widen(b)); });
  }
  define<T, T, T>(opcodes, "min." + type, [](T a, T b) { return narrow<T>(smaller(widen(a), widen(b))); });
  define<T, T, T>(opcodes, "max." + type, [](T a, T b) { return narrow<T>(larger(widen(a), widen(b))); });
  define<T, T>(opcodes, "neg." + type, [](T a) { return narrow<T>(-widen(a)); });
  define<T, T>(opcodes, "abs." + type, [](T a) { return narrow<T>(std::fabs(widen(a))); });
  if constexpr (sizeof(T) == 2) {
    define<T, T, T, T>(opcodes, "fma.rn." + type,
                       [](T a, T b, T c) { return narrow<T>(fused_to_odd(widen(a), widen(b), widen(c))); });
  } else {
    define<T, T, T, T>(opcodes, "fma.rn." + type, [](T a, T b, T c) { return fused(a, b, c); });
  }
  if constexpr (sizeof(T) < 8) {
    define<T, T, T>(opcodes, "min.NaN." + type, [](T a, T b) { return narrow<T>(smaller_or_nan(widen(a), widen(b))); });
    define<T, T, T>(opcodes, "max.NaN." + type, [](T a, T b) { return narrow<T>(larger_or_nan(widen(a), widen(b))); });
  }
}

// Applies F to the low halves and to the high halves.
template <class T, class F>
struct InPairs {
  template <class... Pairs>
  uint32_t operator()(Pairs... pairs) const {
    return pair_of(narrow<T>(F{}(widen(half_of<T>(pairs, 0))...)), narrow<T>(F{}(widen(half_of<T>(pairs, 1))...)));
  }
};

template <class T, class F>
void define_binary_pair(Opcodes& opcodes, const std::string& name, F) {
  define<uint32_t, uint32_t, uint32_t>(opcodes, name, InPairs<T, F>{});
}

template <class T>
void define_pairs(Opcodes& opcodes, const std::string& type) {
  for (const char* rounding : {".", ".rn."}) {
    define_binary_pair<T>(opcodes, "add" + (rounding + type), [](float a, float b) { return a + b; });
    define_binary_pair<T>(opcodes, "sub" + (rounding + type), [](float a, float b) { return a - b; });
    define_binary_pair<T>(opcodes, "mul" + (rounding + type), [](float a, float b) { return a * b; });
  }
  define_binary_pair<T>(opcodes, "min." + type, [](float a, float b) { return smaller(a, b); });
  define_binary_pair<T>(opcodes, "max." + type, [](float a, float b) { return larger(a, b); });
  define_binary_pair<T>(opcodes, "min.NaN." + type, [](float a, float b) { return smaller_or_nan(a, b); });
  define_binary_pair<T>(opcodes, "max.NaN." + type, [](float a, float b) { return larger_or_nan(a, b); });
  // 1 where the comparison holds; none holds for NaN but that of `neu`.
  const auto define_comparison = [&](const char* comparison, auto holds) {
    define_binary_pair<T>(opcodes, std::string("set.") + comparison + "." + type + "." + type, holds);
  };
  define_comparison("eq", [](float a, float b) { return float(a == b); });
  define_comparison("neu", [](float a, float b) { return float(a != b); });
  define_comparison("lt", [](float a, float b) { return float(a < b); });
  define_comparison("le", [](float a, float b) { return float(a <= b); });
  define_comparison("gt", [](float a, float b) { return float(a > b); });
  define_comparison("ge", [](float a, float b) { return float(a >= b); });
  constexpr auto negative = [](float a) { return -a; };
  constexpr auto absolute = [](float a) { return std::fabs(a); };
  define<uint32_t, uint32_t>(opcodes, "neg." + type, InPairs<T, decltype(negative)>{});
  define<uint32_t, uint32_t>(opcodes, "abs." + type, InPairs<T, decltype(absolute)>{});
  constexpr auto multiply_add = [](float a, float b, float c) { return fused_to_odd(a, b, c); };
  define<uint32_t, uint32_t, uint32_t, uint32_t>(opcodes, "fma.rn." + type, InPairs<T, decltype(multiply_add)>{});
}

// F in single precision; once more with subnormal arguments and results flushed to zero.
template <class F>
void define_approximation(Opcodes& opcodes, const std::string& name, F) {
  define<float, float>(opcodes, name + ".approx.f32", F{});
  define<float, float>(opcodes, name + ".approx.ftz.f32",
                       [](float a) { return without_subnormals(F{}(without_subnormals(a))); });
}

// Only the high half of the argument counts, and only that of the result is there.
double rough_reciprocal(double a) {
  constexpr uint64_t kHigh = 0xffffffff00000000u;
  const double rounded = bits_as<double>(bits_as<uint64_t>(a) & kHigh);
  const double flushed = std::fabs(rounded) < 0x1p-1022 ? std::copysign(0.0, rounded) : rounded;
  const double out = bits_as<double>(bits_as<uint64_t>(1 / flushed) & kHigh);
  return std::fabs(out) < 0x1p-1022 ? std::copysign(0.0, out) : out;
}

void define_special_functions(Opcodes& opcodes) {
  define_approximation(opcodes, "ex2", [](float a) { return std::exp2(a); });
  define_approximation(opcodes, "lg2", [](float a) { return std::log2(a); });
  define_approximation(opcodes, "rcp", [](float a) { return 1 / a; });
  define_approximation(opcodes, "sqrt", [](float a) { return std::sqrt(a); });
  define_approximation(opcodes, "rsqrt", [](float a) { return 1 / std::sqrt(a); });
  define<double, double>(opcodes, "rcp.approx.ftz.f64", [](double a) { return rough_reciprocal(a); });
  define<uint32_t, uint32_t>(opcodes, "ex2.approx.ftz.bf16x2",
                             InPairs<Bfloat, decltype([](float a) { return std::exp2(a); })>{});
  define<uint32_t, uint32_t>(opcodes, "ex2.approx.f16x2",
                             InPairs<Half, decltype([](float a) { return std::exp2(a); })>{});
}

template <class T>
void define_divisions(Opcodes& opcodes, const std::string& type) {
  define<T, T, T>(opcodes, "div.rn." + type, [](T a, T b) { return a / b; });
  define<T, T>(opcodes, "rcp.rn." + type, [](T a) { return 1 / a; });
  define<T, T>(opcodes, "sqrt.rn." + type, [](T a) { return std::sqrt(a); });
  define<T, T, T>(opcodes, "copysign." + type, [](T sign, T a) { return std::copysign(a, sign); });
}

}  // namespace

void define_floats(Opcodes& opcodes) {
  define_arithmetic<float>(opcodes, "f32");
  define_arithmetic<double>(opcodes, "f64");
  define_arithmetic<Half>(opcodes, "f16");
  define_arithmetic<Bfloat>(opcodes, "bf16");
  define_pairs<Half>(opcodes, "f16x2");
  define_pairs<Bfloat>(opcodes, "bf16x2");
  define_divisions<float>(opcodes, "f32");
  define_divisions<double>(opcodes, "f64");
  define<float, float, float>(opcodes, "div.full.f32", [](float a, float b) { return a / b; });
  define<float, float, float>(opcodes, "div.approx.f32", [](float a, float b) { return a / b; });
  define_special_functions(opcodes);
}

}  // namespace blt::ptx
