// The checks of the registered ops. They guard direct calls of torch.ops.blt_kernels.*, because the Python wrappers
// check first and raise TypeError or ValueError; the stable ABI can raise only RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace blt {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace blt

// BLT_CHECK(condition, "patch_pool: x: expected 3 dimensions, got ", x.dim())
#define BLT_CHECK(condition, ...) \
  do {                            \
    if (!(condition)) {           \
      ::blt::fail(__VA_ARGS__);   \
    }                             \
  } while (false)
