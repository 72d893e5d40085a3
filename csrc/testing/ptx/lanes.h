// How the semantics of instructions are written down: as functions of the values of one lane.
#pragma once

#include <cstring>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "testing/ptx/warp.h"

namespace blt::ptx {

struct Opcode {
  Run run = nullptr;
  Run run_wide = nullptr;   // the same for registers that are wider than the types, where PTX permits that
  std::vector<int> widths;  // bytes of each operand, destination first; 0: a predicate
};

// Opcodes by their full name.
using Opcodes = std::unordered_map<std::string, Opcode>;

template <class To, class From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Body>
void for_each_lane(Mask lanes, const Body& body) {
  if (lanes == kAllLanes) {
    for (int l = 0; l < kLanes; ++l) body(l);
  } else {
    for (int l = 0; l < kLanes; ++l) {
      if (lanes >> l & 1) body(l);
    }
  }
}

template <class T>
T* column(Warp& warp, const Operand& operand) {
  return reinterpret_cast<T*>(warp.registers + operand.at);
}

inline Mask& predicate(Warp& warp, const Operand& operand) { return *column<Mask>(warp, operand); }

inline void set_predicate(Warp& warp, const Operand& operand, Mask lanes, Mask value) {
  Mask& old = predicate(warp, operand);
  old = (old & ~lanes) | (value & lanes);
}

// F has no state, so that it can be named by its type.
template <class F, class D, class... S>
void run_lanes(Warp& warp, const Instruction& instruction, Mask lanes) {
  const auto run = [lanes](D* out, const S*... in) { for_each_lane(lanes, [=](int l) { out[l] = D(F{}(in[l]...)); }); };
  [&]<size_t... n>(std::index_sequence<n...>) {
    run(column<D>(warp, instruction.operands[0]), column<S>(warp, instruction.operands[n + 1])...);
  }(std::index_sequence_for<S...>{});
}

// The same for one source, where each register may be wider than its type: a source counts with its low bytes, and the
// result is extended by the sign of its type.
template <class F, class D, class S>
void run_wide_lanes(Warp& warp, const Instruction& instruction, Mask lanes) {
  const Operand to = instruction.operands[0], from = instruction.operands[1];
  for_each_lane(lanes, [&](int l) {
    S source;
    memcpy(&source, warp.registers + from.at + l * from.width, sizeof(S));
    const D result = D(F{}(source));
    unsigned char bytes[8];
    memset(bytes, 0, sizeof(bytes));
    if constexpr (std::is_integral_v<D>) {
      const uint64_t extended = uint64_t(int64_t(result));  // by zeros if D has no sign
      memcpy(bytes, &extended, sizeof(extended));
    } else {
      memcpy(bytes, &result, sizeof(result));
    }
    memcpy(warp.registers + to.at + l * to.width, bytes, size_t(to.width));
  });
}

template <class D, class... S, class F>
void define(Opcodes& opcodes, const std::string& name, F) {
  opcodes[name] = {run_lanes<F, D, S...>, nullptr, {int(sizeof(D)), int(sizeof(S))...}};
}

template <class D, class S, class F>
void define_conversion(Opcodes& opcodes, const std::string& name, F) {
  opcodes[name] = {run_lanes<F, D, S>, run_wide_lanes<F, D, S>, {int(sizeof(D)), int(sizeof(S))}};
}

void define_integers(Opcodes& opcodes);
void define_floats(Opcodes& opcodes);
void define_conversions(Opcodes& opcodes);
void define_predicates(Opcodes& opcodes);

// Shuffles: the value, a predicate that says whether the lane asked for exists (may be missing), the source, which
// lane, limits, members. Votes: the result, a predicate, members. Sums over the warp: the result, a source, members.
void define_exchanges(Opcodes& opcodes);

}  // namespace blt::ptx
