// Reads the argument `reduce` of patch_pool, for every device.
#pragma once

#include <string>

#include "common/check.h"
#include "common/reduce.h"

namespace blt {

inline Reduce parse_reduce(const char* op, const std::string& reduce) {
  if (reduce == "max") return Reduce::max;
  if (reduce == "mean") return Reduce::mean;
  if (reduce == "min") return Reduce::min;
  if (reduce == "sum") return Reduce::sum;
  fail(op, ": reduce: expected max, mean, min or sum, got ", reduce);
}

}  // namespace blt
