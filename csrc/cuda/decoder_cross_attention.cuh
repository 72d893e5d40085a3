// decoder_cross_attention with window 1, where a byte sees the slots of one patch.
// Forward keeps these slots in registers from byte to byte; backward walks once over the bytes of a patch. The usual
// shapes take the fast path in decoder_cross_attention_row64.cuh.
#pragma once

#include "cuda/cross_attention.cuh"

namespace blt::cuda {

// The items are tiles of kByteTile consecutive bytes; the keys that they see stay in registers from byte to byte.
constexpr int kByteTile = 8;

template <class T, int K>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_decoder_kernel(CrossAttentionArgs args, AttentionShape shape) {
  using A = Acc<T>;
  constexpr int U = sizeof(T) == 2 ? 4 : 2;
  const AttentionTask task = attention_task(shape);
  const Lane<T, true> lane(args, shape, 0);
  const int64_t begin = task.item * kByteTile;
  const int count = task.active ? int(min_of(int64_t(kByteTile), args.batch * args.num_bytes - begin)) : 0;
  const int slots = int(args.slots), heads_per_key = int(args.heads / args.kv_heads);
  const A scale = A(args.scale);
  const int64_t slot_stride = args.kv_heads * args.width;
  Row<T> k[K] = {}, v[K] = {};
  int64_t held = -1;  // the patch whose rows k and v hold, counted over all batch rows
  for (int i = 0; i < kByteTile * heads_per_key; i += U) {  // byte after byte, and all heads of each
    int64_t query[U], patch[U];
    Row<T> q[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int byte = heads_per_key == 1 ? i + u : (i + u) / heads_per_key, head = i + u - byte * heads_per_key;
      const bool valid = byte < count;
      query[u] = valid ? (begin + byte) * args.heads + task.head * heads_per_key + head : -1;
      const int64_t id = valid ? min_of(int64_t(args.ids[begin + byte]), args.capacity - 1) : -1;
      patch[u] = id < 0 ? -1 : (begin + byte) / args.num_bytes * args.capacity + id;
      q[u] = lane.load(static_cast<const T*>(args.q) + query[u] * args.width, valid);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (patch[u] >= 0 && patch[u] != held) {
        held = patch[u];
        const int64_t first = held * slots * slot_stride + task.head * args.width;
#pragma unroll
        for (int s = 0; s < K; ++s) {
          k[s] = lane.load(static_cast<const T*>(args.k) + first + s * slot_stride, s < slots);
          v[s] = lane.load(static_cast<const T*>(args.v) + first + s * slot_stride, s < slots);
        }
      }
      A score[K], top = minus_infinity<A>();
#pragma unroll
      for (int s = 0; s < K; ++s) {
        score[s] = scale * lane.dot(q[u], nullptr, k[s], nullptr, true);
        score[s] = s < slots && patch[u] >= 0 ? score[s] : minus_infinity<A>();
        top = score[s] > top ? score[s] : top;
      }
      OnlineSoftmax<A> softmax;
      softmax.top = top;
      if (patch[u] >= 0) {
#pragma unroll
        for (int s = 0; s < K; ++s) {
          const A weight = softmax.weight(score[s]);
          softmax.sum += weight;
          add_scaled<T>(weight, v[s], softmax.acc);
        }
      }
      if (query[u] >= 0) {
        finish(args, lane, query[u], patch[u] >= 0, softmax);
      }
    }
  }
}

// The items are the parts of long patches and then the patches.
template <class T, int K>
__global__ void __launch_bounds__(kWalkThreads, 3)
    attention_decoder_backward_kernel(CrossAttentionArgs args, AttentionShape shape, int64_t parts) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionTask task = attention_task(shape);
  const Lane<T, true> lane(args, shape, 0);
  const AttentionItem item = task.active ? Layout{args}.bytes_of(task.item, parts) : AttentionItem{};
  const int count = item.count(), steps = warp_max(count), heads_per_key = int(args.heads / args.kv_heads);
  const int set = int(threadIdx.x) / shape.lanes % shape.sets;
  const int slots = item.index >= 0 ? int(args.slots) - set * K : 0;  // counted from the first slot of this set
  const A scale = A(args.scale);
  const int64_t stride = args.heads * args.width;
  const int64_t slot_stride = args.kv_heads * args.width;
  const int64_t first_slot = (item.index * args.slots + set * K) * slot_stride + task.head * args.width;
  Row<T> k[K], v[K];
  A grad_k[K][kColumns], grad_v[K][kColumns];
#pragma unroll
  for (int s = 0; s < K; ++s) {
    k[s] = lane.load(static_cast<const T*>(args.k) + first_slot + s * slot_stride, s < slots);
    v[s] = lane.load(static_cast<const T*>(args.v) + first_slot + s * slot_stride, s < slots);
#pragma unroll
    for (int e = 0; e < kColumns; ++e) grad_k[s][e] = grad_v[s][e] = 0;
  }
  for (int head = 0; head < heads_per_key; ++head) {
    const int64_t query = item.begin * args.heads + task.head * heads_per_key + head, first = query * args.width;
    for (int i = 0; i < steps; i += U) {
      Row<T> q[U], g[U];
      A lse[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const bool valid = i + u < count;
        q[u] = lane.load(static_cast<const T*>(args.q) + first + (i + u) * stride, valid);
        g[u] = lane.load(static_cast<const T*>(args.grad) + first + (i + u) * stride, valid);
        lse[u] = valid ? static_cast<const A*>(args.lse)[query + (i + u) * args.heads] : A(0);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        A e[K], dp[K], sums[2] = {};  // the sums of e and of e dp
#pragma unroll
        for (int s = 0; s < K; ++s) {
          const A score = scale * lane.dot(q[u], nullptr, k[s], nullptr, true);
          dp[s] = lane.dot(g[u], nullptr, v[s], nullptr, true);
          e[s] = exp_of(score - lse[u]);
          if (s < slots) {
            sums[0] += e[s];
            sums[1] += e[s] * dp[s];
          }
        }
        sum_over_sets(shape, sums);
        A grad_q[kColumns] = {};
        if (i + u < count) {
          const A inverse = A(1) / sums[0], delta = sums[1] * inverse;
#pragma unroll
          for (int s = 0; s < K; ++s) {
            if (s < slots) {
              const A p = e[s] * inverse, dscore = scale * p * (dp[s] - delta);
              add_scaled<T>(dscore, k[s], grad_q);
              add_scaled<T>(dscore, q[u], grad_k[s]);
              add_scaled<T>(p, g[u], grad_v[s]);
            }
          }
        }
        sum_over_sets(shape, grad_q);
        if (i + u < count && args.grad_q != nullptr && set == 0) {
          lane.store(static_cast<T*>(args.grad_q) + first + (i + u) * stride, grad_q);
        }
      }
    }
  }
#pragma unroll
  for (int s = 0; s < K; ++s) {
    if (s < slots) {
      if (item.part >= 0) {
        const int64_t row = (set * K + s) * args.kv_heads + task.head;
        A* part = part_row<A>(args, item.part, row, args.kv_heads, 2 * args.width);
        lane.store_part(part, grad_k[s]);
        lane.store_part(part + args.width, grad_v[s]);
      } else {
        const int64_t at = first_slot + s * slot_stride;
        if (args.grad_k != nullptr) lane.store(static_cast<T*>(args.grad_k) + at, grad_k[s]);
        if (args.grad_v != nullptr) lane.store(static_cast<T*>(args.grad_v) + at, grad_v[s]);
      }
    }
  }
}

}  // namespace blt::cuda
