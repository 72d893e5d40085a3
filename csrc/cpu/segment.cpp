// Where patches start, on the CPU. Position t of a sequence decides whether position t + 1 starts a patch.
#include "cpu/segment.h"

#include "common/segment_rules.h"
#include "cpu/vec.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

namespace {

// The decisions of a rule. It holds values, because for the compiler a store to `starts`, which are bytes, might change
// anything that is reached through a reference.
template <Rule R>
struct Decision {
  const float* e;
  const int64_t* tokens;
  float threshold, delta;
  int64_t byte_offset;
  bool bos_patch;

  BLT_INLINE int64_t byte(int64_t t) const { return byte_of(tokens[t], byte_offset); }
  BLT_INLINE uint8_t inner(int64_t t) const {  // t >= 1
    if constexpr (R == Rule::spaces) {
      return (byte(t) < 0) | (is_spacelike(byte(t)) & !is_spacelike(byte(t - 1)));
    } else {
      return entropy_starts<R>(e[t - 1], e[t], threshold, delta);
    }
  }
  uint8_t operator()(int64_t t) const {
    if (bos_patch && t <= kLastForced<R>) {
      return 1;
    }
    if (t > 0) {
      return inner(t);
    }
    return R == Rule::threshold ? e[0] > threshold : R == Rule::spaces ? byte(0) < 0 : 0;
  }
};

// Writes starts[0 .. n-1] of a sequence and returns the decision about the byte after it. n > 0.
template <Rule R>
uint8_t decide(const SegmentArgs& args, int64_t base, int64_t n, uint8_t* __restrict starts) {
  const Decision<R> starts_after{args.entropies + base, args.tokens + base, args.threshold, args.delta,
                                 args.byte_offset,      args.bos_patch};
  starts[0] = 1;
  for (int64_t t = 0; t < min_of(2, n - 1); ++t) {
    starts[t + 1] = starts_after(t);
  }
  for (int64_t t = 2; t < n - 1; ++t) {
    starts[t + 1] = starts_after.inner(t);
  }
  return starts_after(n - 1);
}

uint8_t decide_fixed(const SegmentArgs& args, int64_t n, uint8_t* starts) {
  memset(starts, 0, size_t(n));
  starts[0] = 1;
  const int64_t first = args.bos_patch ? 1 : args.patch_size;
  for (int64_t t = first; t < n; t += args.patch_size) {
    starts[t] = 1;
  }
  return n >= first && (n - first) % args.patch_size == 0;
}

}  // namespace

void segment(const SegmentArgs& args, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    const int64_t base = args.seq_begin[s], n = args.seq_end[s] - base;
    if (n <= 0) {
      args.next_is_start[s] = 0;
      continue;
    }
    uint8_t* starts = args.starts + base;
    uint8_t next = 0;
    switch (args.rule) {
      case Rule::threshold:
        next = decide<Rule::threshold>(args, base, n, starts);
        break;
      case Rule::monotonic:
        next = decide<Rule::monotonic>(args, base, n, starts);
        break;
      case Rule::combined:
        next = decide<Rule::combined>(args, base, n, starts);
        break;
      case Rule::spaces:
        next = decide<Rule::spaces>(args, base, n, starts);
        break;
      case Rule::fixed:
        next = decide_fixed(args, n, starts);
        break;
      case Rule::mask:  // no rule: layout_from_starts takes masks
        break;
    }
    if (args.max_patch_length > 0) {
      int64_t length = 0;  // of the patch so far
      for (int64_t i = 0; i < n; ++i) {
        const bool cut = starts[i] | (length == args.max_patch_length);
        starts[i] = cut;
        length = cut ? 1 : length + 1;
      }
      next |= length == args.max_patch_length;
    }
    args.next_is_start[s] = next;
  }
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
