// Cross-attention on the CPU. Two small products do all the work, `dots` (scores) and `combine` (weighted sums), on
// tiles of a few query rows and all the keys that they see, so that a key or value row is read once for a tile.
#include "cpu/cross_attention.h"

#include "cpu/vec.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

namespace {

// Rows of a tile and registers of a row: accumulators and operands fit the 32 (16) vector registers.
constexpr int64_t kTile = kVecBytes == 64 ? 4 : 2;
constexpr int64_t kColumns = 4;

template <int64_t N>
struct Count {
  static constexpr int64_t value = N;
};

// body(Count<n>{}) for 1 <= n <= Max.
template <int64_t Max, class Body>
BLT_INLINE void with_count(int64_t n, const Body& body) {
  if constexpr (Max > 1) {
    if (n < Max) {
      return with_count<Max - 1>(n, body);
    }
  }
  body(Count<Max>{});
}

// Some rows, `width` elements each, of a tensor.
template <class T>
struct Rows {
  T* base;
  const int64_t* index;
  int64_t width;
  BLT_INLINE T* operator[](int64_t i) const { return base + index[i] * width; }
};

template <class A>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// out[r * stride + j] = scale * (a[a_begin + r] . b[b_begin + j]) for r < R, j < J.
template <int64_t R, int64_t J, class T>
BLT_INLINE void dot_tile(const Rows<const T>& a, int64_t a_begin, const Rows<const T>& b, int64_t b_begin,
                         Acc<T> scale, Acc<T>* out, int64_t stride) {
  using A = Acc<T>;
  const T* x[R];
  const T* y[J];
  for (int64_t r = 0; r < R; ++r) x[r] = a[a_begin + r];
  for (int64_t j = 0; j < J; ++j) y[j] = b[b_begin + j];
  Vec<A> acc[R * J] = {};
  const auto step = [&](const auto& get) BLT_INLINE_LAMBDA {
    Vec<A> xe[R];
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) xe[r] = get(x[r]);
#pragma GCC unroll 4
    for (int64_t j = 0; j < J; ++j) {
      const Vec<A> ye = get(y[j]);
#pragma GCC unroll 4
      for (int64_t r = 0; r < R; ++r) acc[r * J + j] += xe[r] * ye;
    }
  };
  int64_t e = 0;
  for (; e + kLanes<A> <= a.width; e += kLanes<A>) {
    step([&](const T* p) BLT_INLINE_LAMBDA { return load(p + e); });
  }
  if (e < a.width) {
    step([&](const T* p) BLT_INLINE_LAMBDA { return load_n(p + e, a.width - e); });
  }
  A sums[padded<A>(R * J)];
  horizontal_sums<A, R * J>(acc, sums);
#pragma GCC unroll 4
  for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < J; ++j) out[r * stride + j] = sums[r * J + j] * scale;
  }
}

// out[r * stride + j] = scale * (a[a_begin + r] . b[j]) for r < R, j < count; `fill` up to padded(count).
template <int64_t R, class T>
void dots(const Rows<const T>& a, int64_t a_begin, const Rows<const T>& b, int64_t count, Acc<T> scale, Acc<T> fill,
          Acc<T>* out, int64_t stride) {
  int64_t j = 0;
  for (; j + kColumns <= count; j += kColumns) {
    dot_tile<R, kColumns>(a, a_begin, b, j, scale, out + j, stride);
  }
  if (j < count) {
    with_count<kColumns - 1>(count - j, [&](auto columns) {
      dot_tile<R, decltype(columns)::value>(a, a_begin, b, j, scale, out + j, stride);
    });
  }
  for (int64_t r = 0; r < R; ++r) {
    for (j = count; j < padded<Acc<T>>(count); ++j) out[r * stride + j] = fill;
  }
}

