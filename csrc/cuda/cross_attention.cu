#include "cuda/cross_attention_launch.h"
#include "cuda/cross_attention_parts.cuh"

namespace blt::cuda {

void find_long_patches(const CrossAttentionArgs& args, int64_t parts, Stream stream) {
  launch("cross_attention_long", attention_long_kernel, ceil_div(parts, kAttentionThreads), kAttentionThreads, 0,
         stream, args, parts);
}

void zero_outside(const CrossAttentionArgs& args, int64_t row_bytes, void* first, void* second, Stream stream) {
  const int64_t blocks = ceil_div(args.batch * args.num_bytes, kAttentionThreads);
  launch("cross_attention_zero", attention_zero_kernel<uint4>, blocks, kAttentionThreads, 0, stream, args,
         row_bytes / 16, static_cast<uint4*>(first), static_cast<uint4*>(second));
}

namespace {

template <class T>
void sum(const CrossAttentionArgs& args, int64_t parts, int64_t heads, void* out, int64_t numbers, int64_t from,
         Stream stream) {
  const Grid grid = attention_grid(args, parts / 2, args.slots, heads);
  launch("cross_attention_sum", attention_sum_kernel<T>, grid.blocks, grid.threads, 0, stream, args, grid.shape,
         static_cast<T*>(out), numbers, from);
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
    join_parts(args, parts, stream);
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

}  // namespace

void sum_parts(const CrossAttentionArgs& args, int64_t parts, int64_t heads, void* out, int64_t numbers, int64_t from,
               Stream stream) {
  if (parts > 0 && out != nullptr) {
    BLT_DISPATCH_FLOAT(args.dtype, T, {
      if constexpr (sizeof(T) < 8) {
        sum<T>(args, parts, heads, out, numbers, from, stream);
      }
    })
  }
}

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
          run = decoder_forward;
        } else {
          run = queries == 1 ? run : queries == 2 ? forward<T, 2, true> : forward<T, 4, true>;
        }
      }
    }
    if (encoder_is_row64(args)) {
      run = encoder_forward;
    }
    run(args, stream);
  })
}

void cross_attention_backward(const CrossAttentionArgs& args, Stream stream) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    auto run = is_plain<T>(args) ? backward_in_two_passes<T, true> : backward_in_two_passes<T, false>;
    if (attention_is_fused(args)) {
      run = args.encoder ? encoder_backward : decoder_backward;
    }
    run(args, stream);
  })
}

}  // namespace blt::cuda
