// Cross-attention on the CPU. Two small matrix products do the work, `dots` (scores) and `combine` (weighted sums), on
// tiles of a few rows whose accumulators stay in registers. Between them the scores of an item are stored as
// [key][head][query]: softmax runs down the keys, with heads and queries side by side in the lanes, so that registers
// are full even for a patch of one byte.
#include "cpu/cross_attention.h"

#include "common/search.h"
#include "cpu/vec.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

namespace {

// How many rows a tile has on either side: their accumulators and operands fit the 32 (or 16) vector registers.
constexpr int64_t kTile = kVecBytes == 64 ? 4 : 2;
constexpr int64_t kRegisters = 4;  // how many registers of a row `combine` takes at a time
// Long sums are sums of chunks, which keeps rounding errors small: a chunk has this many terms, or about as many as
// there are chunks.
constexpr int64_t kChunk = 16;

template <int64_t N>
struct Count {
  static constexpr int64_t value = N;
};

// Calls body(Count<n>{}), for 1 <= n <= Max.
template <int64_t Max, class Body>
BLT_INLINE void with_count(int64_t n, const Body& body) {
  if constexpr (Max > 1) {
    if (n < Max) {
      return with_count<Max - 1>(n, body);
    }
  }
  body(Count<Max>{});
}

// Calls body(i, Count<n>{}) for i = 0, kTile, ..., where the tile has rows i .. i + n - 1 of `count` rows.
template <class Body>
BLT_INLINE void for_each_tile(int64_t count, const Body& body) {
  for (int64_t i = 0; i < count; i += kTile) {
    with_count<kTile>(min_of(count - i, kTile), [&](auto rows) BLT_INLINE_LAMBDA { body(i, rows); });
  }
}

// Calls body(begin, end) for each chunk of 0 .. count - 1.
template <class Body>
BLT_INLINE void for_each_chunk(int64_t count, const Body& body) {
  int64_t chunk = kChunk;
  while (chunk * chunk < count) chunk *= 2;
  for (int64_t i = 0; i < count; i += chunk) body(i, min_of(i + chunk, count));
}

// Some rows of a tensor, with `width` elements each.
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

// out[j * stride + r] = scale * (a[a_begin + r] . b[b_begin + j]) for r < R, j < J.
template <int64_t R, int64_t J, class T>
BLT_INLINE void dot_tile(const Rows<const T>& a, int64_t a_begin, const Rows<const T>& b, int64_t b_begin, Acc<T> scale,
                         Acc<T>* out, int64_t stride) {
  using A = Acc<T>;
  const T *x[R], *y[J];
  for (int64_t r = 0; r < R; ++r) x[r] = a[a_begin + r];
  for (int64_t j = 0; j < J; ++j) y[j] = b[b_begin + j];
  Vec<A> acc[J * R] = {};
  const auto step = [&](const auto& get) BLT_INLINE_LAMBDA {
    Vec<A> xe[R];
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) xe[r] = get(x[r]);
#pragma GCC unroll 4
    for (int64_t j = 0; j < J; ++j) {
      const Vec<A> ye = get(y[j]);
#pragma GCC unroll 4
      for (int64_t r = 0; r < R; ++r) acc[j * R + r] += xe[r] * ye;
    }
  };
  int64_t e = 0;
  for (; e + kLanes<A> <= a.width; e += kLanes<A>) {
    step([&](const T* p) BLT_INLINE_LAMBDA { return load(p + e); });
  }
  if (e < a.width) {
    step([&](const T* p) BLT_INLINE_LAMBDA { return load_n(p + e, a.width - e); });
  }
  A sums[padded<A>(J * R)];
  horizontal_sums<A, J * R>(acc, sums);
#pragma GCC unroll 4
  for (int64_t j = 0; j < J; ++j) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) out[j * stride + r] = sums[j * R + r] * scale;
  }
}

// out[j * stride + i] = scale * (a[i] . b[j])
template <class T>
void dots(const Rows<const T>& a, int64_t a_count, const Rows<const T>& b, int64_t b_count, Acc<T> scale, Acc<T>* out,
          int64_t stride) {
  for_each_tile(a_count, [&](int64_t i, auto rows) {
    for_each_tile(b_count, [&](int64_t j, auto columns) BLT_INLINE_LAMBDA {
      dot_tile<decltype(rows)::value, decltype(columns)::value>(a, i, b, j, scale, out + j * stride + i, stride);
    });
  });
}

