#include "cuda/entropy.cuh"

#include "cuda/launch.h"

namespace blt::cuda {

namespace {

// kEntropyPack where that number of logits can be read at once, otherwise 1.
template <class... Pointers>
int pack_width(int64_t vocab, size_t element, Pointers... pointers) {
  const int access = element == 8 ? 2 : kEntropyPack;
  return access_width(vocab, element, access, pointers...) == access ? kEntropyPack : 1;
}

}  // namespace

void entropy(const EntropyArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    launch("entropy", entropy_kernel<T>, ceil_div(args.rows, kEntropyWarps), kEntropyThreads, 0, stream, args,
           pack_width(args.vocab, sizeof(T), args.logits));
  })
}

void entropy_backward(const EntropyBackwardArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    launch("entropy_backward", entropy_backward_kernel<T>, ceil_div(args.rows, kEntropyWarps), kEntropyThreads, 0,
           stream, args, pack_width(args.vocab, sizeof(T), args.logits, args.out));
  })
}

}  // namespace blt::cuda
