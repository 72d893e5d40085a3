// The binary search of all kernels.
#pragma once

#include "common/kernel.h"

namespace BLT_KERNEL_NAMESPACE {

// The first i of low .. high - 1 for which is_before(i) does not hold, or high. Where is_before holds for some i it
// must hold for all smaller ones; if it does not, the result is still one of low .. high.
template <class Int, class IsBefore>
BLT_INLINE Int partition_point(Int low, Int high, const IsBefore& is_before) {
  while (low < high) {
    const Int middle = low + (high - low) / 2;
    if (is_before(middle)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace BLT_KERNEL_NAMESPACE
