// Arithmetic and logic of integers. Sums and products wrap around, so they are taken of unsigned types.
#include <algorithm>
#include <bit>
#include <limits>

#include "testing/ptx/lanes.h"

namespace blt::ptx {

namespace {

template <class T>
std::string type_name() {
  return (std::is_signed_v<T> ? "s" : "u") + std::to_string(8 * sizeof(T));
}
template <class T>
std::string bits_name() {
  return "b" + std::to_string(8 * sizeof(T));
}

// The high half of the product of two T.
template <class T>
T high_product(T a, T b) {
  using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                  std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
  return T((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
}

// Whether the quotient exists: PTX leaves open what a division by zero gives, and the one division that overflows.
template <class T>
bool divides(T a, T b) {
  return b != 0 && !(std::is_signed_v<T> && b == T(-1) && a == std::numeric_limits<T>::min());
}

template <class T>
void define_arithmetic(Opcodes& opcodes) {
  using U = std::make_unsigned_t<T>;
  const std::string type = "." + type_name<T>();
  define<U, U, U>(opcodes, "add" + type, [](U a, U b) { return a + b; });
  define<U, U, U>(opcodes, "sub" + type, [](U a, U b) { return a - b; });
  define<U, U, U>(opcodes, "mul.lo" + type, [](U a, U b) { return uint64_t(a) * b; });
  define<U, U, U, U>(opcodes, "mad.lo" + type, [](U a, U b, U c) { return uint64_t(a) * b + c; });
  define<T, T, T>(opcodes, "mul.hi" + type, [](T a, T b) { return high_product(a, b); });
  define<T, T, T>(opcodes, "min" + type, [](T a, T b) { return b < a ? b : a; });
  define<T, T, T>(opcodes, "max" + type, [](T a, T b) { return a < b ? b : a; });
  define<T, T, T>(opcodes, "div" + type, [](T a, T b) { return divides(a, b) ? T(a / b) : T(-1); });
  define<T, T, T>(opcodes, "rem" + type, [](T a, T b) { return divides(a, b) ? T(a % b) : T(-1); });
  define<T, T, uint32_t>(opcodes, "shr" + type, [](T a, uint32_t n) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    return n < kBits ? T(a >> n) : std::is_signed_v<T> ? T(a >> (kBits - 1)) : T(0);
  });
  if constexpr (std::is_signed_v<T>) {
    define<U, U>(opcodes, "neg" + type, [](U a) { return U(0) - a; });
    define<U, U>(opcodes, "abs" + type, [](U a) { return T(a) < 0 ? U(0) - a : a; });
  }
}

template <class T, class Wide>
void define_wide_products(Opcodes& opcodes) {
  const std::string type = "." + type_name<T>();
  using U = std::make_unsigned_t<Wide>;
  define<U, T, T>(opcodes, "mul.wide" + type, [](T a, T b) { return U(Wide(a)) * U(Wide(b)); });
  define<U, T, T, U>(opcodes, "mad.wide" + type, [](T a, T b, U c) { return U(Wide(a)) * U(Wide(b)) + c; });
}

template <class T>
void define_logic(Opcodes& opcodes) {
  const std::string type = "." + bits_name<T>();
  define<T, T, T>(opcodes, "and" + type, [](T a, T b) { return a & b; });
  define<T, T, T>(opcodes, "or" + type, [](T a, T b) { return a | b; });
  define<T, T, T>(opcodes, "xor" + type, [](T a, T b) { return a ^ b; });
  define<T, T>(opcodes, "not" + type, [](T a) { return ~a; });
  define<T, T, uint32_t>(opcodes, "shl" + type, [](T a, uint32_t n) { return n < 8 * sizeof(T) ? T(a << n) : T(0); });
  define<T, T, uint32_t>(opcodes, "shr" + type, [](T a, uint32_t n) { return n < 8 * sizeof(T) ? T(a >> n) : T(0); });
}

// `count` bits from `first` on, as far as T has them. Only the low bytes of the two numbers count.
template <class T>
T extract_bits(T a, uint32_t first, uint32_t count) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t kBits = 8 * sizeof(T);
  first &= 255, count &= 255;
  if (count == 0) return 0;
  const bool negative = std::is_signed_v<T> && (U(a) >> std::min(first + count - 1, kBits - 1) & 1);
  const U shifted = first < kBits ? U(a) >> first : 0;
  const uint32_t kept = first < kBits ? std::min(count, kBits - first) : 0;
  const U mask = kept == kBits ? U(-1) : (U(1) << kept) - 1;
  return T((shifted & mask) | (negative ? ~mask : 0));
}
template <class T>
T insert_bits(T a, T b, uint32_t first, uint32_t count) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  first &= 255, count &= 255;
  if (first >= kBits) return b;
  const T mask = (count >= kBits ? T(-1) : (T(1) << count) - 1) << first;
  return T((b & ~mask) | ((a << first) & mask));
}

template <class T>
T reversed_bits(T a) {
  T out = 0;
  for (size_t i = 0; i < 8 * sizeof(T); ++i) out = T(out << 1 | (a >> i & 1));
  return out;
}

// The place of the highest bit that differs from the sign; with `shift`, by how much to shift it to the top.
template <class T, bool shift>
uint32_t find_bit(T a) {
  using U = std::make_unsigned_t<T>;
  const U bits = std::is_signed_v<T> && a < 0 ? U(~a) : U(a);
  return bits == 0 ? 0xffffffffu
                   : uint32_t(shift ? std::countl_zero(bits) : int(8 * sizeof(T)) - 1 - std::countl_zero(bits));
}

template <class T>
void define_bit_fields(Opcodes& opcodes) {
  using S = std::make_signed_t<T>;
  const std::string type = "." + bits_name<T>();
  define<uint32_t, T>(opcodes, "popc" + type, [](T a) { return uint32_t(std::popcount(a)); });
  define<uint32_t, T>(opcodes, "clz" + type, [](T a) { return uint32_t(std::countl_zero(a)); });
  define<T, T>(opcodes, "brev" + type, [](T a) { return reversed_bits(a); });
  define<T, T, T, uint32_t, uint32_t>(
      opcodes, "bfi" + type, [](T a, T b, uint32_t first, uint32_t count) { return insert_bits(a, b, first, count); });
  define<T, T, uint32_t, uint32_t>(opcodes, "bfe." + type_name<T>(),
                                   [](T a, uint32_t first, uint32_t count) { return extract_bits(a, first, count); });
  define<S, S, uint32_t, uint32_t>(opcodes, "bfe." + type_name<S>(),
                                   [](S a, uint32_t first, uint32_t count) { return extract_bits(a, first, count); });
  define<uint32_t, T>(opcodes, "bfind." + type_name<T>(), [](T a) { return find_bit<T, false>(a); });
  define<uint32_t, S>(opcodes, "bfind." + type_name<S>(), [](S a) { return find_bit<S, false>(a); });
  define<uint32_t, T>(opcodes, "bfind.shiftamt." + type_name<T>(), [](T a) { return find_bit<T, true>(a); });
  define<uint32_t, S>(opcodes, "bfind.shiftamt." + type_name<S>(), [](S a) { return find_bit<S, true>(a); });
}

// Each byte of the result is one of the eight bytes of b and a, or eight copies of its sign.
uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> (4 * i) & 15, byte = uint32_t(bytes >> (8 * (choice & 7))) & 255;
    const uint32_t copied = choice & 8 ? (byte & 128 ? 255 : 0) : byte;
    out |= copied << (8 * i);
  }
  return out;
}

