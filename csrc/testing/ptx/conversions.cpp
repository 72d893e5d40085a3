// Conversions, and moves, which only copy bits.
#include <limits>

#include "testing/ptx/numbers.h"

namespace blt::ptx {

namespace {

template <class T>
std::string type_name() {
  return (std::is_signed_v<T> ? "s" : "u") + std::to_string(8 * sizeof(T));
}

// The nearest integer that D has; 0 for NaN.
template <class D, class S>
D saturated(S x) {
  if (x != x) return 0;
  // The bounds are powers of two and exact, so that the comparisons are.
  const S above = std::ldexp(S(1), std::numeric_limits<D>::digits);
  if (x >= above) return std::numeric_limits<D>::max();
  if (x <= (std::is_signed_v<D> ? -above : S(0))) return std::numeric_limits<D>::min();
  return D(x);
}

template <class D, class S>
void define_rounding(Opcodes& opcodes, const std::string& source) {
  const std::string types = "." + type_name<D>() + "." + source;
  define_conversion<D, S>(opcodes, "cvt.rzi" + types, [](S x) { return saturated<D>(std::trunc(x)); });
  define_conversion<D, S>(opcodes, "cvt.rni" + types, [](S x) { return saturated<D>(std::nearbyint(x)); });
  define_conversion<D, S>(opcodes, "cvt.rmi" + types, [](S x) { return saturated<D>(std::floor(x)); });
  define_conversion<D, S>(opcodes, "cvt.rpi" + types, [](S x) { return saturated<D>(std::ceil(x)); });
}

template <class S>
void define_from_integer(Opcodes& opcodes) {
  const auto to = [&]<class D>(D) {
    define_conversion<D, S>(opcodes, "cvt." + type_name<D>() + "." + type_name<S>(), [](S x) { return D(x); });
  };
  to(uint8_t()), to(int8_t()), to(uint16_t()), to(int16_t());
  to(uint32_t()), to(int32_t()), to(uint64_t()), to(int64_t());
  define_conversion<float, S>(opcodes, "cvt.rn.f32." + type_name<S>(), [](S x) { return float(x); });
  define_conversion<double, S>(opcodes, "cvt.rn.f64." + type_name<S>(), [](S x) { return double(x); });
  define_rounding<S, float>(opcodes, "f32");
  define_rounding<S, double>(opcodes, "f64");
}

template <class T>
void define_halves(Opcodes& opcodes, const std::string& type) {
  define<float, T>(opcodes, "cvt.f32." + type, [](T x) { return widen(x); });
  define<T, float>(opcodes, "cvt.rn." + type + ".f32", [](float x) { return narrow<T>(x); });
  define<uint32_t, float, float>(opcodes, "cvt.rn." + type + "x2.f32",
                                 [](float high, float low) { return pair_of(narrow<T>(low), narrow<T>(high)); });
}

template <class T>
void define_moves(Opcodes& opcodes, const std::vector<std::string>& types) {
  for (const std::string& type : types) {
    define<T, T>(opcodes, "mov." + type, [](T x) { return x; });
  }
}

}  // namespace

void define_conversions(Opcodes& opcodes) {
  define_from_integer<uint8_t>(opcodes);
  define_from_integer<int8_t>(opcodes);
  define_from_integer<uint16_t>(opcodes);
  define_from_integer<int16_t>(opcodes);
  define_from_integer<uint32_t>(opcodes);
  define_from_integer<int32_t>(opcodes);
  define_from_integer<uint64_t>(opcodes);
  define_from_integer<int64_t>(opcodes);
  define_halves<Half>(opcodes, "f16");
  define_halves<Bfloat>(opcodes, "bf16");
  define<double, float>(opcodes, "cvt.f64.f32", [](float x) { return double(x); });
  define<float, double>(opcodes, "cvt.rn.f32.f64", [](double x) { return float(x); });
  define<float, float>(opcodes, "cvt.rni.f32.f32", [](float x) { return std::nearbyint(x); });
  define<float, float>(opcodes, "cvt.rzi.f32.f32", [](float x) { return std::trunc(x); });
  define<float, float>(opcodes, "cvt.rmi.f32.f32", [](float x) { return std::floor(x); });
  define<float, float>(opcodes, "cvt.rpi.f32.f32", [](float x) { return std::ceil(x); });
  define<double, double>(opcodes, "cvt.rni.f64.f64", [](double x) { return std::nearbyint(x); });
  define_moves<uint16_t>(opcodes, {"b16", "u16", "s16"});
  define_moves<uint32_t>(opcodes, {"b32", "u32", "s32", "f32"});
  define_moves<uint64_t>(opcodes, {"b64", "u64", "s64", "f64"});
  // An address of global memory or of a parameter is the same number in every address space here.
  for (const char* name : {"cvta.to.global.u64", "cvta.global.u64", "cvta.to.param.u64", "cvta.param.u64"}) {
    define<uint64_t, uint64_t>(opcodes, name, [](uint64_t x) { return x; });
  }
}

}  // namespace blt::ptx