// to[i] = sum_n weights[i * row_stride + n * column_stride] from[n]
template <class T>
void combine(const Acc<T>* weights, int64_t row_stride, int64_t column_stride, const Rows<const T>& from, int64_t count,
             const Rows<T>& to, int64_t to_count) {
  using A = Acc<T>;
  const auto get = [](const T* p) BLT_INLINE_LAMBDA { return load(p); };
  const auto put = [](T* p, Vec<A> x) BLT_INLINE_LAMBDA { store(p, x); };
  for_each_tile(to_count, [&](int64_t i, auto tile_rows) {
    constexpr int64_t R = decltype(tile_rows)::value;
    const A* const tile_weights = weights + i * row_stride;
    // Does V registers of each row of the tile, from element e on.
    const auto registers = [&](auto tile_registers, int64_t e, const auto& get, const auto& put) BLT_INLINE_LAMBDA {
      constexpr int64_t V = decltype(tile_registers)::value;
      Vec<A> acc[R * V];
      const auto sum = [&](int64_t begin, int64_t end) BLT_INLINE_LAMBDA {
#pragma GCC unroll 16
        for (int64_t k = 0; k < R * V; ++k) acc[k] = Vec<A>{};
        for (int64_t n = begin; n < end; ++n) {
          const T* row = from[n] + e;
          Vec<A> x[V];
#pragma GCC unroll 4
          for (int64_t k = 0; k < V; ++k) x[k] = get(row + k * kLanes<A>);
#pragma GCC unroll 4
          for (int64_t r = 0; r < R; ++r) {
            const A weight = tile_weights[r * row_stride + n * column_stride];
#pragma GCC unroll 4
            for (int64_t k = 0; k < V; ++k) acc[r * V + k] += x[k] * weight;
          }
        }
      };
      const auto write = [&](const Vec<A>* result) BLT_INLINE_LAMBDA {
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; ++r) {
          T* row = to[i + r] + e;
#pragma GCC unroll 4
          for (int64_t k = 0; k < V; ++k) put(row + k * kLanes<A>, result[r * V + k]);
        }
      };
      if (count <= kChunk) {
        sum(0, count);
        write(acc);
      } else {
        Vec<A> total[R * V] = {};
        for_each_chunk(count, [&](int64_t begin, int64_t end) BLT_INLINE_LAMBDA {
          sum(begin, end);
          for (int64_t k = 0; k < R * V; ++k) total[k] += acc[k];
        });
        write(total);
      }
    };
    int64_t e = 0;
    for (; e + kRegisters * kLanes<A> <= to.width; e += kRegisters * kLanes<A>)
      registers(Count<kRegisters>{}, e, get, put);
    for (; e + kLanes<A> <= to.width; e += kLanes<A>) registers(Count<1>{}, e, get, put);
    if (e < to.width) {
      const int64_t n = to.width - e;
      registers(
          Count<1>{}, e, [&](const T* p) BLT_INLINE_LAMBDA { return load_n(p, n); },
          [&](T* p, Vec<A> x) BLT_INLINE_LAMBDA { store_n(p, x, n); });
    }
  });
}

// What the gradient of a query's softmax needs to know about all of its keys: the largest score, the sum of the
// exponentials of the scores minus the largest one, and the sum of p dp.
template <class A>
struct RowTerms {
  A *top, *sum, *delta;
};

// What a thread does at a time: queries of an item and the keys that they see (or keys and the queries that see them),
// for the key heads head_begin .. head_end - 1. Its numbers are arrays over [key][head][query] or [head][query], where
// head and query together are padded to whole registers.
template <class T>
struct AttentionTask {
  using A = Acc<T>;
  const CrossAttentionArgs& args;
  int64_t head_begin, head_end;
  const int64_t* q_index;  // of each query row, the row in [query rows * H, E], for key head 0
  int64_t q_count;
  const int64_t* kv_index;  // of each key row, the row in [key rows * Hkv, E], for key head 0
  int64_t kv_count;

