// Shuffles, votes and reductions, through which the lanes of a warp talk to each other.
#include <array>

#include "testing/ptx/lanes.h"

namespace blt::ptx {

namespace {

// Throws unless every lane that a member asks for takes part.
void check_members(Warp& warp, const Operand& members, Mask lanes) {
  const Mask* named = column<Mask>(warp, members);
  for_each_lane(lanes, [&](int l) {
    BLT_CHECK((named[l] & ~lanes) == 0, "waits for lanes that are elsewhere: ", named[l] & ~lanes, " of ", named[l]);
    BLT_CHECK(named[l] >> l & 1, "lane ", l, " is no member itself");
  });
}

struct Source {
  int lane;
  bool exists;
};

template <class Choose>
void run_shuffle(Warp& warp, const Instruction& instruction, Mask lanes) {
  const auto& [value, exists, source, which, limits, members] = instruction.operands;
  check_members(warp, members, lanes);
  std::array<uint32_t, kLanes> from;
  memcpy(from.data(), column<uint32_t>(warp, source), sizeof(from));
  const uint32_t *asked = column<uint32_t>(warp, which), *limit = column<uint32_t>(warp, limits);
  uint32_t* to = column<uint32_t>(warp, value);
  Mask found = 0;
  for_each_lane(lanes, [&](int l) {
    // A warp may be divided into segments of lanes that have these bits of their number in common.
    const int segment = int(limit[l] >> 8 & 31), clamp = int(limit[l] & 31);
    const int first = l & segment, last = first | (clamp & ~segment);
    const Source chosen = Choose{}(l, int(asked[l] & 31), segment, first, last);
    const int lane = chosen.exists ? chosen.lane : l;
    BLT_CHECK(lanes >> lane & 1, "lane ", l, " asks lane ", lane, ", which is inactive");
    to[l] = from[size_t(lane)];
    found |= Mask(chosen.exists) << l;
  });
  if (exists.exists()) set_predicate(warp, exists, lanes, found);
}

template <class Choose>
void define_shuffle(Opcodes& opcodes, const char* name, Choose) {
  opcodes[name] = {run_shuffle<Choose>, nullptr, {4, 0, 4, 4, 4, 4}};
}

Mask votes(Warp& warp, const Instruction& instruction, Mask lanes) {
  check_members(warp, instruction.operands[2], lanes);
  const Mask vote = predicate(warp, instruction.operands[1]);
  return (instruction.negated ? ~vote : vote) & lanes;
}

void run_ballot(Warp& warp, const Instruction& instruction, Mask lanes) {
  const Mask ballot = votes(warp, instruction, lanes);
  Mask* out = column<Mask>(warp, instruction.operands[0]);
  for_each_lane(lanes, [&](int l) { out[l] = ballot; });
}
void run_any(Warp& warp, const Instruction& instruction, Mask lanes) {
  const bool any = votes(warp, instruction, lanes) != 0;
  set_predicate(warp, instruction.operands[0], lanes, any ? kAllLanes : 0);
}
void run_all(Warp& warp, const Instruction& instruction, Mask lanes) {
  const bool all = votes(warp, instruction, lanes) == lanes;
  set_predicate(warp, instruction.operands[0], lanes, all ? kAllLanes : 0);
}

void run_active_mask(Warp& warp, const Instruction& instruction, Mask lanes) {
  Mask* out = column<Mask>(warp, instruction.operands[0]);
  for_each_lane(lanes, [&](int l) { out[l] = lanes; });
}

void run_warp_barrier(Warp& warp, const Instruction& instruction, Mask lanes) {
  check_members(warp, instruction.operands[0], lanes);
  warp.lane_phase = warp.block->shared->new_lane_phase();
}

template <class F, class T>
void run_reduction(Warp& warp, const Instruction& instruction, Mask lanes) {
  check_members(warp, instruction.operands[2], lanes);
  const T* in = column<T>(warp, instruction.operands[1]);
  T sum{};
  bool first = true;
  for_each_lane(lanes, [&](int l) {
    sum = first ? in[l] : T(F{}(sum, in[l]));
    first = false;
  });
  T* out = column<T>(warp, instruction.operands[0]);
  for_each_lane(lanes, [&](int l) { out[l] = sum; });
}

template <class T, class F>
void define_reduction(Opcodes& opcodes, const char* name, F) {
  opcodes[name] = {run_reduction<F, T>, nullptr, {4, 4, 4}};
}

}  // namespace

void define_exchanges(Opcodes& opcodes) {
  define_shuffle(opcodes, "shfl.sync.idx.b32", [](int, int asked, int segment, int first, int last) {
    const int lane = first | (asked & ~segment);
    return Source{lane, lane <= last};
  });
  define_shuffle(opcodes, "shfl.sync.bfly.b32",
                 [](int l, int asked, int, int, int last) { return Source{l ^ asked, (l ^ asked) <= last}; });
  define_shuffle(opcodes, "shfl.sync.up.b32",
                 [](int l, int asked, int, int, int last) { return Source{l - asked, l - asked >= last}; });
  define_shuffle(opcodes, "shfl.sync.down.b32",
                 [](int l, int asked, int, int, int last) { return Source{l + asked, l + asked <= last}; });
  opcodes["vote.sync.ballot.b32"] = {run_ballot, nullptr, {4, 0, 4}};
  opcodes["vote.sync.any.pred"] = {run_any, nullptr, {0, 0, 4}};
  opcodes["vote.sync.all.pred"] = {run_all, nullptr, {0, 0, 4}};
  opcodes["activemask.b32"] = {run_active_mask, nullptr, {4}};
  opcodes["bar.warp.sync"] = {run_warp_barrier, nullptr, {4}};
  define_reduction<uint32_t>(opcodes, "redux.sync.add.u32", [](uint32_t a, uint32_t b) { return a + b; });
  define_reduction<uint32_t>(opcodes, "redux.sync.add.s32", [](uint32_t a, uint32_t b) { return a + b; });
  define_reduction<uint32_t>(opcodes, "redux.sync.min.u32", [](uint32_t a, uint32_t b) { return b < a ? b : a; });
  define_reduction<uint32_t>(opcodes, "redux.sync.max.u32", [](uint32_t a, uint32_t b) { return a < b ? b : a; });
  define_reduction<int32_t>(opcodes, "redux.sync.min.s32", [](int32_t a, int32_t b) { return b < a ? b : a; });
  define_reduction<int32_t>(opcodes, "redux.sync.max.s32", [](int32_t a, int32_t b) { return a < b ? b : a; });
  define_reduction<uint32_t>(opcodes, "redux.sync.and.b32", [](uint32_t a, uint32_t b) { return a & b; });
  define_reduction<uint32_t>(opcodes, "redux.sync.or.b32", [](uint32_t a, uint32_t b) { return a | b; });
  define_reduction<uint32_t>(opcodes, "redux.sync.xor.b32", [](uint32_t a, uint32_t b) { return a ^ b; });
}

}  // namespace blt::ptx
