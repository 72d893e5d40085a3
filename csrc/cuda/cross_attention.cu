#include <algorithm>

#include "cuda/decoder_cross_attention.cuh"
#include "cuda/encoder_cross_attention.cuh"
#include "cuda/launch.h"

namespace blt::cuda {

namespace {

struct Grid {
  AttentionShape shape;
  int64_t blocks;
  int threads;
};

// How many lanes hold a row together.
int lanes_of(const CrossAttentionArgs& args) {
  int lanes = 1;
  while (lanes < kWarp && lanes * kColumns < args.width) lanes *= 2;
  return lanes;
}

Grid attention_grid(const CrossAttentionArgs& args, int64_t items, int64_t rows, int64_t heads,
                    int most_threads = kAttentionThreads, int sets = 1) {
  const int lanes = lanes_of(args), groups = most_threads / (lanes * sets);
  const int64_t chunks = ceil_div(args.width, lanes * kColumns), tasks = rows * chunks * heads;
  const int64_t tasks_of_block = std::clamp<int64_t>(tasks, 1, groups);
  const int64_t items_of_block = groups / tasks_of_block;
  const int64_t blocks_of_item = ceil_div(tasks, tasks_of_block);
  BLT_CHECK(tasks <= INT32_MAX && args.width <= INT32_MAX / 2, "cross_attention: too large: ", tasks,
            " rows of heads in a patch");
  const int64_t threads = ceil_div(items_of_block * tasks_of_block * lanes * sets, kWarp) * kWarp;
  return {{lanes, sets, items, int(chunks), int(heads), unsigned(tasks), unsigned(tasks_of_block),
           unsigned(items_of_block), unsigned(blocks_of_item)},
          ceil_div(items, items_of_block) * blocks_of_item,
          int(threads)};
}

// Whether one group can read a whole row, 16 bytes at a time.
template <class T>
bool is_plain(const CrossAttentionArgs& args) {
  constexpr int N = 16 / sizeof(T);
  return args.width <= kWarp * kColumns && access_width(args.width, sizeof(T), N, args.q, args.k, args.v, args.out,
                                                        args.grad, args.grad_q, args.grad_k, args.grad_v) == N;
}

// How many queries an item has for a key head.
int64_t queries_of_item(const CrossAttentionArgs& args) {
  return (args.encoder ? args.slots : 1) * (args.heads / args.kv_heads);
}

// How many rows a walk over the bytes of a patch holds, and how many sets of lanes hold two of them each.
int64_t held_rows(const CrossAttentionArgs& args) { return args.encoder ? queries_of_item(args) : args.slots; }
int walk_sets(const CrossAttentionArgs& args) {
  int sets = 1;
  while (sets <= kWarp && sets * 2 < held_rows(args)) sets *= 2;
  return sets;
}

void find_long_patches(const CrossAttentionArgs& args, int64_t parts, Stream stream) {
  launch("cross_attention_long", attention_long_kernel, ceil_div(parts, kAttentionThreads), kAttentionThreads, 0,
         stream, args, parts);
}

template <class T, int Q, bool kPlain>
void forward(const CrossAttentionArgs& args, Stream stream) {
  const int64_t parts = args.encoder && args.window == 1 ? attention_parts(args) : 0, queries = queries_of_item(args);
  const int64_t items = args.batch * (args.encoder ? args.capacity : args.num_bytes);
  find_long_patches(args, parts, stream);
  const Grid grid = attention_grid(args, parts + items, ceil_div(queries, Q), args.kv_heads, attention_threads(Q));
  launch("cross_attention", attention_kernel<T, Q, kPlain>, grid.blocks, grid.threads, 0, stream, args, grid.shape,
         parts);
  if (parts > 0) {
    const Grid join = attention_grid(args, parts / 2, queries, args.kv_heads);
    launch("cross_attention_join", attention_join_kernel<T, kPlain>, join.blocks, join.threads, 0, stream, args,
           join.shape);
  }
}

template <class T, bool kPlain>
void backward_in_two_passes(const CrossAttentionArgs& args, Stream stream) {
  const int64_t patches = args.batch * args.capacity, bytes = args.batch * args.num_bytes;
  const Grid queries = attention_grid(args, args.encoder ? patches : bytes, queries_of_item(args), args.kv_heads);
  launch("cross_attention_queries", attention_queries_kernel<T, kPlain>, queries.blocks, queries.threads, 0, stream,
         args, queries.shape);
  const Grid keys = attention_grid(args, args.encoder ? bytes : patches, args.encoder ? 1 : args.slots, args.kv_heads);
  launch("cross_attention_keys", attention_keys_kernel<T, kPlain>, keys.blocks, keys.threads, 0, stream, args,
         keys.shape);
}

template <class T, int K>
void decoder_forward(const CrossAttentionArgs& args, Stream stream) {
  const Grid grid = attention_grid(args, ceil_div(args.batch * args.num_bytes, kByteTile), 1, args.kv_heads);
  launch("cross_attention_decoder", attention_decoder_kernel<T, K>, grid.blocks, grid.threads, 0, stream, args,
         grid.shape);
}

// Writes zeros to one or two gradients of bytes without a patch.
void zero_outside(const CrossAttentionArgs& args, int64_t row_bytes, void* first, void* second, Stream stream) {
  const int64_t blocks = ceil_div(args.batch * args.num_bytes, kAttentionThreads);
  launch("cross_attention_zero", attention_zero_kernel<uint4>, blocks, kAttentionThreads, 0, stream, args,
         row_bytes / 16, static_cast<uint4*>(first), static_cast<uint4*>(second));
}

template <class T>
void sum_parts(const CrossAttentionArgs& args, int64_t parts, int64_t heads, void* out, int64_t numbers, int64_t from,
               Stream stream) {
  if (parts > 0 && out != nullptr) {
    const Grid grid = attention_grid(args, parts / 2, args.slots, heads);
    launch("cross_attention_sum", attention_sum_kernel<T>, grid.blocks, grid.threads, 0, stream, args, grid.shape,
           static_cast<T*>(out), numbers, from);
  }
}

template <class T, int Q>
void encoder_backward(const CrossAttentionArgs& args, Stream stream) {
  const int64_t parts = attention_parts(args);
  const auto run = [&](int64_t items, bool only_sums) {
    const Grid grid = attention_grid(args, items, 1, args.kv_heads, kWalkThreads, walk_sets(args));
    launch("cross_attention_encoder_backward", attention_encoder_backward_kernel<T, Q>, grid.blocks, grid.threads, 0,
           stream, args, grid.shape, parts, only_sums);
  };
  find_long_patches(args, parts, stream);
  run(parts, true);
  run(parts + args.batch * args.capacity, false);
  sum_parts<T>(args, parts, args.heads, args.grad_q, args.width + 2, 0, stream);
  zero_outside(args, args.kv_heads * args.width * int64_t(sizeof(T)), args.grad_k, args.grad_v, stream);
}

template <class T, int K>
void decoder_backward(const CrossAttentionArgs& args, Stream stream) {
  const int64_t parts = attention_parts(args);
  find_long_patches(args, parts, stream);
  const Grid grid =
      attention_grid(args, parts + args.batch * args.capacity, 1, args.kv_heads, kWalkThreads, walk_sets(args));
  launch("cross_attention_decoder_backward", attention_decoder_backward_kernel<T, K>, grid.blocks, grid.threads, 0,
         stream, args, grid.shape, parts);
  sum_parts<T>(args, parts, args.kv_heads, args.grad_k, 2 * args.width, 0, stream);
  sum_parts<T>(args, parts, args.kv_heads, args.grad_v, 2 * args.width, args.width, stream);
  zero_outside(args, args.heads * args.width * int64_t(sizeof(T)), args.grad_q, nullptr, stream);
}

}  // namespace

bool attention_is_fused(const CrossAttentionArgs& args) {
  bool plain = false;
  BLT_DISPATCH_FLOAT(args.dtype, T, { plain = sizeof(T) < 8 && is_plain<T>(args); })
  return plain && args.window == 1 && walk_sets(args) * lanes_of(args) <= kWarp;
}

void cross_attention(const CrossAttentionArgs& args, Stream stream) {
  const int64_t queries = queries_of_item(args);
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    auto run = forward<T, 1, false>;
    if (is_plain<T>(args)) {
      run = forward<T, 1, true>;
      if constexpr (sizeof(T) < 8) {
        if (!args.encoder && args.window == 1 && args.slots <= 4) {
          run = args.slots > 2    ? decoder_forward<T, 4>
                : args.slots == 2 ? decoder_forward<T, 2>
                                  : decoder_forward<T, 1>;
        } else {
          run = queries == 1 ? run : queries == 2 ? forward<T, 2, true> : forward<T, 4, true>;
        }
      }
    }
    run(args, stream);
  })
}

void cross_attention_backward(const CrossAttentionArgs& args, Stream stream) {
  const bool fused = attention_is_fused(args);
  const bool one = held_rows(args) <= 1;
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    auto run = is_plain<T>(args) ? backward_in_two_passes<T, true> : backward_in_two_passes<T, false>;
    if constexpr (sizeof(T) < 8) {
      if (fused && args.encoder) {
        run = one ? encoder_backward<T, 1> : encoder_backward<T, 2>;
      } else if (fused) {
        run = one ? decoder_backward<T, 1> : decoder_backward<T, 2>;
      }
    }
    run(args, stream);
  })
}

}  // namespace blt::cuda
