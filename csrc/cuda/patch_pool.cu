#include "cuda/patch_pool.cuh"

#include "cuda/launch.h"

namespace blt::cuda {

namespace {

template <class T, int N, Reduce kReduce>
void forward(const PatchPoolArgs& args, Stream stream) {
  const PoolShape shape = pool_shape(args, N);
  launch("patch_pool", patch_pool_kernel<T, N, kReduce>, pool_blocks(args, shape), kPoolThreads, 0, stream, args,
         shape);
  if (args.long_slots != nullptr) {
    launch("patch_pool_join", patch_pool_join_kernel<T, N, kReduce>, join_blocks(args, shape, kPartColumns<Acc<T>, N>),
           kPoolThreads, 0, stream, args, shape);
  }
}

template <class T, int N>
void forward(const PatchPoolArgs& args, Stream stream) {
  switch (args.reduce) {
    case Reduce::max:
      return forward<T, N, Reduce::max>(args, stream);
    case Reduce::min:
      return forward<T, N, Reduce::min>(args, stream);
    default:
      return forward<T, N, Reduce::sum>(args, stream);
  }
}

template <class T, int N>
void backward(const PatchPoolBackwardArgs& args, Stream stream) {
  const PatchPoolArgs& f = args.forward;
  const PoolShape shape = pool_shape(f, N);
  const int64_t blocks = pool_blocks(f, shape);
  if (f.reduce == Reduce::mean || f.reduce == Reduce::sum) {
    launch("patch_pool_spread", patch_pool_spread_kernel<T, N>, blocks, kPoolThreads, 0, stream, args, shape);
    return;
  }
  launch("patch_pool_winners", patch_pool_winners_kernel<T, N>, blocks, kPoolThreads, 0, stream, args, shape);
  if (f.long_slots != nullptr) {
    launch("patch_pool_shares", patch_pool_shares_kernel<T, N>, join_blocks(f, shape, kPartColumns<Acc<T>, N>),
           kPoolThreads, 0, stream, args, shape);
    launch("patch_pool_long", patch_pool_long_kernel<T, N>, blocks, kPoolThreads, 0, stream, args, shape);
  }
}

}  // namespace

void patch_pool(const PatchPoolArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    constexpr int N = 16 / sizeof(T);
    const bool wide = access_width(args.width, sizeof(T), N, args.x, args.out) == N;
    wide ? forward<T, N>(args, stream) : forward<T, 1>(args, stream);
  })
}

void patch_pool_backward(const PatchPoolBackwardArgs& args, Stream stream) {
  const PatchPoolArgs& f = args.forward;
  BLT_DISPATCH_FLOAT(f.dtype, T, {
    constexpr int N = 16 / sizeof(T);
    const bool wide = access_width(f.width, sizeof(T), N, f.x, f.out, args.grad, args.grad_x) == N;
    wide ? backward<T, N>(args, stream) : backward<T, 1>(args, stream);
  })
}

}  // namespace blt::cuda
