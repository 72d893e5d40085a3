// What encoder_cross_attention, decoder_cross_attention and their gradients share.
// Floor: q, k and v once, out and lse once; backward: q, k, v, grad and lse once, the three gradients once.
//
// A group of lanes does one task: one key head of an item, which is a patch or a byte. Each lane holds 8 elements of a
// row. The group reads each row of the other side once, for all the queries (or keys) that it holds in registers. So
// memory is read once, except for rows that several groups of a thread block read: they find them in L1. The K slots of
// a patch are such rows, because neighbouring bytes of the patch read them.
// - Forward: an item is what has the queries. All its queries see the same consecutive keys; their softmax is online.
// - Backward with window 1: an item is a patch, and one walk over its bytes gives all gradients. The held rows are
//   dealt out among sets of lanes, two rows to a set, within one warp; each set adds up its own sums.
// - Backward with other windows: one pass over the queries computes grad_q and the terms of each softmax; a second pass
//   over the keys walks the queries that see them. Together they read everything twice.
//
// Thread blocks do not communicate within a launch: each row is written by one group. What a group does depends on the
// layout alone, so results are deterministic. All lanes of a warp make equally many steps, so that all of them take
// part in the shuffles.
//
// A head of more than 256 elements is spread over several groups, and each has a chunk of columns: each of them
// computes whole dot products, and writes its own columns of the results.
#pragma once

#include "cuda/cross_attention_work.cuh"

namespace blt::cuda {

// ---- rows -----------------------------------------------------------------------------------------------------------

// A lane's elements of a row, in words, so that two 16-bit elements fit in one register.
template <class T>
struct Row {
  static constexpr int kWords = kColumns * int(sizeof(T)) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ Acc<T> operator[](int e) const {
    if constexpr (sizeof(T) == 2) {
      return widen(bit_cast<T>(uint16_t(e % 2 == 0 ? words[e / 2] : words[e / 2] >> 16)));
    } else if constexpr (sizeof(T) == 4) {
      return bit_cast<float>(words[e]);
    } else {
      return bit_cast<double>(uint64_t(words[2 * e + 1]) << 32 | words[2 * e]);
    }
  }
};

// A lane of a group, and how it reads and writes rows. With kPlain a row is one chunk, read 16 bytes at a time.
template <class T, bool kPlain>
struct Lane {
  using A = Acc<T>;
  static constexpr int kN = 16 / int(sizeof(T));
  int width, lanes, chunks, chunk, lane;

  __device__ __forceinline__ Lane(const CrossAttentionArgs& args, const AttentionShape& shape, int chunk)
      : width(int(args.width)),
        lanes(shape.lanes),
        chunks(shape.chunks),
        chunk(chunk),
        lane(int(threadIdx.x) & (shape.lanes - 1)) {}

  __device__ __forceinline__ bool leads() const { return lane == 0 && chunk == 0; }
  __device__ __forceinline__ int column(int of_chunk) const { return (of_chunk * lanes + lane) * kColumns; }

  // This lane's elements of a row; zeros unless `valid`.
  __device__ __forceinline__ Row<T> load(const T* row, bool valid) const { return load_chunk(row, chunk, valid); }
  __device__ __forceinline__ Row<T> load_chunk(const T* row, int of_chunk, bool valid) const {
    Row<T> x{};
    const int first = column(kPlain ? 0 : of_chunk);
    if constexpr (kPlain) {
#pragma unroll
      for (int p = 0; p < kColumns / kN; ++p) {
        if (valid && first + p * kN < width) {
          const uint4 words = __ldg(reinterpret_cast<const uint4*>(row + first) + p);
          x.words[4 * p] = words.x, x.words[4 * p + 1] = words.y;
          x.words[4 * p + 2] = words.z, x.words[4 * p + 3] = words.w;
        }
      }
    } else {
      T elements[kColumns] = {};
      for (int e = 0; e < kColumns; ++e) {
        if (valid && first + e < width) elements[e] = row[first + e];
      }
      memcpy(x.words, elements, sizeof(elements));
    }
    return x;
  }

  __device__ __forceinline__ void store(T* row, const A (&x)[kColumns]) const {
    const int first = column(kPlain ? 0 : chunk);
    if constexpr (kPlain) {
#pragma unroll
      for (int p = 0; p < kColumns / kN; ++p) {
        Pack<T, kN> pack;
#pragma unroll
        for (int e = 0; e < kN; ++e) pack.data[e] = narrow<T>(x[p * kN + e]);
        if (first + p * kN < width) store_once<kN>(row + first + p * kN, pack);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kColumns; ++e) {
        if (first + e < width) row[first + e] = narrow<T>(x[e]);
      }
    }
  }

