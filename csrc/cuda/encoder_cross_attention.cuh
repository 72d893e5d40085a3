// encoder_cross_attention with window 1, where the queries of a patch see its bytes.
// Heads of 64 elements of 16 bits have kernels of their own (encoder_cross_attention_row64.cuh); these serve the
// others. Forward is attention_kernel; the kernel that joins the parts of long patches is here. Backward walks twice
// over the bytes of a patch, because it must know the sum of p dp first; the second walk finds the bytes in L1.
#pragma once

#include "cuda/cross_attention.cuh"

namespace blt::cuda {

// The items are tiles, for the long patch that begins in each.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_join_kernel(CrossAttentionArgs args, AttentionShape shape) {
  using A = Acc<T>;
  const AttentionTask task = attention_task(shape);
  const Lane<T, kPlain> lane(args, shape, task.chunk);
  const AttentionItem parts = task.active ? Layout{args}.parts_from(task.item) : AttentionItem{};
  const int64_t query = query_of(args, parts.index, task.head, task.block);
  if (query < 0) {
    return;
  }
  const auto part_in = [&](int64_t tile) {
    return query_part<A>(args, Layout::part_in(parts, tile), parts.index, query);
  };
  OnlineSoftmax<A> softmax;
#pragma unroll 8
  for (int64_t tile = parts.begin; tile < parts.end; ++tile) {
    const A top = part_in(tile)[args.width];
    softmax.top = top > softmax.top ? top : softmax.top;
  }
#pragma unroll 4
  for (int64_t tile = parts.begin; tile < parts.end; ++tile) {
    const A* part = part_in(tile);
    const A weight = softmax.weight(part[args.width]);
    softmax.sum += weight * part[args.width + 1];
    lane.add_part(part, weight, softmax.acc);
  }
  finish(args, lane, query, true, softmax);
}

// The items are the parts of long patches and then the patches. A first launch with `only_sums` does the parts alone,
// because the sums of a long patch's queries must be known before the walk that computes gradients.
template <class T, int Q>
__global__ void __launch_bounds__(kWalkThreads, 3)
    attention_encoder_backward_kernel(CrossAttentionArgs args, AttentionShape shape, int64_t parts, bool only_sums) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionTask task = attention_task(shape);
  const Lane<T, true> lane(args, shape, 0);
  const Layout layout{args};
  const int set = int(threadIdx.x) / shape.lanes % shape.sets;
  const AttentionItem item = task.active ? layout.bytes_of(task.item, parts) : AttentionItem{};
  const bool sums_are_known = item.part >= 0 && !only_sums;
  const int count = item.count(), steps = warp_max(count), steps_of_sums = warp_max(sums_are_known ? 0 : count);
  const A scale = A(args.scale);
  const int64_t stride = args.kv_heads * args.width, first = item.begin * stride + task.head * args.width;
  const T *keys = static_cast<const T*>(args.k) + first, *values = static_cast<const T*>(args.v) + first;
  int64_t query[Q];
  Row<T> q[Q], g[Q];
  A lse[Q], sum[Q], delta[Q], grad_q[Q][kColumns];
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    query[t] = query_of(args, item.index, task.head, set * Q + t);
    q[t] = lane.load(static_cast<const T*>(args.q) + query[t] * args.width, query[t] >= 0);
    g[t] = lane.load(static_cast<const T*>(args.grad) + query[t] * args.width, query[t] >= 0);
    lse[t] = query[t] >= 0 ? static_cast<const A*>(args.lse)[query[t]] : A(0);
    sum[t] = delta[t] = 0;
#pragma unroll
    for (int e = 0; e < kColumns; ++e) grad_q[t][e] = 0;
  }
  Row<T> k[U], v[U];
  A e[U][Q], dp[U][Q];  // the softmax except for a factor, and its gradient
  const auto compute = [&](int i) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      k[u] = lane.load(keys + (i + u) * stride, i + u < count);
      v[u] = lane.load(values + (i + u) * stride, i + u < count);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int t = 0; t < Q; ++t) {
        const A score = scale * lane.dot(q[t], nullptr, k[u], nullptr, true);
        dp[u][t] = lane.dot(g[t], nullptr, v[u], nullptr, true);
        e[u][t] = i + u < count && query[t] >= 0 ? exp_of(score - lse[t]) : A(0);
      }
    }
  };
  for (int i = 0; i < steps_of_sums; i += U) {
    compute(i);
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int t = 0; t < Q; ++t) {
        sum[t] += e[u][t];
        delta[t] += e[u][t] * dp[u][t];
      }
    }
  }
  if (only_sums) {
#pragma unroll
    for (int t = 0; t < Q; ++t) {
      if (item.part >= 0 && query[t] >= 0 && lane.leads()) {
        A* part = query_part<A>(args, item.part, item.index, query[t]);
        part[args.width] = sum[t], part[args.width + 1] = delta[t];
      }
    }
    return;
  }
  if (sums_are_known) {
    const AttentionItem all = layout.parts_of(item.index);
#pragma unroll
    for (int t = 0; t < Q; ++t) {
      sum[t] = delta[t] = 0;
      for (int64_t tile = all.begin; query[t] >= 0 && tile < all.end; ++tile) {
        const A* part = query_part<A>(args, Layout::part_in(all, tile), item.index, query[t]);
        sum[t] += part[args.width], delta[t] += part[args.width + 1];
      }
    }
  }
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    sum[t] = query[t] >= 0 ? A(1) / sum[t] : A(0);  // from here on `sum` is the inverse of the sum
    delta[t] *= sum[t];
  }
  for (int i = 0; i < steps; i += U) {
    compute(i);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      A grad_k[kColumns] = {}, grad_v[kColumns] = {};
      if (i + u < count) {
#pragma unroll
        for (int t = 0; t < Q; ++t) {
          if (query[t] >= 0) {
            const A p = e[u][t] * sum[t], dscore = scale * p * (dp[u][t] - delta[t]);
            add_scaled<T>(dscore, k[u], grad_q[t]);
            add_scaled<T>(dscore, q[t], grad_k);
            add_scaled<T>(p, g[t], grad_v);
          }
        }
      }
      sum_over_sets(shape, grad_k);
      sum_over_sets(shape, grad_v);
      if (i + u < count) {
        const int64_t at = first + (i + u) * stride;
        if (args.grad_k != nullptr && set == 0) lane.store(static_cast<T*>(args.grad_k) + at, grad_k);
        if (args.grad_v != nullptr && set == shape.sets - 1) lane.store(static_cast<T*>(args.grad_v) + at, grad_v);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    if (query[t] >= 0) {
      if (item.part >= 0) {
        lane.store_part(query_part<A>(args, item.part, item.index, query[t]), grad_q[t]);
      } else if (args.grad_q != nullptr) {
        lane.store(static_cast<T*>(args.grad_q) + query[t] * args.width, grad_q[t]);
      }
    }
  }
}

}  // namespace blt::cuda