  int64_t heads_per_key() const { return args.heads / args.kv_heads; }
  int64_t stride() const { return padded<A>((head_end - head_begin) * q_count); }
  int64_t position(int64_t head) const { return (head - head_begin) * q_count; }

  Rows<const T> queries(const void* base, int64_t head) const {
    return {static_cast<const T*>(base) + head * heads_per_key() * args.width, q_index, args.width};
  }
  Rows<T> queries(void* base, int64_t head) const {
    return {static_cast<T*>(base) + head * heads_per_key() * args.width, q_index, args.width};
  }
  Rows<const T> keys(const void* base, int64_t head) const {
    return {static_cast<const T*>(base) + head * args.width, kv_index, args.width};
  }
  Rows<T> keys(void* base, int64_t head) const {
    return {static_cast<T*>(base) + head * args.width, kv_index, args.width};
  }

  // Calls body(index in a [query rows, H] tensor, index in a [head][query] array).
  template <class Body>
  void for_each_query(const Body& body) const {
    for (int64_t head = head_begin; head < head_end; ++head) {
      for (int64_t i = 0; i < q_count; ++i) body(q_index[i] + head * heads_per_key(), position(head) + i);
    }
  }

  void zero(void* base) const {
    for (int64_t head = head_begin; head < head_end; ++head) {
      const Rows<T> rows = queries(base, head);
      for (int64_t i = 0; i < q_count; ++i) memset(rows[i], 0, size_t(args.width) * sizeof(T));
    }
  }

  void forward(A* numbers) const {
    A* const out_lse = static_cast<A*>(args.lse);
    if (kv_count == 0) {
      zero(args.out);
      for_each_query([&](int64_t row, int64_t) { out_lse[row] = -A(__builtin_inf()); });
      return;
    }
    A *const lse = numbers, *const p = numbers + stride();
    for (int64_t head = head_begin; head < head_end; ++head) {
      dots<T>(queries(args.q, head), q_count, keys(args.k, head), kv_count, A(args.scale), p + position(head),
              stride());
    }
    softmax(p, lse);
    for_each_query([&](int64_t row, int64_t i) { out_lse[row] = lse[i]; });
    for (int64_t head = head_begin; head < head_end; ++head) {
      combine<T>(p + position(head), 1, stride(), keys(args.v, head), kv_count, queries(args.out, head), q_count);
    }
  }

  // Replaces the scores by their softmax over the keys, and writes the log of the sum of their exponentials.
  void softmax(A* p, A* lse) const {
    for (int64_t x = 0; x < stride(); x += kLanes<A>) {
      const Vec<A> top = largest(p, x);
      Vec<A> sum = {};
      for_each_chunk(kv_count, [&](int64_t begin, int64_t end) {
        Vec<A> chunk_sum = {};
        for (int64_t j = begin; j < end; ++j) {
          A* const p_j = p + j * stride() + x;
          const Vec<A> e = exp(load(p_j) - top);
          store(p_j, e);
          chunk_sum += e;
        }
        sum += chunk_sum;
      });
      for (int64_t j = 0; j < kv_count; ++j) {
        A* const p_j = p + j * stride() + x;
        store(p_j, load(p_j) / sum);
      }
      store(lse + x, top + log(sum));
    }
  }

  // The largest score of each query of a register.
  Vec<A> largest(const A* scores, int64_t x) const {
    Vec<A> top = load(scores + x);
    for (int64_t j = 1; j < kv_count; ++j) top = maximum<A>(load(scores + j * stride() + x), top);
    return top;
  }

