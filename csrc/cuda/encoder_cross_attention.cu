#include "cuda/encoder_cross_attention.cuh"

#include "cuda/cross_attention_launch.h"
#include "cuda/encoder_cross_attention_row64.cuh"

namespace blt::cuda {

void join_parts(const CrossAttentionArgs& args, int64_t parts, Stream stream) {
  const Grid grid = attention_grid(args, parts / 2, queries_of_item(args), args.kv_heads);
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    const auto kernel = is_plain<T>(args) ? attention_join_kernel<T, true> : attention_join_kernel<T, false>;
    launch("cross_attention_join", kernel, grid.blocks, grid.threads, 0, stream, args, grid.shape);
  })
}

namespace {

EncoderShape encoder_shape(const CrossAttentionArgs& args, int64_t parts, int64_t items) {
  const int64_t tiles = ceil_div(args.num_bytes, kAttentionTile);
  return {int(items * args.heads),
          int(parts),
          int(args.heads),
          int(args.slots),
          int(args.capacity),
          int(args.num_bytes),
          Divisor(int(args.heads)),
          Divisor(int(std::max<int64_t>(args.capacity, 1))),
          Divisor(int(std::max<int64_t>(tiles, 1))),
          float(args.scale)};
}

template <class T, int K>
void forward_row64(const CrossAttentionArgs& args, Stream stream) {
  const int64_t parts = attention_parts(args);
  const EncoderShape shape = encoder_shape(args, parts, parts + args.batch * args.capacity);
  find_long_patches(args, parts, stream);
  launch("encoder_row64", encoder_row64_kernel<T, K>, ceil_div(shape.units, kAttentionThreads / kRowLanes),
         kAttentionThreads, 0, stream, args, shape);
  if (parts > 0) {
    join_parts(args, parts, stream);
  }
}

template <class T, int Q>
void walk(const CrossAttentionArgs& args, int64_t parts, Stream stream) {
  const auto run = [&](int64_t items, bool only_sums) {
    const Grid grid = attention_grid(args, items, 1, args.kv_heads, kWalkThreads, walk_sets(args));
    launch("cross_attention_encoder_backward", attention_encoder_backward_kernel<T, Q>, grid.blocks, grid.threads, 0,
           stream, args, grid.shape, parts, only_sums);
  };
  run(parts, true);
  run(parts + args.batch * args.capacity, false);
}

template <class T, int K>
void walk_row64(const CrossAttentionArgs& args, int64_t parts, Stream stream) {
  const auto run = [&](int64_t items, bool only_sums) {
    const EncoderShape shape = encoder_shape(args, parts, items);
    launch("encoder_backward_row64", encoder_backward_row64_kernel<T, K>,
           ceil_div(shape.units, kWalkThreads / kRowLanes), kWalkThreads, 0, stream, args, shape, only_sums);
  };
  run(parts, true);
  run(parts + args.batch * args.capacity, false);
}

}  // namespace

bool encoder_is_row64(const CrossAttentionArgs& args) {
  bool plain = false;
  BLT_DISPATCH_FLOAT(args.dtype, T, { plain = sizeof(T) == 2 && is_plain<T>(args); })
  // The kernels count rows of heads in 32 bits, and may count a step beyond the last row.
  const int64_t items = attention_parts(args) + args.batch * (args.capacity * args.slots + args.num_bytes);
  return plain && args.encoder && args.window == 1 && has_row64_shape(args) && items + kDots < INT32_MAX / args.heads;
}

void encoder_forward(const CrossAttentionArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    if constexpr (sizeof(T) == 2) {
      const auto run = args.slots <= 2 ? forward_row64<T, 2> : forward_row64<T, 4>;
      run(args, stream);
    }
  })
}

void encoder_backward(const CrossAttentionArgs& args, Stream stream) {
  const int64_t parts = attention_parts(args);
  find_long_patches(args, parts, stream);
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    if constexpr (sizeof(T) < 8) {
      auto run = held_rows(args) <= 1 ? walk<T, 1> : walk<T, 2>;
      if constexpr (sizeof(T) == 2) {
        if (encoder_is_row64(args)) {
          run = args.slots <= 2 ? walk_row64<T, 2> : walk_row64<T, 4>;
        }
      }
      run(args, parts, stream);
      sum_parts(args, parts, args.heads, args.grad_q, args.width + 2, 0, stream);
      zero_outside(args, args.kv_heads * args.width * int64_t(sizeof(T)), args.grad_k, args.grad_v, stream);
    }
  })
}

}  // namespace blt::cuda
