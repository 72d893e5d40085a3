// encoder_cross_attention and decoder_cross_attention, and their gradients: what serves both.
// Floor: q, k and v once, out and lse once; backward: q, k, v, grad and lse once, the three gradients once.
//
// A group of lanes, 8 elements each, takes one key head of an owner: of a patch or of a byte. It reads each row of the
// other side once for all the queries (keys) that it holds in registers, so that memory is read once but for what other
// groups of the same block find in L1: the K slots of a byte's patch, read by each of its bytes, next to each other.
// - Forward: the owner is what has the queries. All its queries see the same consecutive keys; their softmax is online.
// - Backward with window 1: the owner is a patch, and one walk over its bytes gives all gradients. Sets of lanes share
//   the held rows, two each, as far as a warp goes: each has its own part of the sums.
// - Otherwise: a pass over the queries (grad_q, and what a softmax is made of), then one over the keys, which walks the
//   queries that see them. It reads everything twice.
//
// Blocks do not communicate within a launch: each row is written by one group. What a group does depends on the layout
// alone: results are deterministic. Lanes of a warp make equally many steps, so that all can take part in shuffles.
//
// Heads of more than 256 elements are shared by several groups, a chunk of columns each: every one of them computes
// whole dot products, and its own columns of the results.
#pragma once

#include "cuda/cross_attention_work.cuh"

namespace blt::cuda {

// ---- rows -----------------------------------------------------------------------------------------------------------

// A lane's elements of a row, in words: 16-bit elements do not take a register each.
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

// A lane of a group, and how it reads and writes rows. kPlain: 16 bytes at a time, in one chunk.
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

  // Zeros unless `valid`.
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

  // The dot product of two rows, of which x and y are this lane's elements. The same in all lanes of the group.
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

  // `parts` are accumulators: this lane's elements of a row of them.
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

// Rows that are loaded before the first of them is used. Patches are short, and what lies beyond their end is computed
// for nothing.
template <class T>
constexpr int kAhead = sizeof(T) == 8 ? 1 : 2;

// Threads of a block, and blocks on a multiprocessor, which limits registers, of kernels that hold so many rows.
constexpr int attention_threads(int rows) { return rows > 2 ? kWalkThreads : kAttentionThreads; }
template <class T>
constexpr int attention_blocks(int rows) {
  return rows > 2 ? 3 : sizeof(T) == 8 ? 1 : 2;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// A softmax so far, about its largest score.
template <class A>
struct OnlineSoftmax {
  A top = minus_infinity<A>(), sum = 0;
  A acc[kColumns] = {};

  // Makes room for scores of at most `score`, and keeps NaN out of `top`: it will be in `sum`.
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

// A softmax whose sum is 0 saw nothing but -inf, or, unless `seen`, nothing.
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

// Owners: the encoder's patches with window 1, after the parts of long ones, otherwise what has the queries.
template <class T, int Q, bool kPlain>
__global__ void __launch_bounds__(attention_threads(Q), attention_blocks<T>(Q))
    attention_kernel(CrossAttentionArgs args, AttentionShape shape, int64_t parts) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, kPlain> lane(args, shape, unit.chunk);
  const Layout layout{args};
  AttentionWork work;
  if (unit.active) {
    work = args.encoder && args.window == 1 ? layout.bytes_of(unit.owner, parts) : layout.keys_of(unit.owner);
  }
  const int count = work.count(), steps = warp_max(count);
  const A scale = A(args.scale);
  const T* queries = static_cast<const T*>(args.q);
  const int64_t stride = args.kv_heads * args.width, first = work.begin * stride + unit.head * args.width;
  const T *keys = static_cast<const T*>(args.k) + first, *values = static_cast<const T*>(args.v) + first;
  int64_t query[Q];
  Row<T> q[Q];
  OnlineSoftmax<A> softmax[Q];
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    query[t] = query_of(args, work.owner, unit.head, unit.block * Q + t);
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
    if (work.part >= 0) {
      A* part = query_part<A>(args, work.part, work.owner, query[t]);
      lane.store_part(part, softmax[t].acc);
      if (lane.leads()) part[args.width] = softmax[t].top, part[args.width + 1] = softmax[t].sum;
    } else {
      finish(args, lane, query[t], count > 0, softmax[t]);
    }
  }
}

// ---- backward in two passes -----------------------------------------------------------------------------------------

// A query in backward. With e_j = exp(score_j - lse), which is the softmax but for the rounding of lse:
//   p_j = e_j / sum,   delta = the sum of p_j dp_j,   dscore_j = scale p_j (dp_j - delta)   where sum = the sum of e_j.
template <class A>
struct SoftmaxSums {
  A sum = 0, delta = 0;  // delta: until `divide`, of e_j dp_j