  // Replaces the scores by p, and dp by dscore = scale p (dp - delta), where delta is the sum of p dp over the keys.
  // Stores what is summed over the keys of a query in `terms`; with `known` these keys are only some of the query's,
  // and the sums are taken from `terms`.
  void softmax_backward(A* p, A* ds, const RowTerms<A>& terms, bool known) const {
    for (int64_t x = 0; x < stride(); x += kLanes<A>) {
      const Vec<A> top = known ? load(terms.top + x) : largest(p, x);
      Vec<A> sum = {}, delta = {};
      for_each_chunk(kv_count, [&](int64_t begin, int64_t end) {
        Vec<A> chunk_sum = {}, chunk_delta = {};
        for (int64_t j = begin; j < end; ++j) {
          A* const p_j = p + j * stride() + x;
          const Vec<A> e = exp(load(p_j) - top);
          store(p_j, e);
          chunk_sum += e;
          chunk_delta += e * load(ds + j * stride() + x);
        }
        sum += chunk_sum;
        delta += chunk_delta;
      });
      if (known) {
        sum = load(terms.sum + x);
        delta = load(terms.delta + x);
      } else {
        delta /= sum;
        store(terms.top + x, top);
        store(terms.sum + x, sum);
        store(terms.delta + x, delta);
      }
      for (int64_t j = 0; j < kv_count; ++j) {
        A *const p_j = p + j * stride() + x, *const ds_j = ds + j * stride() + x;
        const Vec<A> weight = load(p_j) / sum;
        store(p_j, weight);
        store(ds_j, weight * (load(ds_j) - delta) * A(args.scale));
      }
    }
  }

  enum class Pass { all, queries, keys };

  template <Pass pass>
  void backward(A* numbers) const {
    if (kv_count == 0) {
      if (pass != Pass::keys && args.grad_q != nullptr) zero(args.grad_q);
      return;
    }
    const RowTerms<A> terms{numbers, numbers + stride(), numbers + 2 * stride()};
    A *const p = numbers + 3 * stride(), *const ds = p + kv_count * stride();
    A* const row_terms = static_cast<A*>(args.row_terms);
    if (pass == Pass::keys) {
      for_each_query([&](int64_t row, int64_t i) {
        terms.top[i] = row_terms[3 * row];
        terms.sum[i] = row_terms[3 * row + 1];
        terms.delta[i] = row_terms[3 * row + 2];
      });
    }
    for (int64_t head = head_begin; head < head_end; ++head) {
      const int64_t x = position(head);
      dots<T>(queries(args.q, head), q_count, keys(args.k, head), kv_count, A(args.scale), p + x, stride());
      dots<T>(queries(args.grad, head), q_count, keys(args.v, head), kv_count, A(1), ds + x, stride());
    }
    softmax_backward(p, ds, terms, pass == Pass::keys);
    if (pass == Pass::queries) {
      for_each_query([&](int64_t row, int64_t i) {
        row_terms[3 * row] = terms.top[i];
        row_terms[3 * row + 1] = terms.sum[i];
        row_terms[3 * row + 2] = terms.delta[i];
      });
    }
    for (int64_t head = head_begin; head < head_end; ++head) {
      const int64_t x = position(head);
      if (pass != Pass::keys && args.grad_q != nullptr) {
        combine<T>(ds + x, 1, stride(), keys(args.k, head), kv_count, queries(args.grad_q, head), q_count);
      }
      if (pass != Pass::queries && args.grad_k != nullptr) {
        combine<T>(ds + x, stride(), 1, queries(args.q, head), q_count, keys(args.grad_k, head), kv_count);
      }
      if (pass != Pass::queries && args.grad_v != nullptr) {
        combine<T>(p + x, stride(), 1, queries(args.grad, head), q_count, keys(args.grad_v, head), kv_count);
      }
    }
  }
};

// Calls body(item, head_begin, head_end) for the pairs (item, key head) that start in begin .. end.
template <class Body>
void for_each_item(const CrossAttentionArgs& args, int64_t begin, int64_t end, const Body& body) {
  // The first item that starts at `begin` or later. Of the item before it, later heads may start there as well.
  const int64_t first = partition_point(int64_t(0), args.num_items,
                                        [&](int64_t i) { return args.items[i].cost * args.kv_heads < begin; });
  for (int64_t i = max_of(first - 1, 0); i < args.num_items; ++i) {
    const int64_t start = args.items[i].cost * args.kv_heads, cost = args.items[i + 1].cost - args.items[i].cost;
    if (start >= end) {
      return;
    }
    // Head h starts at start + h * cost.
    const int64_t head_begin = start >= begin ? 0 : (begin - start + cost - 1) / cost;
    const int64_t head_end = min_of(args.kv_heads, (end - start + cost - 1) / cost);
    if (head_begin < head_end) {
      body(i, head_begin, head_end);
    }
  }
}

