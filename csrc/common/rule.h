// What says that a patch starts; free of torch and of the standard library, for kernels.
#pragma once

#include <stdint.h>

namespace blt {

// mask: it is given, and not a rule of segmentation.
enum class Rule : int32_t { mask, threshold, monotonic, combined, spaces, fixed };

}  // namespace blt
