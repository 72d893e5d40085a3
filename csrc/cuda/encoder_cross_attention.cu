#include "cuda/encoder_cross_attention.cuh"

#include "cuda/cross_attention_launch.h"

namespace blt::cuda {

void join_parts(const CrossAttentionArgs& args, int64_t parts, Stream stream) {
  const Grid grid = attention_grid(args, parts / 2, queries_of_item(args), args.kv_heads);
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    const auto kernel = is_plain<T>(args) ? attention_join_kernel<T, true> : attention_join_kernel<T, false>;
    launch("cross_attention_join", kernel, grid.blocks, grid.threads, 0, stream, args, grid.shape);
  })
}

namespace {

template <class T, int Q>
void backward(const CrossAttentionArgs& args, Stream stream) {
  const int64_t parts = attention_parts(args);
  const auto run = [&](int64_t items, bool only_sums) {
    const Grid grid = attention_grid(args, items, 1, args.kv_heads, kWalkThreads, walk_sets(args));
    launch("cross_attention_encoder_backward", attention_encoder_backward_kernel<T, Q>, grid.blocks, grid.threads, 0,
           stream, args, grid.shape, parts, only_sums);
  };
  find_long_patches(args, parts, stream);
  run(parts, true);
  run(parts + args.batch * args.capacity, false);
  sum_parts(args, parts, args.heads, args.grad_q, args.width + 2, 0, stream);
  zero_outside(args, args.kv_heads * args.width * int64_t(sizeof(T)), args.grad_k, args.grad_v, stream);
}

}  // namespace

void encoder_backward(const CrossAttentionArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    if constexpr (sizeof(T) < 8) {
      const auto run = held_rows(args) <= 1 ? backward<T, 1> : backward<T, 2>;
      run(args, stream);
    }
  })
}

}  // namespace blt::cuda
