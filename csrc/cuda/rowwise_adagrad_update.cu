#include "cuda/rowwise_adagrad_update.cuh"

#include "cuda/launch.h"

namespace blt::cuda {

namespace {

template <class T, int N>
void update(const RowwiseAdagradArgs& args, Stream stream) {
  using A = Acc<T>;
  launch("rowwise_adagrad_update", rowwise_adagrad_update_kernel<T, N>, ceil_div(args.count, kAdagradRows),
         kAdagradThreads, 0, stream, args, AdagradStep<A>{A(args.lr), A(args.eps), A(1 - args.lr * args.weight_decay)});
}

}  // namespace

void rowwise_adagrad_update(const RowwiseAdagradArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    constexpr int N = 16 / sizeof(T);
    const bool wide = access_width(args.width, sizeof(T), N, args.table, args.values) == N;
    (wide ? update<T, N> : update<T, 1>)(args, stream);
  })
}

}  // namespace blt::cuda