  // The dot product of two rows, where x and y are this lane's elements. All lanes of the group get the same value.
  __device__ __forceinline__ A dot(const Row<T>& x, const T* x_row, const Row<T>& y, const T* y_row, bool valid) const {
    A sum = 0;
#pragma unroll
    for (int e = 0; e < kColumns; ++e) sum += x[e] * y[e];
    if constexpr (!kPlain) {
      for (int other = 0; other < chunks; ++other) {
        if (other != chunk) {
          const Row<T> a = load_chunk(x_row, other, valid), b = load_chunk(y_row, other, valid);
#pragma unroll
          for (int e = 0; e < kColumns; ++e) sum += a[e] * b[e];
        }
      }
    }
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      if (distance < lanes) sum += __shfl_xor_sync(kFullWarp, sum, distance);
    }
    return sum;
  }

  // Writes this lane's elements of a row of accumulators of a part.
  __device__ __forceinline__ void store_part(A* row, const A (&x)[kColumns]) const {
    const int first = column(chunk);
#pragma unroll
    for (int e = 0; e < kColumns; ++e) {
      if (first + e < width) row[first + e] = x[e];
    }
  }
  // acc += factor * row
  __device__ __forceinline__ void add_part(const A* row, A factor, A (&acc)[kColumns]) const {
    const int first = column(chunk);
#pragma unroll
    for (int e = 0; e < kColumns; ++e) {
      if (first + e < width) acc[e] += factor * row[first + e];
    }
  }
};

// acc += factor * x
template <class T>
__device__ __forceinline__ void add_scaled(Acc<T> factor, const Row<T>& x, Acc<T> (&acc)[kColumns]) {
#pragma unroll
  for (int e = 0; e < kColumns; ++e) acc[e] += factor * x[e];
}

// How many rows are loaded before the first of them is used. More would not pay: patches are short, and rows beyond the
// end of a patch are computed in vain.
template <class T>
constexpr int kAhead = sizeof(T) == 8 ? 1 : 2;

