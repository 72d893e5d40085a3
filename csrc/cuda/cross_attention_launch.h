// What the launchers of cross-attention share: how tasks are dealt out to thread blocks, and which kernels serve which
// shapes.
#pragma once

#include <algorithm>

#include "cuda/cross_attention.cuh"
#include "cuda/launch.h"

namespace blt::cuda {

struct Grid {
  AttentionShape shape;
  int64_t blocks;
  int threads;
};

// How many lanes hold a row together.
inline int lanes_of(const CrossAttentionArgs& args) {
  int lanes = 1;
  while (lanes < kWarp && lanes * kColumns < args.width) lanes *= 2;
  return lanes;
}

inline Grid attention_grid(const CrossAttentionArgs& args, int64_t items, int64_t rows, int64_t heads,
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
inline int64_t queries_of_item(const CrossAttentionArgs& args) {
  return (args.encoder ? args.slots : 1) * (args.heads / args.kv_heads);
}

// How many rows a walk over the bytes of a patch holds, and how many sets of lanes hold two of them each.
inline int64_t held_rows(const CrossAttentionArgs& args) { return args.encoder ? queries_of_item(args) : args.slots; }
inline int walk_sets(const CrossAttentionArgs& args) {
  int sets = 1;
  while (sets <= kWarp && sets * 2 < held_rows(args)) sets *= 2;
  return sets;
}

// Finds the patch of each part of long patches.
void find_long_patches(const CrossAttentionArgs& args, int64_t parts, Stream stream);

// Writes zeros to one or two gradients of bytes without a patch.
void zero_outside(const CrossAttentionArgs& args, int64_t row_bytes, void* first, void* second, Stream stream);

// Adds up a gradient of the slots of long patches from their parts. A row of a part is `numbers` long, and the gradient
// begins at number `from`.
void sum_parts(const CrossAttentionArgs& args, int64_t parts, int64_t heads, void* out, int64_t numbers, int64_t from,
               Stream stream);

// Joins the parts of the queries of long patches.
void join_parts(const CrossAttentionArgs& args, int64_t parts, Stream stream);

// The window is 1, rows are plain, and elements have at most 4 bytes: the decoder's forward for at most 4 slots, and
// the backward of shapes that are fused.
void decoder_forward(const CrossAttentionArgs& args, Stream stream);
void decoder_backward(const CrossAttentionArgs& args, Stream stream);
void encoder_backward(const CrossAttentionArgs& args, Stream stream);

// Whether the fast path of encoder_cross_attention_row64.cuh serves these tensors, and its forward.
bool encoder_is_row64(const CrossAttentionArgs& args);
void encoder_forward(const CrossAttentionArgs& args, Stream stream);

}  // namespace blt::cuda