// to[to_begin + r] = sum_n weights[r * row_stride + n * column_stride] from[n] for r < R, n < count.
template <int64_t R, class T>
void combine(const Acc<T>* weights, int64_t row_stride, int64_t column_stride, const Rows<const T>& from,
             int64_t count, const Rows<T>& to, int64_t to_begin) {
  using A = Acc<T>;
  const int64_t width = to.width;
  T* rows[R];
  for (int64_t r = 0; r < R; ++r) rows[r] = to[to_begin + r];
  const auto columns = [&](auto registers, int64_t e, const auto& get, const auto& put) BLT_INLINE_LAMBDA {
    constexpr int64_t V = decltype(registers)::value;
    Vec<A> acc[R][V] = {};
    for (int64_t n = 0; n < count; ++n) {
      const T* row = from[n] + e;
      Vec<A> x[V];
#pragma GCC unroll 4
      for (int64_t i = 0; i < V; ++i) x[i] = get(row + i * kLanes<A>);
#pragma GCC unroll 4
      for (int64_t r = 0; r < R; ++r) {
        const A weight = weights[r * row_stride + n * column_stride];
#pragma GCC unroll 4
        for (int64_t i = 0; i < V; ++i) acc[r][i] += x[i] * weight;
      }
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < V; ++i) put(rows[r] + e + i * kLanes<A>, acc[r][i]);
    }
  };
  const auto get = [](const T* p) BLT_INLINE_LAMBDA { return load(p); };
  const auto put = [](T* p, Vec<A> x) BLT_INLINE_LAMBDA { store(p, x); };
  int64_t e = 0;
  for (; e + kColumns * kLanes<A> <= width; e += kColumns * kLanes<A>) columns(Count<kColumns>{}, e, get, put);
  for (; e + kLanes<A> <= width; e += kLanes<A>) columns(Count<1>{}, e, get, put);
  if (e < width) {
    const int64_t n = width - e;
    columns(Count<1>{}, e, [&](const T* p) BLT_INLINE_LAMBDA { return load_n(p, n); },
            [&](T* p, Vec<A> x) BLT_INLINE_LAMBDA { store_n(p, x, n); });
  }
}

// R rows of scores -> their softmax, in place; lse[r] is the log of the sum of the exponentials of the scores.
template <int64_t R, class A>
void softmax(A* scores, int64_t stride, int64_t count, A (&lse)[R]) {
  Vec<A> sums[R];
  for (int64_t r = 0; r < R; ++r) {
    A* row = scores + r * stride;
    Vec<A> top = load(row);
    for (int64_t j = kLanes<A>; j < count; j += kLanes<A>) top = maximum<A>(load(row + j), top);
    lse[r] = horizontal_max<A>(top);
    sums[r] = Vec<A>{};
    for (int64_t j = 0; j < count; j += kLanes<A>) {
      const Vec<A> e = exp(load(row + j) - lse[r]);
      store(row + j, e);
      sums[r] += e;
    }
  }
  A totals[kLanes<A>];
  horizontal_sums<A, R>(sums, totals);
  A logs[kLanes<A>];
  store(logs, log(load(totals)));
  for (int64_t r = 0; r < R; ++r) {
    lse[r] += logs[r];
    for (int64_t j = r * stride; j < r * stride + count; j += kLanes<A>) store(scores + j, load(scores + j) / totals[r]);
  }
}

// The rows that a group's queries see and that its keys are seen by, and the kernels' view of one key head of them.
template <class T>
struct Worker {
  using A = Acc<T>;
  const CrossAttentionArgs& args;
  int64_t* q_index;   // of each query row, the row in [query rows * H, E], for key head 0
  int64_t* kv_index;  // of each key row, the row in [key rows * Hkv, E], for key head 0
  A* scratch;
  int64_t q_count = 0, kv_count = 0;

  int64_t queries_per_key() const { return args.heads / args.kv_heads; }

  void add_queries(const AttentionGroup& group) {
    for (int64_t row = group.q_begin; row < group.q_end; ++row) {
      for (int64_t g = 0; g < queries_per_key(); ++g) q_index[q_count++] = row * args.heads + g;
    }
  }
  void add_keys(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kv_index[kv_count++] = row * args.kv_heads;
  }

  Rows<const T> queries(const void* base, int64_t head) const {
    return {static_cast<const T*>(base) + head * queries_per_key() * args.width, q_index, args.width};
  }
  Rows<T> queries(void* base, int64_t head) const {
    return {static_cast<T*>(base) + head * queries_per_key() * args.width, q_index, args.width};
  }
  Rows<const T> keys(const void* base, int64_t head) const {
    return {static_cast<const T*>(base) + head * args.width, kv_index, args.width};
  }
  Rows<T> keys(void* base, int64_t head) const {
    return {static_cast<T*>(base) + head * args.width, kv_index, args.width};
  }
  // The query's element of a [query rows, H] tensor.
  int64_t per_query(int64_t head, int64_t i) const { return q_index[i] + head * queries_per_key(); }

