// Reads the kernels of a PTX file.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "testing/ptx/kernel.h"

namespace blt::ptx {

// A kernel with something unknown in it is read all the same, and says so in `refusal`. `.loc` gives the instructions
// after it their `line`.
std::vector<std::unique_ptr<Kernel>> parse(const std::string& text);

}  // namespace blt::ptx
