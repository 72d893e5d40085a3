#include "cuda/entropy.h"

#include "cuda/entropy_long.cuh"
#include "cuda/entropy_short.cuh"
#include "cuda/launch.h"

namespace blt::cuda {

namespace {

template <class... Pointers>
bool is_packed(int64_t vocab, Pointers... pointers) {
  return vocab % kEntropyQuad == 0 && access_width(16, 1, 16, pointers...) == 16;
}

// Short rows of a block are as many as have room in shared memory.
template <class T, int Quads, class... Pointers>
ShortRowsShape short_rows_shape(int64_t vocab, Pointers... pointers) {
  const int pitch = int(ceil_div(vocab, kEntropyQuad)) * kEntropyQuad;
  const int warps = min_of(kEntropyWarps, kEntropyShared / (kRowsOfWarp<Quads> * pitch * int(sizeof(T))));
  return {int(vocab), pitch, warps * kRowsOfWarp<Quads>, is_packed(vocab, pointers...)};
}

template <int Quads>
int threads_of(const ShortRowsShape& shape) {
  return shape.rows / kRowsOfWarp<Quads> * kWarp;
}

// Calls run with the number of quads of these rows where there is a kernel for it, otherwise with 0.
template <class T, class Run>
void with_quads(int64_t vocab, Run run) {
  if constexpr (sizeof(T) < 8) {
    if (vocab / kEntropyStep == 8) {
      return run(std::integral_constant<int, 8>());
    }
    if (vocab / kEntropyStep == 16) {
      return run(std::integral_constant<int, 16>());
    }
  }
  run(std::integral_constant<int, 0>());
}

}  // namespace

void entropy(const EntropyArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    if (args.vocab * int64_t(sizeof(T)) > kEntropyShort) {
      launch("entropy", long_entropy_kernel<T>, ceil_div(args.rows, kEntropyWarps), kEntropyThreads, 0, stream, args,
             is_packed(args.vocab, args.logits));
      return;
    }
    with_quads<T>(args.vocab, [&](auto quads) {
      constexpr int kQuads = decltype(quads)::value;
      const ShortRowsShape shape = short_rows_shape<T, kQuads>(args.vocab, args.logits);
      launch("entropy", entropy_kernel<T, kQuads>, ceil_div(args.rows, shape.rows), threads_of<kQuads>(shape), 0,
             stream, args, shape);
    });
  })
}

void entropy_backward(const EntropyBackwardArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    if (args.vocab * int64_t(sizeof(T)) > kEntropyShort) {
      launch("entropy_backward", long_entropy_backward_kernel<T>, ceil_div(args.rows, kEntropyWarps), kEntropyThreads,
             0, stream, args, is_packed(args.vocab, args.logits, args.out));
      return;
    }
    with_quads<T>(args.vocab, [&](auto quads) {
      constexpr int kQuads = decltype(quads)::value;
      const ShortRowsShape shape = short_rows_shape<T, kQuads>(args.vocab, args.logits, args.out);
      launch("entropy_backward", entropy_backward_kernel<T, kQuads>, ceil_div(args.rows, shape.rows),
             threads_of<kQuads>(shape), 0, stream, args, shape);
    });
  })
}

}  // namespace blt::cuda