// For a kernel that holds `rows` rows: the threads of a block, and the blocks that must fit on a multiprocessor, which
// limits the registers of a thread.
constexpr int attention_threads(int rows) { return rows > 2 ? kWalkThreads : kAttentionThreads; }
template <class T>
constexpr int attention_blocks(int rows) {
  return rows > 2 ? 3 : sizeof(T) == 8 ? 1 : 2;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// A softmax over the keys seen so far, relative to their largest score.
template <class A>
struct OnlineSoftmax {
  A top = minus_infinity<A>(), sum = 0;
  A acc[kColumns] = {};

  // Rescales the sums if `score` is a new largest score. NaN never becomes the largest; it arrives in `sum`.
  __device__ __forceinline__ void raise(A score) {
    if (score > top) {
      const A factor = exp_of(top - score);
      top = score;
      sum *= factor;
#pragma unroll
      for (int e = 0; e < kColumns; ++e) acc[e] *= factor;
    }
  }
  __device__ __forceinline__ A weight(A score) const {
    return score == minus_infinity<A>() ? A(0) : exp_of(score - top);
  }
};

// Writes out and lse of a query. Without `seen` the query saw no key; a sum of 0 means that it saw scores of -inf only.
template <class T, bool kPlain>
__device__ __forceinline__ void finish(const CrossAttentionArgs& args, const Lane<T, kPlain>& lane, int64_t query,
                                       bool seen, OnlineSoftmax<Acc<T>>& softmax) {
  using A = Acc<T>;
  const A inverse = seen ? A(1) / softmax.sum : A(0);
#pragma unroll
  for (int e = 0; e < kColumns; ++e) softmax.acc[e] *= inverse;
  lane.store(static_cast<T*>(args.out) + query * args.width, softmax.acc);
  if (lane.leads()) {
    const A lse = softmax.sum != 0 ? softmax.top + log_of(softmax.sum) : inverse * A(0) + minus_infinity<A>();
    static_cast<A*>(args.lse)[query] = lse;
  }
}

// The items are, for the encoder with window 1, the parts of long patches and then the patches; otherwise they are what
// has the queries.
template <class T, int Q, bool kPlain>
__global__ void __launch_bounds__(attention_threads(Q), attention_blocks<T>(Q))
    attention_kernel(CrossAttentionArgs args, AttentionShape shape, int64_t parts) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionTask task = attention_task(shape);
  const Lane<T, kPlain> lane(args, shape, task.chunk);
  const Layout layout{args};
  AttentionItem item;
  if (task.active) {
    item = args.encoder && args.window == 1 ? layout.bytes_of(task.item, parts) : layout.keys_of(task.item);
  }
  const int count = item.count(), steps = warp_max(count);
  const A scale = A(args.scale);
  const T* queries = static_cast<const T*>(args.q);
  const int64_t stride = args.kv_heads * args.width, first = item.begin * stride + task.head * args.width;
  const T *keys = static_cast<const T*>(args.k) + first, *values = static_cast<const T*>(args.v) + first;
  int64_t query[Q];
  Row<T> q[Q];
  OnlineSoftmax<A> softmax[Q];
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    query[t] = query_of(args, item.index, task.head, task.block * Q + t);
    q[t] = lane.load(queries + query[t] * args.width, query[t] >= 0);
  }
  for (int i = 0; i < steps; i += U) {
    Row<T> k[U], v[U];
#pragma unroll
    for (int u = 0; u < U; ++u) k[u] = lane.load(keys + (i + u) * stride, i + u < count);
#pragma unroll
    for (int u = 0; u < U; ++u) v[u] = lane.load(values + (i + u) * stride, i + u < count);
#pragma unroll
    for (int t = 0; t < Q; ++t) {
      A score[U], top = minus_infinity<A>();
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const bool valid = i + u < count;
        const T *q_row = queries + query[t] * args.width, *k_row = keys + (i + u) * stride;
        score[u] = lane.dot(q[t], q_row, k[u], k_row, valid && query[t] >= 0);
        score[u] = valid ? score[u] * scale : minus_infinity<A>();
        top = score[u] > top ? score[u] : top;
      }
      softmax[t].raise(top);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const A weight = softmax[t].weight(score[u]);
        softmax[t].sum += weight;
        add_scaled<T>(weight, v[u], softmax[t].acc);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    if (query[t] < 0) {
      continue;
    }
    if (item.part >= 0) {
      A* part = query_part<A>(args, item.part, item.index, query[t]);
      lane.store_part(part, softmax[t].acc);
      if (lane.leads()) part[args.width] = softmax[t].top, part[args.width + 1] = softmax[t].sum;
    } else {
      finish(args, lane, query[t], count > 0, softmax[t]);
    }
  }
}

// ---- backward in two passes -----------------------------------------------------------------------------------------

// The sums of a query in backward. With e_j = exp(score_j - lse), which is the softmax except for the rounding of lse:
//   p_j = e_j / sum,   delta = the sum of p_j dp_j,   dscore_j = scale p_j (dp_j - delta)   where sum = the sum of e_j.
template <class A>
struct SoftmaxSums {
  A sum = 0, delta = 0;  // until `divide` is called, delta is the sum of e_j dp_j

  __device__ __forceinline__ void add(A e, A dp) {
    sum += e;
    delta += e * dp;
  }
  __device__ __forceinline__ void divide() { delta /= sum; }
};

