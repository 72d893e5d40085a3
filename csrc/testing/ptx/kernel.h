// A kernel of a PTX file, ready to run: its instructions with their operands resolved to places in a register file.
#pragma once

#include <stdint.h>

#include <array>
#include <string>
#include <vector>

#include "common/check.h"

namespace blt::ptx {

constexpr int kLanes = 32;

// One bit for each lane of a warp. A predicate register is one of these.
using Mask = uint32_t;
constexpr Mask kAllLanes = 0xffffffffu;

// A register: for each lane `width` bytes, lane after lane, from the byte `at` of a warp's register file on. A
// predicate has width 0 and is one Mask. Constants are registers too, which a warp is given when it starts.
struct Operand {
  int32_t at = -1;
  int32_t width = 0;
  bool exists() const { return at >= 0; }
};

// What an instruction did since the counts were reset. A warp executes an instruction also when none of its lanes do.
struct Counters {
  int64_t warps = 0;
  int64_t lanes = 0;
  int64_t sectors = 0;     // 32-byte pieces of global memory that the accesses of a warp touched
  int64_t bytes = 0;       // distinct bytes of global memory that the accesses of a warp touched
  int64_t wavefronts = 0;  // passes of the accesses of a warp through the banks of shared memory
};

struct Warp;
struct Instruction;

// Executes an instruction for the given lanes, of which there is at least one.
using Run = void (*)(Warp&, const Instruction&, Mask lanes);

enum class Kind : uint8_t { lanes, branch, barrier, leave };
enum class Combine : uint8_t { none, conjunction, disjunction, exclusive };

struct Instruction {
  Kind kind = Kind::lanes;
  Run run = nullptr;
  Operand guard;  // a predicate
  bool guard_negated = false;
  // Destinations first. An access to memory has the elements of its vector, then the address, then other sources.
  std::array<Operand, 6> operands;
  int num_operands = 0;

  // Comparisons: what the result is combined with. Votes: whether the predicate counts negated.
  Combine combine = Combine::none;
  bool negated = false;

  // Accesses to memory: bytes of an element, elements, whether a load extends the sign, what is added to the address.
  // Moves between a register and its parts: bytes of a part, parts.
  bool is_access = false;
  int width = 0, elements = 1;
  bool is_signed = false;
  int64_t offset = 0;

  // Branches: where they go, and where the lanes that did not go meet those that did.
  int target = -1, meeting = -1;

  std::string text;
  int line = 0;  // that of the .loc before it, or 0
  mutable Counters counters;

  int access() const { return width * elements; }
};

struct Constant {
  Operand place;
  uint64_t bits;
};

struct Parameter {
  int64_t at, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> instructions;
  std::vector<Parameter> parameters;
  int64_t parameter_bytes = 0, register_bytes = 0, shared_bytes = 0;
  std::vector<Constant> constants;
  Operand thread, block, threads, blocks, lane;  // special registers, where the kernel reads them
  std::string refusal;                           // why it cannot run, or empty
  bool launched = false;
  int64_t launched_threads = 0, launched_shared = 0;  // of a block in the last launch: threads and all its shared bytes
};

}  // namespace blt::ptx
