// The rules of segmentation, as far as they look at single values. The CPU and the CUDA kernels share them.
#pragma once

#include "common/kernel.h"
#include "common/rule.h"

namespace BLT_KERNEL_NAMESPACE {

// With a BOS patch the first start is forced, and so is the next one where the rule compares neighbours: the entropy of
// position 0 is not used then, so that the first difference of two used entropies is that of position 2.
template <Rule R>
constexpr int kLastForced = R == Rule::monotonic || R == Rule::combined ? 1 : 0;

// Whether a patch starts after a byte, by its entropy and that of the byte before it. No comparison with NaN holds.
template <Rule R>
BLT_INLINE bool entropy_starts(float before, float entropy, float threshold, float delta) {
  if constexpr (R == Rule::threshold) {
    return entropy > threshold;
  } else if constexpr (R == Rule::monotonic) {
    return entropy - before > threshold;
  } else {
    static_assert(R == Rule::combined);
    return (entropy > threshold) & (entropy - before > delta);
  }
}

// Not a letter or digit of ASCII, and not a continuation byte of UTF-8.
BLT_INLINE bool is_spacelike(int64_t byte) {
  const bool letter = (byte >= 'A' && byte <= 'Z') || (byte >= 'a' && byte <= 'z');
  const bool digit = byte >= '0' && byte <= '9', continuation = byte >= 0x80 && byte < 0xc0;
  return !(letter | digit | continuation);
}

// The byte of a token. Unsigned arithmetic: a token at the end of int64 wraps.
BLT_INLINE int64_t byte_of(int64_t token, int64_t byte_offset) {
  return int64_t(uint64_t(token) - uint64_t(byte_offset));
}

}  // namespace BLT_KERNEL_NAMESPACE
