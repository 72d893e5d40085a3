#include "cuda/patch_pool.cuh"

#include "cuda/launch.h"

namespace blt::cuda {

namespace {

// Calls run(shape, blocks, threads) for packs of n columns.
template <class Run>
void with_shape(const PatchPoolArgs& args, int n, const Run& run) {
  const PoolShape shape = pool_shape(args, n);
  const int groups = kPoolThreads / shape.lanes;
  const int64_t tasks = args.batch * shape.tiles * shape.chunks;
  run(shape, ceil_div(tasks, groups), groups * shape.lanes);
}

template <class T, int N, bool kExtreme>
void forward(const PatchPoolArgs& args, Stream stream) {
  with_shape(args, N, [&](const PoolShape& shape, int64_t blocks, int threads) {
    launch("patch_pool", patch_pool_kernel<T, N, kExtreme>, blocks, threads, 0, stream, args, shape);
    if (args.num_bytes > kPoolTile) {
      launch("patch_pool_join", patch_pool_join_kernel<T, N, kExtreme>, blocks, threads, 0, stream, args, shape);
    }
  });
}

template <class T, int N, bool kExtreme>
void backward(const PatchPoolBackwardArgs& args, Stream stream) {
  with_shape(args.forward, N, [&](const PoolShape& shape, int64_t blocks, int threads) {
    if (kExtreme && args.forward.num_bytes > kPoolTile) {
      launch("patch_pool_ties", patch_pool_ties_kernel<T, N>, blocks, threads, 0, stream, args, shape);
      launch("patch_pool_shares", patch_pool_shares_kernel<T, N>, blocks, threads, 0, stream, args, shape);
    }
    launch("patch_pool_backward", patch_pool_backward_kernel<T, N, kExtreme>, blocks, threads, 0, stream, args, shape);
  });
}

bool is_extreme(Reduce reduce) { return reduce == Reduce::max || reduce == Reduce::min; }

}  // namespace

void patch_pool(const PatchPoolArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    constexpr int N = 16 / sizeof(T);
    const bool wide = access_width(args.width, sizeof(T), N, args.x, args.out) == N;
    const auto run = is_extreme(args.reduce) ? (wide ? forward<T, N, true> : forward<T, 1, true>)
                                             : (wide ? forward<T, N, false> : forward<T, 1, false>);
    run(args, stream);
  })
}

void patch_pool_backward(const PatchPoolBackwardArgs& args, Stream stream) {
  const PatchPoolArgs& f = args.forward;
  BLT_DISPATCH_FLOAT(f.dtype, T, {
    constexpr int N = 16 / sizeof(T);
    const bool wide = access_width(f.width, sizeof(T), N, f.x, f.out, args.grad, args.grad_x) == N;
    const auto run = is_extreme(f.reduce) ? (wide ? backward<T, N, true> : backward<T, 1, true>)
                                          : (wide ? backward<T, N, false> : backward<T, 1, false>);
    run(args, stream);
  })
}

}  // namespace blt::cuda
