// How a launcher reaches the interpreter.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

namespace blt::ptx {

struct Argument {
  const void* data;
  int64_t bytes;
};

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared;  // bytes beyond those that the kernel declares
};

// Whether launches run the loaded kernels.
bool is_on();

// Runs the kernel of this mangled name. The arguments must be as large as its parameters.
void launch(const std::string& kernel, const Grid& grid, const std::vector<Argument>& arguments);

}  // namespace blt::ptx
