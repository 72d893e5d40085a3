// Eight dot products at a time, each of rows that eight lanes hold together.
#pragma once

#include "cuda/device.h"

namespace blt::cuda {

constexpr int kDots = 8;  // dots, and lanes that share a row

// Lane l of every eight lanes gets the sum of dots[l] over these lanes. Each step halves the number of sums that a lane
// still has, so this takes 7 shuffles where summing one dot after the other would take 24. All lanes of the warp take
// part. `dots` is used up.
template <class A>
__device__ __forceinline__ A transposed_sum(A (&dots)[kDots]) {
  const int lane = int(threadIdx.x) % kDots;
#pragma unroll
  for (int distance = kDots / 2; distance > 0; distance /= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int d = 0; d < distance; ++d) {
      const A kept = upper ? dots[d + distance] : dots[d], sent = upper ? dots[d] : dots[d + distance];
      dots[d] = kept + __shfl_xor_sync(kFullWarp, sent, distance);
    }
  }
  return dots[0];
}

}  // namespace blt::cuda
