#include "testing/ptx/warp.h"

#include <cxxabi.h>

#include <bit>
#include <cstdlib>
#include <limits>

#include "testing/ptx/lanes.h"

namespace blt::ptx {

namespace {

// Takes the next path that still has lanes; false if there is none.
bool resume(Warp& warp) {
  while (!warp.others.empty()) {
    warp.path = warp.others.back();
    warp.others.pop_back();
    warp.path.lanes &= warp.alive;
    if (warp.path.lanes != 0) return true;
  }
  return false;
}

void branch(const Instruction& instruction, Warp& warp, Mask taken) {
  Path& path = warp.path;
  const Mask rest = path.lanes & ~taken;
  const int next = path.next + 1;
  if (rest == 0 || taken == 0) {
    path.next = taken != 0 ? instruction.target : next;
    return;
  }
  // All go on at the meeting point, after the two sides have come there. A side that is there already need not run.
  const int meeting = instruction.meeting;
  if (meeting != path.meeting) warp.others.push_back({meeting, path.meeting, path.lanes});
  if (next != meeting) warp.others.push_back({next, meeting, rest});
  if (instruction.target != meeting) warp.others.push_back({instruction.target, meeting, taken});
  resume(warp);
}

void wait(Warp& warp, Mask lanes) {
  BLT_CHECK(warp.alive == warp.started, "a barrier after a thread of the block has left");
  BLT_CHECK(lanes == warp.alive, "a barrier that only a part of the block reaches");
  ++warp.path.next;
  warp.state = State::waits;
}

void leave(Warp& warp, Mask lanes) {
  warp.alive &= ~lanes;
  warp.path.lanes &= ~lanes;
  ++warp.path.next;
  if (warp.path.lanes == 0 && !resume(warp)) warp.state = State::finished;
}

void step(const Kernel& kernel, Warp& warp) {
  const Instruction& instruction = kernel.instructions[size_t(warp.path.next)];
  Mask lanes = warp.path.lanes;
  if (instruction.guard.exists()) {
    const Mask guard = predicate(warp, instruction.guard);
    lanes &= instruction.guard_negated ? ~guard : guard;
  }
  ++instruction.counters.warps;
  instruction.counters.lanes += std::popcount(lanes);
  switch (instruction.kind) {
    case Kind::lanes:
      if (lanes != 0) instruction.run(warp, instruction, lanes);
      ++warp.path.next;
      break;
    case Kind::branch:
      branch(instruction, warp, lanes);
      break;
    case Kind::barrier:
      wait(warp, lanes);
      break;
    case Kind::leave:
      leave(warp, lanes);
      break;
  }
}

}  // namespace

std::string readable(const std::string& kernel) {
  int status = 0;
  char* name = abi::__cxa_demangle(kernel.c_str(), nullptr, nullptr, &status);
  const std::string out = status == 0 ? name : kernel;
  free(name);
  return out;
}

void run(const Kernel& kernel, Warp& warp) {
  try {
    while (warp.state == State::runs) {
      if (warp.path.next == warp.path.meeting) {
        resume(warp);
      } else {
        step(kernel, warp);
      }
    }
  } catch (const std::runtime_error& error) {
    fail("ptx: ", readable(kernel.name), ": block ", warp.block->index, ", warp ", warp.index, ": `",
         kernel.instructions[size_t(warp.path.next)].text, "` (instruction ", warp.path.next, "): ", error.what());
  }
}

}  // namespace blt::ptx