// The bits of `table` say what comes of each combination of a bit of a, b and c.
uint32_t look_up_bits(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t out = 0;
  for (uint32_t i = 0; i < 8; ++i) {
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return out;
}

// 64 bits, b high and a low, shifted by up to 32; the high half of a left shift, the low half of a right one.
uint32_t funnel_left(uint32_t a, uint32_t b, uint32_t n) { return uint32_t((uint64_t(b) << 32 | a) << n >> 32); }
uint32_t funnel_right(uint32_t a, uint32_t b, uint32_t n) { return uint32_t((uint64_t(b) << 32 | a) >> n); }

void define_funnel_shifts(Opcodes& opcodes) {
  using U = uint32_t;
  define<U, U, U, U>(opcodes, "shf.l.wrap.b32", [](U a, U b, U n) { return funnel_left(a, b, n & 31); });
  define<U, U, U, U>(opcodes, "shf.r.wrap.b32", [](U a, U b, U n) { return funnel_right(a, b, n & 31); });
  define<U, U, U, U>(opcodes, "shf.l.clamp.b32", [](U a, U b, U n) { return funnel_left(a, b, n < 32 ? n : 32); });
  define<U, U, U, U>(opcodes, "shf.r.clamp.b32", [](U a, U b, U n) { return funnel_right(a, b, n < 32 ? n : 32); });
}

}  // namespace

void define_integers(Opcodes& opcodes) {
  define_arithmetic<uint16_t>(opcodes);
  define_arithmetic<int16_t>(opcodes);
  define_arithmetic<uint32_t>(opcodes);
  define_arithmetic<int32_t>(opcodes);
  define_arithmetic<uint64_t>(opcodes);
  define_arithmetic<int64_t>(opcodes);
  define_wide_products<uint16_t, uint32_t>(opcodes);
  define_wide_products<int16_t, int32_t>(opcodes);
  define_wide_products<uint32_t, uint64_t>(opcodes);
  define_wide_products<int32_t, int64_t>(opcodes);
  define_logic<uint16_t>(opcodes);
  define_logic<uint32_t>(opcodes);
  define_logic<uint64_t>(opcodes);
  define_bit_fields<uint32_t>(opcodes);
  define_bit_fields<uint64_t>(opcodes);
  define_funnel_shifts(opcodes);
  using U = uint32_t;
  define<U, U, U, U>(opcodes, "prmt.b32", [](U a, U b, U selector) { return permute_bytes(a, b, selector); });
  define<U, U, U, U, U>(opcodes, "lop3.b32", [](U a, U b, U c, U table) { return look_up_bits(a, b, c, table); });
}

}  // namespace blt::ptx
