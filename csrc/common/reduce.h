// How patch_pool reduces; free of torch and of the standard library, for kernels.
#pragma once

#include <stdint.h>

namespace blt {

enum class Reduce : int32_t { max, mean, min, sum };

}  // namespace blt
