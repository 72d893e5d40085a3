// How patch_pool reduces. Kernels include this, so it is free of torch and of the standard library.
#pragma once

#include <stdint.h>

namespace blt {

enum class Reduce : int32_t { max, mean, min, sum };

}  // namespace blt
