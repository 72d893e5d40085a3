// Element types, free of torch headers: kernels switch on them, ops translate torch's scalar types into them.
#pragma once

#include <stdint.h>

namespace blt {

enum class DType : int32_t { f32, f64, bf16, f16 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace blt

// Runs the statements with T bound to the element type of `dtype`.
#define BLT_DISPATCH_FLOAT(dtype, T, ...)             \
  switch (dtype) {                                    \
    case ::blt::DType::f32: {                         \
      using T = float;                                \
      __VA_ARGS__;                                    \
      break;                                          \
    }                                                 \
    case ::blt::DType::f64: {                         \
      using T = double;                               \
      __VA_ARGS__;                                    \
      break;                                          \
    }                                                 \
    case ::blt::DType::bf16: {                        \
      using T = ::blt::bfloat16;                      \
      __VA_ARGS__;                                    \
      break;                                          \
    }                                                 \
    case ::blt::DType::f16: {                         \
      using T = ::blt::float16;                       \
      __VA_ARGS__;                                    \
      break;                                          \
    }                                                 \
  }
