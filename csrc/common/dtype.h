// Element types, without torch headers. The ops translate torch's scalar types into them, and the kernels switch on
// them.
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

// Arithmetic type of an element type: fp64 in fp64, everything else in fp32.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

}  // namespace blt

// Runs the statements with T bound to the element type of `dtype`.
#define BLT_DISPATCH_FLOAT(dtype, T, ...) \
  switch (dtype) {                        \
    case ::blt::DType::f32: {             \
      using T = float;                    \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case ::blt::DType::f64: {             \
      using T = double;                   \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case ::blt::DType::bf16: {            \
      using T = ::blt::bfloat16;          \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case ::blt::DType::f16: {             \
      using T = ::blt::float16;           \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
  }

// Runs the statements with T bound to the table's element type and U to that of bytes (out, base, grad).
// clang-format off
#define BLT_DISPATCH_TABLE(table_dtype, byte_dtype, T, U, ...) \
  if (table_dtype == ::blt::DType::f64) {                      \
    using T = double;                                          \
    using U = double;                                          \
    __VA_ARGS__;                                               \
  } else {                                                     \
    BLT_DISPATCH_FLOAT(table_dtype, T, {                       \
      BLT_DISPATCH_FLOAT(byte_dtype, U, {                      \
        if constexpr (sizeof(T) < 8 && sizeof(U) < 8) {        \
          __VA_ARGS__;                                         \
        }                                                      \
      })                                                       \
    })                                                         \
  }
// clang-format on
