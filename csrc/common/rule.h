// What decides where patches start. Kernels include this, so it is free of torch and of the standard library.
#pragma once

#include <stdint.h>

namespace blt {

// With `mask` the starts are given, and no rule decides.
enum class Rule : int32_t { mask, threshold, monotonic, combined, spaces, fixed };

}  // namespace blt
