// Cross-attention with window 1: what its launches do besides the walks over patches. They find the parts of long
// patches, add up the parts' gradients, and write zeros for bytes without a patch.
#pragma once

#include "cuda/cross_attention.cuh"

namespace blt::cuda {

// Finds the patch of each part, a thread for a part. Most tiles have no part of a long patch, so that must cost little.
__global__ void __launch_bounds__(kAttentionThreads) attention_long_kernel(CrossAttentionArgs args, int64_t parts) {
  const int64_t index = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (index < parts) {
    args.long_patches[index] = int32_t(Layout{args}.long_patch(index));
  }
}

// Joins the parts of long patches: a gradient of a patch's slots is the sum of its parts. A row of a part is `numbers`
// long, and the gradient begins at number `from`. The items are tiles, for the long patch that begins in each.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_sum_kernel(CrossAttentionArgs args, AttentionShape shape, T* out, int64_t numbers, int64_t from) {
  using A = Acc<T>;
  const AttentionTask task = attention_task(shape);
  const Lane<T, true> lane(args, shape, 0);
  const AttentionItem parts = task.active ? Layout{args}.parts_from(task.item) : AttentionItem{};
  if (parts.index < 0) {
    return;
  }
  const int64_t row = task.block * shape.heads + task.head;
  A sum[kColumns] = {};
#pragma unroll 4
  for (int64_t tile = parts.begin; tile < parts.end; ++tile) {
    lane.add_part(part_row<A>(args, Layout::part_in(parts, tile), row, shape.heads, numbers) + from, A(1), sum);
  }
  lane.store(out + (parts.index * args.slots * shape.heads + row) * args.width, sum);
}

// Writes zeros for bytes that belong to no patch, to one or two tensors whose rows are `accesses` long. A warp does 32
// bytes.
template <class Access>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_zero_kernel(CrossAttentionArgs args, int64_t accesses, Access* first, Access* second) {
  const int64_t thread = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x, row = thread / kWarp * kWarp;
  bool outside = false;
  if (thread < args.batch * args.num_bytes) {
    const int64_t b = thread / args.num_bytes, i = thread % args.num_bytes;
    if (args.capacity == 0) {
      outside = true;
    } else if (args.encoder) {
      outside = i < Layout{args}.begin(b, 0) || i >= Layout{args}.end(b, args.capacity - 1);
    } else {
      outside = args.ids[thread] < 0;
    }
  }
  const unsigned rows = __ballot_sync(kFullWarp, outside);
  if (rows == 0) {
    return;
  }
  for (int r = 0; r < kWarp; ++r) {
    if ((rows >> r & 1) != 0) {
      for (int64_t j = threadIdx.x % kWarp; j < accesses; j += kWarp) {
        if (first != nullptr) first[(row + r) * accesses + j] = Access{};
        if (second != nullptr) second[(row + r) * accesses + j] = Access{};
      }
    }
  }
}

}  // namespace blt::cuda