int64_t list_queries(const CrossAttentionArgs& args, int64_t begin, int64_t end, int64_t* index) {
  const int64_t heads_per_key = args.heads / args.kv_heads;
  int64_t count = 0;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < heads_per_key; ++g) index[count++] = row * args.heads + g;
  }
  return count;
}

int64_t list_keys(const CrossAttentionArgs& args, int64_t begin, int64_t end, int64_t* index) {
  for (int64_t row = begin; row < end; ++row) index[row - begin] = row * args.kv_heads;
  return end - begin;
}

// Calls body(task) with the queries of each item and all the keys that they see.
template <class T, class Body>
void for_each_queries(const CrossAttentionArgs& args, int64_t begin, int64_t end, const CrossAttentionScratch& scratch,
                      const Body& body) {
  for_each_item(args, begin, end, [&](int64_t i, int64_t head_begin, int64_t head_end) {
    const AttentionItem& item = args.items[i];
    const int64_t q_count = list_queries(args, item.q_begin, item.q_end, scratch.q_index);
    const int64_t kv_count =
        item.first <= i ? list_keys(args, args.items[item.first].kv_begin, item.kv_end, scratch.kv_index) : 0;
    body(AttentionTask<T>{args, head_begin, head_end, scratch.q_index, q_count, scratch.kv_index, kv_count});
  });
}

// Calls body(block) with blocks of the task's queries, so few that the scores of a block stay small.
template <class T, class Body>
void for_each_block_of_queries(const AttentionTask<T>& task, const Body& body) {
  const int64_t rows = cross_attention_block(task.args.kv_heads, task.kv_count);
  for (int64_t i = 0; i < task.q_count; i += rows) {
    AttentionTask<T> block = task;
    block.q_index += i;
    block.q_count = min_of(rows, task.q_count - i);
    body(block);
  }
}

}  // namespace

void cross_attention(const CrossAttentionArgs& args, int64_t begin, int64_t end, const CrossAttentionScratch& scratch) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    for_each_queries<T>(args, begin, end, scratch, [&](const AttentionTask<T>& task) {
      for_each_block_of_queries(
          task, [&](const AttentionTask<T>& block) { block.forward(static_cast<Acc<T>*>(scratch.numbers)); });
    });
  })
}

void cross_attention_backward(const CrossAttentionArgs& args, int64_t begin, int64_t end,
                              const CrossAttentionScratch& scratch) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    for_each_queries<T>(args, begin, end, scratch, [&](const AttentionTask<T>& task) {
      task.template backward<AttentionTask<T>::Pass::all>(static_cast<Acc<T>*>(scratch.numbers));
    });
  })
}

void cross_attention_backward_queries(const CrossAttentionArgs& args, int64_t begin, int64_t end,
                                      const CrossAttentionScratch& scratch) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    for_each_queries<T>(args, begin, end, scratch, [&](const AttentionTask<T>& task) {
      for_each_block_of_queries(task, [&](const AttentionTask<T>& block) {
        block.template backward<AttentionTask<T>::Pass::queries>(static_cast<Acc<T>*>(scratch.numbers));
      });
    });
  })
}

void cross_attention_backward_keys(const CrossAttentionArgs& args, int64_t begin, int64_t end,
                                   const CrossAttentionScratch& scratch) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    for_each_item(args, begin, end, [&](int64_t i, int64_t head_begin, int64_t head_end) {
      const AttentionItem& item = args.items[i];
      int64_t q_count = 0;
      for (int64_t other = i; other < item.last; ++other) {
        const AttentionItem& viewer = args.items[other];
        if (viewer.first <= i) q_count += list_queries(args, viewer.q_begin, viewer.q_end, scratch.q_index + q_count);
      }
      const int64_t kv_count = list_keys(args, item.kv_begin, item.kv_end, scratch.kv_index);
      const int64_t rows = cross_attention_block(args.kv_heads, q_count);
      for (int64_t j = 0; j < kv_count; j += rows) {
        const AttentionTask<T> block{
            args, head_begin, head_end, scratch.q_index, q_count, scratch.kv_index + j, min_of(rows, kv_count - j)};
        block.template backward<AttentionTask<T>::Pass::keys>(static_cast<Acc<T>*>(scratch.numbers));
      }
    });
  })
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