  void zero(const Rows<T>& rows, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) memset(rows[i], 0, size_t(args.width) * sizeof(T));
  }

  void forward(int64_t head) {
    const Rows<T> out = queries(args.out, head);
    if (kv_count == 0) {
      zero(out, q_count);
      for (int64_t i = 0; i < q_count; ++i) static_cast<A*>(args.lse)[per_query(head, i)] = -A(__builtin_inf());
      return;
    }
    const int64_t stride = padded<A>(kv_count);
    for (int64_t i = 0; i < q_count; i += kTile) {
      with_count<kTile>(min_of(q_count - i, kTile), [&](auto rows) {
        constexpr int64_t R = decltype(rows)::value;
        dots<R, T>(queries(args.q, head), i, keys(args.k, head), kv_count, A(args.scale), -A(__builtin_inf()), scratch,
                   stride);
        A lse[R];
        softmax<R>(scratch, stride, kv_count, lse);
        for (int64_t r = 0; r < R; ++r) static_cast<A*>(args.lse)[per_query(head, i + r)] = lse[r];
        combine<R, T>(scratch, stride, 1, keys(args.v, head), kv_count, out, i);
      });
    }
  }

  void backward_queries(int64_t head) {
    if (kv_count == 0) {
      if (args.grad_q != nullptr) zero(queries(args.grad_q, head), q_count);
      return;
    }
    // p and dscore of all queries when the keys' gradients are made from them here, else of one tile.
    const int64_t stride = padded<A>(kv_count), tile_step = args.windowed ? 0 : stride;
    A* const all_p = scratch;
    A* const all_ds = scratch + (args.windowed ? kTile : q_count) * stride;
    for (int64_t i = 0; i < q_count; i += kTile) {
      with_count<kTile>(min_of(q_count - i, kTile), [&](auto rows) {
        constexpr int64_t R = decltype(rows)::value;
        A *p = all_p + i * tile_step, *ds = all_ds + i * tile_step;
        dots<R, T>(queries(args.q, head), i, keys(args.k, head), kv_count, A(args.scale), -A(__builtin_inf()), p, stride);
        dots<R, T>(queries(args.grad, head), i, keys(args.v, head), kv_count, A(1), A(0), ds, stride);
        // p = exp(score - lse) / their sum: dividing again takes out the rounding of lse.
        Vec<A> sums[R] = {}, products[R] = {};
        for (int64_t r = 0; r < R; ++r) {
          const A lse = static_cast<const A*>(args.lse_in)[per_query(head, i + r)];
          for (int64_t j = r * stride; j < (r + 1) * stride; j += kLanes<A>) {
            const Vec<A> e = exp(load(p + j) - lse);
            store(p + j, e);
            sums[r] += e;
            products[r] += e * load(ds + j);
          }
        }
        A sum[kLanes<A>], delta[kLanes<A>];
        horizontal_sums<A, R>(sums, sum);
        horizontal_sums<A, R>(products, delta);
        for (int64_t r = 0; r < R; ++r) {
          delta[r] /= sum[r];
          for (int64_t j = r * stride; j < (r + 1) * stride; j += kLanes<A>) {
            const Vec<A> weight = load(p + j) / sum[r];
            store(p + j, weight);
            store(ds + j, weight * (load(ds + j) - delta[r]) * A(args.scale));
          }
          if (args.windowed) {
            A* const saved = static_cast<A*>(args.row_terms) + 2 * per_query(head, i + r);
            saved[0] = sum[r];
            saved[1] = delta[r];
          }
        }
        if (args.grad_q != nullptr) {
          combine<R, T>(ds, stride, 1, keys(args.k, head), kv_count, queries(args.grad_q, head), i);
        }
      });
    }
    if (!args.windowed) key_gradients(head, 0, kv_count, all_p, all_ds, 1, stride);
  }

  void backward_keys(int64_t head) {
    const int64_t stride = padded<A>(q_count);
    A *const lse = scratch, *const sum = lse + stride, *const delta = sum + stride;
    A *const p = delta + stride, *const ds = p + kTile * stride;
    for (int64_t i = 0; i < stride; ++i) {
      const int64_t row = per_query(head, min_of(i, q_count - 1));
      lse[i] = static_cast<const A*>(args.lse_in)[row];
      sum[i] = static_cast<const A*>(args.row_terms)[2 * row];
      delta[i] = static_cast<const A*>(args.row_terms)[2 * row + 1];
    }
    for (int64_t i = 0; i < kv_count; i += kTile) {
      with_count<kTile>(min_of(kv_count - i, kTile), [&](auto rows) {
        constexpr int64_t R = decltype(rows)::value;
        dots<R, T>(keys(args.k, head), i, queries(args.q, head), q_count, A(args.scale), -A(__builtin_inf()), p, stride);
        dots<R, T>(keys(args.v, head), i, queries(args.grad, head), q_count, A(1), A(0), ds, stride);
        for (int64_t r = 0; r < R; ++r) {
          for (int64_t j = 0; j < stride; j += kLanes<A>) {
            A *const p_j = p + r * stride + j, *const ds_j = ds + r * stride + j;
            const Vec<A> weight = exp(load(p_j) - load(lse + j)) / load(sum + j);
            store(p_j, weight);
            store(ds_j, weight * (load(ds_j) - load(delta + j)) * A(args.scale));
          }
        }
        key_gradients(head, i, R, p, ds, stride, 1);
      });
    }
  }

  // grad_k and grad_v of `count` key rows; `key_stride` leads from key to key in p and ds, `query_stride` from query to
  // query.
  void key_gradients(int64_t head, int64_t begin, int64_t count, const A* p, const A* ds, int64_t key_stride,
                     int64_t query_stride) {
    for (int64_t i = 0; i < count; i += kTile) {
      with_count<kTile>(min_of(count - i, kTile), [&](auto rows) {
        constexpr int64_t R = decltype(rows)::value;
        if (args.grad_k != nullptr) {
          combine<R, T>(ds + i * key_stride, key_stride, query_stride, queries(args.q, head), q_count,
                        keys(args.grad_k, head), begin + i);
        }
        if (args.grad_v != nullptr) {
          combine<R, T>(p + i * key_stride, key_stride, query_stride, queries(args.grad, head), q_count,
                        keys(args.grad_v, head), begin + i);
        }
      });
    }
  }
};

