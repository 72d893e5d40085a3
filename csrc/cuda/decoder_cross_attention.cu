#include "cuda/decoder_cross_attention.cuh"

#include "cuda/cross_attention_launch.h"

namespace blt::cuda {

namespace {

template <class T, int K>
void forward(const CrossAttentionArgs& args, Stream stream) {
  const Grid grid = attention_grid(args, ceil_div(args.batch * args.num_bytes, kByteTile), 1, args.kv_heads);
  launch("cross_attention_decoder", attention_decoder_kernel<T, K>, grid.blocks, grid.threads, 0, stream, args,
         grid.shape);
}

template <class T, int K>
void backward(const CrossAttentionArgs& args, Stream stream) {
  const int64_t parts = attention_parts(args);
  find_long_patches(args, parts, stream);
  const Grid grid =
      attention_grid(args, parts + args.batch * args.capacity, 1, args.kv_heads, kWalkThreads, walk_sets(args));
  launch("cross_attention_decoder_backward", attention_decoder_backward_kernel<T, K>, grid.blocks, grid.threads, 0,
         stream, args, grid.shape, parts);
  sum_parts(args, parts, args.kv_heads, args.grad_k, 2 * args.width, 0, stream);
  sum_parts(args, parts, args.kv_heads, args.grad_v, 2 * args.width, args.width, stream);
  zero_outside(args, args.heads * args.width * int64_t(sizeof(T)), args.grad_q, nullptr, stream);
}

}  // namespace

void decoder_forward(const CrossAttentionArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    if constexpr (sizeof(T) < 8) {
      const auto run = args.slots > 2 ? forward<T, 4> : args.slots == 2 ? forward<T, 2> : forward<T, 1>;
      run(args, stream);
    }
  })
}

void decoder_backward(const CrossAttentionArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    if constexpr (sizeof(T) < 8) {
      const auto run = held_rows(args) <= 1 ? backward<T, 1> : backward<T, 2>;
      run(args, stream);
    }
  })
}

}  // namespace blt::cuda
