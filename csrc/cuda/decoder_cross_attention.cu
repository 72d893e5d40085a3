#include "cuda/decoder_cross_attention.cuh"

#include "cuda/cross_attention_launch.h"
#include "cuda/decoder_cross_attention_row64.cuh"

namespace blt::cuda {

namespace {

template <class T, int K>
void forward(const CrossAttentionArgs& args, Stream stream) {
  const Grid grid = attention_grid(args, ceil_div(args.batch * args.num_bytes, kByteTile), 1, args.kv_heads);
  launch("cross_attention_decoder", attention_decoder_kernel<T, K>, grid.blocks, grid.threads, 0, stream, args,
         grid.shape);
}

// Whether the fast path serves these tensors. Its kernels count rows of heads in 32 bits, which is enough for tensors
// that fit on a device.
bool is_row64(const CrossAttentionArgs& args) {
  return has_row64_shape(args) && args.heads <= INT32_MAX / (kRow64Tile * kRowWidth) &&
         args.batch * (args.num_bytes + args.capacity) <= INT32_MAX / args.heads;
}

// How many blocks do all heads of so many items.
int64_t row64_blocks(const CrossAttentionArgs& args, int64_t items) {
  return ceil_div(items * args.heads * kRowLanes, kRow64Threads);
}

// The function of the fast path for 1, 2, 3 or 4 slots.
template <class Function>
Function by_slots(const CrossAttentionArgs& args, Function one, Function two, Function three, Function four) {
  return args.slots == 1 ? one : args.slots == 2 ? two : args.slots == 3 ? three : four;
}

template <class T, int K>
void forward_row64(const CrossAttentionArgs& args, Stream stream) {
  const int64_t tiles = ceil_div(args.batch * args.num_bytes, kRow64Tile);
  launch("decoder_row64", decoder_row64_kernel<T, K>, row64_blocks(args, tiles), kRow64Threads, 0, stream, args,
         float(args.scale));
}

template <class T, int K>
void walk(const CrossAttentionArgs& args, int64_t parts, Stream stream) {
  const Grid grid =
      attention_grid(args, parts + args.batch * args.capacity, 1, args.kv_heads, kWalkThreads, walk_sets(args));
  launch("cross_attention_decoder_backward", attention_decoder_backward_kernel<T, K>, grid.blocks, grid.threads, 0,
         stream, args, grid.shape, parts);
}

template <class T, int K>
void walk_row64(const CrossAttentionArgs& args, int64_t parts, Stream stream) {
  launch("decoder_backward_row64", decoder_backward_row64_kernel<T, K>,
         row64_blocks(args, parts + args.batch * args.capacity), kRow64Threads, 0, stream, args, float(args.scale),
         parts);
}

}  // namespace

void decoder_forward(const CrossAttentionArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    if constexpr (sizeof(T) < 8) {
      auto run = args.slots > 2 ? forward<T, 4> : args.slots == 2 ? forward<T, 2> : forward<T, 1>;
      if constexpr (sizeof(T) == 2) {
        if (is_row64(args)) {
          run = by_slots(args, forward_row64<T, 1>, forward_row64<T, 2>, forward_row64<T, 3>, forward_row64<T, 4>);
        }
      }
      run(args, stream);
    }
  })
}

void decoder_backward(const CrossAttentionArgs& args, Stream stream) {
  const int64_t parts = attention_parts(args);
  find_long_patches(args, parts, stream);
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    if constexpr (sizeof(T) < 8) {
      auto run = held_rows(args) <= 1 ? walk<T, 1> : walk<T, 2>;
      if constexpr (sizeof(T) == 2) {
        if (is_row64(args)) {
          run = by_slots(args, walk_row64<T, 1>, walk_row64<T, 2>, walk_row64<T, 3>, walk_row64<T, 4>);
        }
      }
      run(args, parts, stream);
      zero_outside(args, args.heads * args.width * int64_t(sizeof(T)), args.grad_q, nullptr, stream);
    }
  })
  sum_parts(args, parts, args.kv_heads, args.grad_k, 2 * args.width, 0, stream);
  sum_parts(args, parts, args.kv_heads, args.grad_v, 2 * args.width, args.width, stream);
}

}  // namespace blt::cuda