// body(group, head, whether the group is another than before) for the pairs that start in begin .. end.
template <class Body>
void for_each_pair(const CrossAttentionArgs& args, int64_t begin, int64_t end, const Body& body) {
  // The first group that starts at `begin` or later, and the one before it, of which later heads may start there.
  int64_t low = 0, high = args.num_groups;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (args.groups[middle].cost * args.kv_heads < begin) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  for (int64_t i = max_of(low - 1, 0); i < args.num_groups; ++i) {
    const int64_t start = args.groups[i].cost * args.kv_heads, cost = args.groups[i + 1].cost - args.groups[i].cost;
    if (start >= end) {
      return;
    }
    bool fresh = true;
    for (int64_t head = 0; head < args.kv_heads; ++head) {
      if (start + head * cost >= begin && start + head * cost < end) {
        body(i, head, fresh);
        fresh = false;
      }
    }
  }
}

// The queries of group `i` and all the keys that they see.
template <class T>
void take_queries(Worker<T>& worker, int64_t i) {
  const AttentionGroup* groups = worker.args.groups;
  worker.q_count = worker.kv_count = 0;
  worker.add_queries(groups[i]);
  if (groups[i].first <= i) worker.add_keys(groups[groups[i].first].kv_begin, groups[i].kv_end);
}

// The keys of group `i` and all the queries that see them.
template <class T>
void take_keys(Worker<T>& worker, int64_t i) {
  const AttentionGroup* groups = worker.args.groups;
  worker.q_count = worker.kv_count = 0;
  worker.add_keys(groups[i].kv_begin, groups[i].kv_end);
  for (int64_t other = i; other < groups[i].last; ++other) {
    if (groups[other].first <= i) worker.add_queries(groups[other]);
  }
}

template <class T>
Worker<T> make_worker(const CrossAttentionArgs& args, const CrossAttentionScratch& scratch) {
  return {args, scratch.q_index, scratch.kv_index, static_cast<Acc<T>*>(scratch.numbers)};
}

}  // namespace

void cross_attention(const CrossAttentionArgs& args, int64_t begin, int64_t end, const CrossAttentionScratch& scratch) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    auto worker = make_worker<T>(args, scratch);
    for_each_pair(args, begin, end, [&](int64_t i, int64_t head, bool fresh) {
      if (fresh) take_queries(worker, i);
      worker.forward(head);
    });
  })
}

void cross_attention_backward_queries(const CrossAttentionArgs& args, int64_t begin, int64_t end,
                                      const CrossAttentionScratch& scratch) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    auto worker = make_worker<T>(args, scratch);
    for_each_pair(args, begin, end, [&](int64_t i, int64_t head, bool fresh) {
      if (fresh) take_queries(worker, i);
      worker.backward_queries(head);
    });
  })
}

void cross_attention_backward_keys(const CrossAttentionArgs& args, int64_t begin, int64_t end,
                                   const CrossAttentionScratch& scratch) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    auto worker = make_worker<T>(args, scratch);
    for_each_pair(args, begin, end, [&](int64_t i, int64_t head, bool fresh) {
      if (fresh) take_keys(worker, i);
      worker.backward_keys(head);
    });
  })
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
