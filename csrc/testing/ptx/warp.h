// Runs a warp: its lanes in lockstep, those that took different sides of a branch one side after the other.
#pragma once

#include <vector>

#include "testing/ptx/kernel.h"
#include "testing/ptx/memory.h"

namespace blt::ptx {

struct Block {
  uint32_t index = 0;
  SharedMemory* shared = nullptr;
  GlobalMemory* global = nullptr;
  const unsigned char* parameters = nullptr;
  int64_t parameter_bytes = 0;
};

// Lanes that run together: from `next` on, until they meet others at `meeting`.
struct Path {
  int next, meeting;
  Mask lanes;
};

enum class State : uint8_t { runs, waits, finished };

struct Warp {
  unsigned char* registers = nullptr;
  Block* block = nullptr;
  uint32_t index = 0;
  Phase lane_phase;

  State state = State::runs;
  Mask started = 0, alive = 0;  // lanes that the block has, and those of them that have not left
  Path path;                    // the lanes that run
  std::vector<Path> others;     // those that wait for them, the ones to run next at the end
};

// Runs until all lanes wait at a barrier or have left. Errors name the kernel, block, warp and instruction.
void run(const Kernel& kernel, Warp& warp);

// A kernel's name as C++ spells it.
std::string readable(const std::string& kernel);

}  // namespace blt::ptx