  __device__ __forceinline__ void add(A e, A dp) {
    sum += e;
    delta += e * dp;
  }
  __device__ __forceinline__ void divide() { delta /= sum; }
};

// Owners: what has the queries.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_queries_kernel(CrossAttentionArgs args, AttentionShape shape) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, kPlain> lane(args, shape, unit.chunk);
  const AttentionWork work = unit.active ? Layout{args}.keys_of(unit.owner) : AttentionWork{};
  const int64_t query = query_of(args, work.owner, unit.head, unit.block);
  const int count = work.count(), steps = warp_max(count);
  const A scale = A(args.scale);
  const int64_t stride = args.kv_heads * args.width, first = work.begin * stride + unit.head * args.width;
  const T *keys = static_cast<const T*>(args.k) + first, *values = static_cast<const T*>(args.v) + first;
  const T *q_row = static_cast<const T*>(args.q) + query * args.width;
  const T *g_row = static_cast<const T*>(args.grad) + query * args.width;
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

// Owners: what has the keys.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_keys_kernel(CrossAttentionArgs args, AttentionShape shape) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, kPlain> lane(args, shape, unit.chunk);
  const AttentionWork work = unit.active ? Layout{args}.queries_of(unit.owner) : AttentionWork{};
  const int count = work.count(), steps = warp_max(count), shared = int(args.heads / args.kv_heads);
  const A scale = A(args.scale);
  const int64_t key = work.owner * (args.encoder ? 1 : args.slots) + unit.block;
  const int64_t at = (key * args.kv_heads + unit.head) * args.width;
  const T *k_row = static_cast<const T*>(args.k) + at, *v_row = static_cast<const T*>(args.v) + at;
  const Row<T> k = lane.load(k_row, unit.active), v = lane.load(v_row, unit.active);
  A grad_k[kColumns] = {}, grad_v[kColumns] = {};
  for (int head = 0; head < shared; ++head) {
    for (int i = 0; i < steps; i += U) {
      Row<T> q[U], g[U];
      int64_t query[U];
      bool valid[U];
      A lse[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        query[u] = (work.begin + i + u) * args.heads + unit.head * shared + head;
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
  if (unit.active) {
    if (args.grad_k != nullptr) lane.store(static_cast<T*>(args.grad_k) + at, grad_k);
    if (args.grad_v != nullptr) lane.store(static_cast<T*>(args.grad_v) + at, grad_v);
  }
}

// ---- backward in one walk over the bytes of a patch -----------------------------------------------------------------

// Sums over the sets of lanes of a group, each with its share of the held rows. All lanes of the warp take part.
template <class A, int N>
__device__ __forceinline__ void sum_of_shares(const AttentionShape& shape, A (&x)[N]) {
  for (int distance = shape.lanes; distance < shape.lanes * shape.split; distance *= 2) {
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] += __shfl_xor_sync(kFullWarp, x[e], distance);
  }
}

// Gradients of a patch's slots are the sums of the parts: of rows of `numbers`, from number `from`. Owners: tiles; the
// long patch that begins in one.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_sum_kernel(CrossAttentionArgs args, AttentionShape shape, T* out, int64_t numbers, int64_t from) {
  using A = Acc<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, true> lane(args, shape, 0);
  const AttentionWork parts = unit.active ? Layout{args}.parts_from(unit.owner) : AttentionWork{};
  if (parts.owner < 0) {
    return;
  }
  const int64_t row = unit.block * shape.heads + unit.head;
  A sum[kColumns] = {};
#pragma unroll 4
  for (int64_t tile = parts.begin; tile < parts.end; ++tile) {
    lane.add_part(part_row<A>(args, Layout::part_in(parts, tile), row, shape.heads, numbers) + from, A(1), sum);
  }
  lane.store(out + (parts.owner * args.slots * shape.heads + row) * args.width, sum);
}

// Bytes that belong to no patch have no gradient, in one or two tensors of `accesses` a byte. A warp for 32 bytes.
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
