#pragma once

#include "cuda/device.h"

namespace blt::cuda {

// Divides by a number that the launcher knows: three instructions where a division takes twenty.
class Divisor {
 public:
  // `divisor` is 1 .. INT32_MAX.
  explicit Divisor(int divisor) : divisor_(unsigned(divisor)) {
    while (uint64_t(1) << (shift_ - 31) < divisor_) ++shift_;
    // The factor exceeds 2^shift / divisor by less than 1, and 2^shift by at least 2^31 times the divisor, so for
    // numbers below 2^31 the error does not reach the next quotient.
    factor_ = unsigned(((uint64_t(1) << shift_) + divisor_ - 1) / divisor_);
  }

  // `number` is below 2^31.
  __device__ __forceinline__ unsigned quotient(unsigned number) const {
    return unsigned(uint64_t(number) * factor_ >> shift_);
  }
  __device__ __forceinline__ unsigned remainder(unsigned number) const { return number - quotient(number) * divisor_; }

 private:
  unsigned divisor_, factor_ = 0, shift_ = 31;
};

}  // namespace blt::cuda
