// encoder_cross_attention with window 1: the queries of a patch see its bytes.
// Forward is attention_kernel, and here what joins the parts of long patches. Backward walks twice over the bytes of a
// patch, the second time from L1: what p dp sums to must be known first.
#pragma once

#include "cuda/cross_attention.cuh"

namespace blt::cuda {

// Owners: tiles; the long patch that begins in one.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_join_kernel(CrossAttentionArgs args, AttentionShape shape) {
  using A = Acc<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, kPlain> lane(args, shape, unit.chunk);
  const AttentionWork parts = unit.active ? Layout{args}.parts_from(unit.owner) : AttentionWork{};
  const int64_t query = query_of(args, parts.owner, unit.head, unit.block);
  if (query < 0) {
    return;
  }
  const auto part_in = [&](int64_t tile) {
    return query_part<A>(args, Layout::part_in(parts, tile), parts.owner, query);
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

// Owners: patches, after the parts of long ones. First with `only_sums` the parts alone: the sums of a long patch's
// queries must be known before the walk proper.
template <class T, int Q>
__global__ void __launch_bounds__(kWalkThreads, 3)
    attention_encoder_backward_kernel(CrossAttentionArgs args, AttentionShape shape, int64_t parts, bool only_sums) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, true> lane(args, shape, 0);
  const Layout layout{args};
  const int share = int(threadIdx.x) / shape.lanes % shape.split;
  const AttentionWork work = unit.active ? layout.bytes_of(unit.owner, parts) : AttentionWork{};
  const bool sums_are_known = work.part >= 0 && !only_sums;
  const int count = work.count(), steps = warp_max(count), steps_of_sums = warp_max(sums_are_known ? 0 : count);
  const A scale = A(args.scale);
  const int64_t stride = args.kv_heads * args.width, first = work.begin * stride + unit.head * args.width;
  const T *keys = static_cast<const T*>(args.k) + first, *values = static_cast<const T*>(args.v) + first;
  int64_t query[Q];
  Row<T> q[Q], g[Q];
  A lse[Q], sum[Q], delta[Q], grad_q[Q][kColumns];
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    query[t] = query_of(args, work.owner, unit.head, share * Q + t);
    q[t] = lane.load(static_cast<const T*>(args.q) + query[t] * args.width, query[t] >= 0);
    g[t] = lane.load(static_cast<const T*>(args.grad) + query[t] * args.width, query[t] >= 0);
    lse[t] = query[t] >= 0 ? static_cast<const A*>(args.lse)[query[t]] : A(0);
    sum[t] = delta[t] = 0;
#pragma unroll
    for (int e = 0; e < kColumns; ++e) grad_q[t][e] = 0;
  }
  Row<T> k[U], v[U];
  A e[U][Q], dp[U][Q];  // softmax but for a factor, and its gradient
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
      if (work.part >= 0 && query[t] >= 0 && lane.leads()) {
        A* part = query_part<A>(args, work.part, work.owner, query[t]);
        part[args.width] = sum[t], part[args.width + 1] = delta[t];
      }
    }
    return;
  }
  if (sums_are_known) {
    const AttentionWork all = layout.parts_of(work.owner);
#pragma unroll
    for (int t = 0; t < Q; ++t) {
      sum[t] = delta[t] = 0;
      for (int64_t tile = all.begin; query[t] >= 0 && tile < all.end; ++tile) {
        const A* part = query_part<A>(args, Layout::part_in(all, tile), work.owner, query[t]);
        sum[t] += part[args.width], delta[t] += part[args.width + 1];
      }
    }
  }
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    sum[t] = query[t] >= 0 ? A(1) / sum[t] : A(0);  // from here on its inverse
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
      sum_of_shares(shape, grad_k);
      sum_of_shares(shape, grad_v);
      if (i + u < count) {
        const int64_t at = first + (i + u) * stride;
        if (args.grad_k != nullptr && share == 0) lane.store(static_cast<T*>(args.grad_k) + at, grad_k);
        if (args.grad_v != nullptr && share == shape.split - 1) lane.store(static_cast<T*>(args.grad_v) + at, grad_v);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    if (query[t] >= 0) {
      if (work.part >= 0) {
        lane.store_part(query_part<A>(args, work.part, work.owner, query[t]), grad_q[t]);
      } else if (args.grad_q != nullptr) {
        lane.store(static_cast<T*>(args.grad_q) + query[t] * args.width, grad_q[t]);
      }
    }
  }
}

}  // namespace blt::cuda
