// entropy on the CPU. The work is vectorised along a row of logits.
#include "cpu/entropy.h"

#include "cpu/entropy_row.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

void entropy(const EntropyArgs& args, int64_t begin, int64_t end) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    row_entropies(static_cast<const T*>(args.logits) + begin * args.vocab, end - begin, args.vocab,
                  static_cast<Acc<T>*>(args.out) + begin);
  })
}

void entropy_backward(const EntropyBackwardArgs& args, int64_t begin, int64_t end) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    for (int64_t r = begin; r < end; ++r) {
      row_gradient(static_cast<const T*>(args.logits) + r * args.vocab, args.vocab,
                   static_cast<const Acc<T>*>(args.grad)[r], static_cast<T*>(args.out) + r * args.vocab);
    }
  })
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
