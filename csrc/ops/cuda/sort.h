// Sorts, sums and reads on the device, with torch's operators.
#pragma once

#include <array>

#include "ops/cuda/device.h"

namespace blt {

// The keys [n], ascending, and the place that each had before (int64). Equal keys keep their order. n < 2^31.
inline std::tuple<Tensor, Tensor> stable_sort(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  call_torch("aten::sort", "stable", stack.data());
  return {touchable(to<Tensor>(stack[0])), touchable(to<Tensor>(stack[1]))};
}

// Inclusive sums of integers [n], as int64.
inline Tensor running_sum(const Tensor& counts) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(counts), from(int64_t(0)), from(std::optional<ScalarType>())};
  call_torch("aten::cumsum", "", stack.data());
  return touchable(torch::stable::detail::to<Tensor>(stack[0]));
}

// Reads an int64 value []. Waits for the device.
inline int64_t read(const Tensor& value) {
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  return *torch::stable::to(value, host).const_data_ptr<int64_t>();
}

}  // namespace blt