// The items are what has the queries.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_queries_kernel(CrossAttentionArgs args, AttentionShape shape) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionTask task = attention_task(shape);
  const Lane<T, kPlain> lane(args, shape, task.chunk);
  const AttentionItem item = task.active ? Layout{args}.keys_of(task.item) : AttentionItem{};
  const int64_t query = query_of(args, item.index, task.head, task.block);
  const int count = item.count(), steps = warp_max(count);
  const A scale = A(args.scale);
  const int64_t stride = args.kv_heads * args.width, first = item.begin * stride + task.head * args.width;
  const T *keys = static_cast<const T*>(args.k) + first, *values = static_cast<const T*>(args.v) + first;
  const T* q_row = static_cast<const T*>(args.q) + query * args.width;
  const T* g_row = static_cast<const T*>(args.grad) + query * args.width;
  const Row<T> q = lane.load(q_row, query >= 0), g = lane.load(g_row, query >= 0);
  const A lse = query >= 0 ? static_cast<const A*>(args.lse)[query] : A(0);
  SoftmaxSums<A> sums;
  A grad_q[kColumns] = {};
  const auto walk = [&](const auto& body) {
    for (int i = 0; i < steps; i += U) {
      Row<T> k[U], v[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        k[u] = lane.load(keys + (i + u) * stride, i + u < count);
        v[u] = lane.load(values + (i + u) * stride, i + u < count);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const bool valid = i + u < count;
        const A score = scale * lane.dot(q, q_row, k[u], keys + (i + u) * stride, valid);
        const A dp = lane.dot(g, g_row, v[u], values + (i + u) * stride, valid);
        if (valid) body(exp_of(score - lse), dp, k[u]);
      }
    }
  };
  walk([&](A e, A dp, const Row<T>&) { sums.add(e, dp); });
  sums.divide();
  if (args.grad_q != nullptr) {
    walk([&](A e, A dp, const Row<T>& k) { add_scaled<T>(scale * (e / sums.sum) * (dp - sums.delta), k, grad_q); });
  }
  if (query < 0) {
    return;
  }
  if (lane.leads()) {
    A* terms = static_cast<A*>(args.row_terms) + query * 2;
    terms[0] = sums.sum, terms[1] = sums.delta;
  }
  if (args.grad_q != nullptr) {
    lane.store(static_cast<T*>(args.grad_q) + query * args.width, grad_q);
  }
}

// The items are what has the keys.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_keys_kernel(CrossAttentionArgs args, AttentionShape shape) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionTask task = attention_task(shape);
  const Lane<T, kPlain> lane(args, shape, task.chunk);
  const AttentionItem item = task.active ? Layout{args}.queries_of(task.item) : AttentionItem{};
  const int count = item.count(), steps = warp_max(count), heads_per_key = int(args.heads / args.kv_heads);
  const A scale = A(args.scale);
  const int64_t key = item.index * (args.encoder ? 1 : args.slots) + task.block;
  const int64_t at = (key * args.kv_heads + task.head) * args.width;
  const T *k_row = static_cast<const T*>(args.k) + at, *v_row = static_cast<const T*>(args.v) + at;
  const Row<T> k = lane.load(k_row, task.active), v = lane.load(v_row, task.active);
  A grad_k[kColumns] = {}, grad_v[kColumns] = {};
  for (int head = 0; head < heads_per_key; ++head) {
    for (int i = 0; i < steps; i += U) {
      Row<T> q[U], g[U];
      int64_t query[U];
      bool valid[U];
      A lse[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        query[u] = (item.begin + i + u) * args.heads + task.head * heads_per_key + head;
        lse[u] = i + u < count ? static_cast<const A*>(args.lse)[query[u]] : minus_infinity<A>();
        valid[u] = lse[u] != minus_infinity<A>();
        q[u] = lane.load(static_cast<const T*>(args.q) + query[u] * args.width, valid[u]);
        g[u] = lane.load(static_cast<const T*>(args.grad) + query[u] * args.width, valid[u]);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const T* q_row = static_cast<const T*>(args.q) + query[u] * args.width;
        const T* g_row = static_cast<const T*>(args.grad) + query[u] * args.width;
        const A score = scale * lane.dot(k, k_row, q[u], q_row, valid[u]);
        const A dp = lane.dot(v, v_row, g[u], g_row, valid[u]);
        if (valid[u]) {
          const A* terms = static_cast<const A*>(args.row_terms) + query[u] * 2;
          const A p = exp_of(score - lse[u]) / terms[0];
          add_scaled<T>(scale * p * (dp - terms[1]), q[u], grad_k);
          add_scaled<T>(p, g[u], grad_v);
        }
      }
    }
  }
  if (task.active) {
    if (args.grad_k != nullptr) lane.store(static_cast<T*>(args.grad_k) + at, grad_k);
    if (args.grad_v != nullptr) lane.store(static_cast<T*>(args.grad_v) + at, grad_v);
  }
}

// ---- backward in one walk over the bytes of a patch -----------------------------------------------------------------

// Adds x over the sets of lanes of a group: each set has the sums of its own held rows. All lanes of the warp take
// part.
template <class A, int N>
__device__ __forceinline__ void sum_over_sets(const AttentionShape& shape, A (&x)[N]) {
  for (int distance = shape.lanes; distance < shape.lanes * shape.sets; distance *= 2) {
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] += __shfl_xor_sync(kFullWarp, x[e], distance);
  }
}

}  // namespace blt::cuda
