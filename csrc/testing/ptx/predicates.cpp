// Comparisons, logic of predicates, and selections by a predicate. A predicate is a bit mask with a bit for each lane.
#include "testing/ptx/numbers.h"

namespace blt::ptx {

namespace {

// Destinations: the predicate and, if it is there, its complement. Sources: two values and, if it is there, a predicate
// that the result is combined with.
template <class F, class T>
void run_comparison(Warp& warp, const Instruction& instruction, Mask lanes) {
  const T *a = column<T>(warp, instruction.operands[2]), *b = column<T>(warp, instruction.operands[3]);
  Mask holds = 0;
  for (int l = 0; l < kLanes; ++l) {
    holds |= Mask(F{}(a[l], b[l])) << l;
  }
  Mask complement = ~holds;
  if (instruction.combine != Combine::none) {
    const Mask other = predicate(warp, instruction.operands[4]);
    const auto combined = [&](Mask x) {
      return instruction.combine == Combine::conjunction   ? x & other
             : instruction.combine == Combine::disjunction ? x | other
                                                           : x ^ other;
    };
    holds = combined(holds), complement = combined(complement);
  }
  set_predicate(warp, instruction.operands[0], lanes, holds);
  if (instruction.operands[1].exists()) {
    set_predicate(warp, instruction.operands[1], lanes, complement);
  }
}

template <class T, class F>
void define_comparison(Opcodes& opcodes, const std::string& name, F) {
  opcodes[name] = {run_comparison<F, T>, nullptr, {0, 0, int(sizeof(T)), int(sizeof(T)), 0}};
}

template <class T>
void define_integer_comparisons(Opcodes& opcodes, const std::string& type) {
  define_comparison<T>(opcodes, "setp.eq." + type, [](T a, T b) { return a == b; });
  define_comparison<T>(opcodes, "setp.ne." + type, [](T a, T b) { return a != b; });
  if (type[0] == 'b') return;
  define_comparison<T>(opcodes, "setp.lt." + type, [](T a, T b) { return a < b; });
  define_comparison<T>(opcodes, "setp.le." + type, [](T a, T b) { return a <= b; });
  define_comparison<T>(opcodes, "setp.gt." + type, [](T a, T b) { return a > b; });
  define_comparison<T>(opcodes, "setp.ge." + type, [](T a, T b) { return a >= b; });
  if (type[0] == 's') return;
  define_comparison<T>(opcodes, "setp.lo." + type, [](T a, T b) { return a < b; });
  define_comparison<T>(opcodes, "setp.ls." + type, [](T a, T b) { return a <= b; });
  define_comparison<T>(opcodes, "setp.hi." + type, [](T a, T b) { return a > b; });
  define_comparison<T>(opcodes, "setp.hs." + type, [](T a, T b) { return a >= b; });
}

// A comparison with NaN is false, but true for the names in -u.
template <class T>
void define_float_comparisons(Opcodes& opcodes, const std::string& type) {
  const auto comparison = [&](const char* name, auto holds) {
    define_comparison<T>(opcodes, "setp." + (name + ("." + type)), holds);
  };
  comparison("eq", [](T a, T b) { return widen(a) == widen(b); });
  comparison("ne", [](T a, T b) { return widen(a) < widen(b) || widen(a) > widen(b); });
  comparison("lt", [](T a, T b) { return widen(a) < widen(b); });
  comparison("le", [](T a, T b) { return widen(a) <= widen(b); });
  comparison("gt", [](T a, T b) { return widen(a) > widen(b); });
  comparison("ge", [](T a, T b) { return widen(a) >= widen(b); });
  comparison("equ", [](T a, T b) { return !(widen(a) < widen(b) || widen(a) > widen(b)); });
  comparison("neu", [](T a, T b) { return !(widen(a) == widen(b)); });
  comparison("ltu", [](T a, T b) { return !(widen(a) >= widen(b)); });
  comparison("leu", [](T a, T b) { return !(widen(a) > widen(b)); });
  comparison("gtu", [](T a, T b) { return !(widen(a) <= widen(b)); });
  comparison("geu", [](T a, T b) { return !(widen(a) < widen(b)); });
  comparison("num", [](T a, T b) { return widen(a) == widen(a) && widen(b) == widen(b); });
  comparison("nan", [](T a, T b) { return widen(a) != widen(a) || widen(b) != widen(b); });
}

template <class F>
void run_binary_logic(Warp& warp, const Instruction& instruction, Mask lanes) {
  const Mask a = predicate(warp, instruction.operands[1]), b = predicate(warp, instruction.operands[2]);
  set_predicate(warp, instruction.operands[0], lanes, F{}(a, b));
}
template <class F>
void run_unary_logic(Warp& warp, const Instruction& instruction, Mask lanes) {
  set_predicate(warp, instruction.operands[0], lanes, F{}(predicate(warp, instruction.operands[1])));
}
template <class F>
void define_binary_logic(Opcodes& opcodes, const char* name, F) {
  opcodes[name] = {run_binary_logic<F>, nullptr, {0, 0, 0}};
}
template <class F>
void define_unary_logic(Opcodes& opcodes, const char* name, F) {
  opcodes[name] = {run_unary_logic<F>, nullptr, {0, 0}};
}

template <class T>
void run_selection(Warp& warp, const Instruction& instruction, Mask lanes) {
  T* out = column<T>(warp, instruction.operands[0]);
  const T *a = column<T>(warp, instruction.operands[1]), *b = column<T>(warp, instruction.operands[2]);
  const Mask chosen = predicate(warp, instruction.operands[3]);
  for_each_lane(lanes, [=](int l) { out[l] = chosen >> l & 1 ? a[l] : b[l]; });
}
template <class T>
void define_selections(Opcodes& opcodes, const std::vector<std::string>& types) {
  for (const std::string& type : types) {
    opcodes["selp." + type] = {run_selection<T>, nullptr, {int(sizeof(T)), int(sizeof(T)), int(sizeof(T)), 0}};
  }
}

}  // namespace

void define_predicates(Opcodes& opcodes) {
  define_integer_comparisons<uint16_t>(opcodes, "b16");
  define_integer_comparisons<uint16_t>(opcodes, "u16");
  define_integer_comparisons<int16_t>(opcodes, "s16");
  define_integer_comparisons<uint32_t>(opcodes, "b32");
  define_integer_comparisons<uint32_t>(opcodes, "u32");
  define_integer_comparisons<int32_t>(opcodes, "s32");
  define_integer_comparisons<uint64_t>(opcodes, "b64");
  define_integer_comparisons<uint64_t>(opcodes, "u64");
  define_integer_comparisons<int64_t>(opcodes, "s64");
  define_float_comparisons<float>(opcodes, "f32");
  define_float_comparisons<double>(opcodes, "f64");
  define_float_comparisons<Half>(opcodes, "f16");
  define_float_comparisons<Bfloat>(opcodes, "bf16");
  define_binary_logic(opcodes, "and.pred", [](Mask a, Mask b) { return a & b; });
  define_binary_logic(opcodes, "or.pred", [](Mask a, Mask b) { return a | b; });
  define_binary_logic(opcodes, "xor.pred", [](Mask a, Mask b) { return a ^ b; });
  define_unary_logic(opcodes, "not.pred", [](Mask a) { return ~a; });
  define_unary_logic(opcodes, "mov.pred", [](Mask a) { return a; });
  define_selections<uint16_t>(opcodes, {"b16", "u16", "s16"});
  define_selections<uint32_t>(opcodes, {"b32", "u32", "s32", "f32"});
  define_selections<uint64_t>(opcodes, {"b64", "u64", "s64", "f64"});
}

}  // namespace blt::ptx
