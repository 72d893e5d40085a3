// patch_pool on the CPU. Forward reads x once, row after row, as memory likes it. Backward of max and min reads x twice,
// to count ties and to write: strip after strip of columns, so that the second time is from the cache.
#include "cpu/patch_pool.h"

#include "cpu/vec.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

namespace {

constexpr int64_t kBlock = 1024;  // columns whose accumulators stay in the first-level cache
constexpr int64_t kChunk = 128;   // rows added in one run: sums of longer patches are sums of sums, for accuracy
constexpr int64_t kLong = 64;     // rows from which a strip of columns may fall out of the cache, as its lines share sets

template <Reduce R, class V>
BLT_INLINE V combine(V acc, V v) {
  if constexpr (R == Reduce::max) {
    return (v > acc) | (v != v) ? v : acc;  // NaN wins, as in torch.amax
  } else if constexpr (R == Reduce::min) {
    return (v < acc) | (v != v) ? v : acc;
  } else {
    return acc + v;
  }
}

// Calls body(d, n) for each register of columns d .. d + n - 1. n is a constant for whole registers, so that their loads
// and stores stay plain.
template <class A, class Body>
BLT_INLINE void for_columns(int64_t width, const Body& body) {
  int64_t d = 0;
  for (; d + kLanes<A> <= width; d += kLanes<A>) {
    body(d, kLanes<A>);
  }
  if (d < width) {
    body(d, width - d);
  }
}

template <class T>
BLT_INLINE Vec<Acc<T>> load_up_to(const T* p, int64_t n) {
  return n == kLanes<Acc<T>> ? load(p) : load_n(p, n);
}
template <class T>
BLT_INLINE void store_up_to(T* p, Vec<Acc<T>> v, int64_t n) {
  if (n == kLanes<Acc<T>>) {
    store(p, v);
  } else {
    store_n(p, v, n);
  }
}

// The hardware reads ahead within a memory page, of which a row is often one: it needs telling where the next begins.
template <class T>
BLT_INLINE void prefetch_start(const T* row) {
  for (int64_t line = 0; line < 4; ++line) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + line * 64);
  }
}

// acc[0..width) = reduction of `rows` >= 1 rows. acc has room for whole registers.
template <class T, Reduce R>
void reduce_rows(const T* x, int64_t rows, int64_t stride, int64_t width, Acc<T>* acc) {
  using A = Acc<T>;
  prefetch_start(x + stride);
  for_columns<A>(width, [&](int64_t d, int64_t n) { store(acc + d, load_up_to(x + d, n)); });
  for (int64_t r = 1; r < rows; ++r) {
    const T* row = x + r * stride;
    prefetch_start(row + stride);
    for_columns<A>(width, [&](int64_t d, int64_t n) {
      store(acc + d, combine<R>(load(acc + d), load_up_to(row + d, n)));
    });
  }
}

template <class T, Reduce R>
void pool_block(const T* x, int64_t rows, int64_t stride, int64_t width, T* out) {
  using A = Acc<T>;
  alignas(64) A acc[kBlock], part[kBlock];
  const int64_t head = rows - 1;  // the last row goes straight into the result
  if (head > 0) {
    reduce_rows<T, R>(x, min_of(head, kChunk), stride, width, acc);
  }
  for (int64_t r = kChunk; r < head; r += kChunk) {
    reduce_rows<T, R>(x + r * stride, min_of(head - r, kChunk), stride, width, part);
    for_columns<A>(width, [&](int64_t d, int64_t) { store(acc + d, combine<R>(load(acc + d), load(part + d))); });
  }
  const T* last = x + head * stride;
  prefetch_start(last + stride);  // usually of the next patch
  for_columns<A>(width, [&](int64_t d, int64_t n) {
    Vec<A> v = load_up_to(last + d, n);
    v = head > 0 ? combine<R>(load(acc + d), v) : v;
    store_up_to(out + d, R == Reduce::mean ? v / A(rows) : v, n);
  });
}

template <class T, Reduce R>
void pool(const PatchPoolArgs& args, int64_t begin, int64_t end, int64_t column_begin, int64_t column_end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / args.capacity, entry = b * args.stride + i % args.capacity;
    const int64_t first = args.begin[entry], rows = args.end[entry] - first;
    T* out = static_cast<T*>(args.out) + i * args.width;
    if (rows <= 0) {
      memset(out + column_begin, 0, size_t(column_end - column_begin) * sizeof(T));
      continue;
    }
    const T* x = static_cast<const T*>(args.x) + (b * args.num_bytes + first) * args.width;
    for (int64_t d = column_begin; d < column_end; d += kBlock) {
      pool_block<T, R>(x + d, rows, args.width, min_of(kBlock, column_end - d), out + d);
    }
  }
}

template <bool Stream, class T>
BLT_INLINE void put(T* p, Vec<Acc<T>> v, int64_t n) {
  if constexpr (Stream) {
    stream(p, v);
  } else {
    store_up_to(p, v, n);
  }
}

// The gradient of a row that equals the result, or does not, as torch.amax has it: grad * equal / ties. Where NaN won,
// nothing is equal and every row gets 0 / 0.
template <class V>
BLT_INLINE V divide(V x, V winner, V share) {
  return x == winner ? share : share * 0;
}

// U registers of columns of a patch, of which the last has n lanes in use.
template <class T, bool Ties, bool Stream, int U>
BLT_INLINE void spread_columns(const T* x, const T* out, const T* grad, T* grad_x, int64_t rows, int64_t stride,
                               Acc<T> divisor, int64_t n) {
  using A = Acc<T>;
  Vec<A> winner[U], share[U];
  for (int u = 0; u < U; ++u) {
    share[u] = load_up_to(grad + u * kLanes<A>, n) / divisor;
  }
  if constexpr (Ties) {
    Vec<A> ties[U];
    for (int u = 0; u < U; ++u) {
      winner[u] = load_up_to(out + u * kLanes<A>, n);
      ties[u] = Vec<A>{};
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int u = 0; u < U; ++u) {
        ties[u] += load_up_to(x + r * stride + u * kLanes<A>, n) == winner[u] ? splat<A>(1) : Vec<A>{};
      }
    }
    for (int u = 0; u < U; ++u) {
      share[u] /= ties[u];
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int u = 0; u < U; ++u) {
      const int64_t d = r * stride + u * kLanes<A>;
      put<Stream>(grad_x + d, Ties ? divide(load_up_to(x + d, n), winner[u], share[u]) : share[u], n);
    }
  }
}

template <class T, bool Ties, bool Stream>
void spread_short(const T* x, const T* out, const T* grad, T* grad_x, int64_t rows, int64_t stride, Acc<T> divisor,
                  int64_t width) {
  constexpr int U = 4;  // whole cache lines of each row at a time
  constexpr int64_t lanes = kLanes<Acc<T>>;
  int64_t d = 0;
  for (; d + U * lanes <= width; d += U * lanes) {
    spread_columns<T, Ties, Stream, U>(x + d, out + d, grad + d, grad_x + d, rows, stride, divisor, lanes);
  }
  for (; d < width; d += lanes) {
    spread_columns<T, Ties, Stream, 1>(x + d, out + d, grad + d, grad_x + d, rows, stride, divisor,
                                       min_of(lanes, width - d));
  }
}

// max and min of a patch that the caches cannot hold: row after row, in blocks of columns.
template <class T, bool Stream>
void spread_long(const T* x, const T* out, const T* grad, T* grad_x, int64_t rows, int64_t stride, int64_t width) {
  using A = Acc<T>;
  alignas(64) A share[kBlock];  // first the number of ties
  for (int64_t block = 0; block < width; block += kBlock) {
    const int64_t columns = min_of(kBlock, width - block);
    memset(share, 0, sizeof(share));
    for (int64_t r = 0; r < rows; ++r) {
      for_columns<A>(columns, [&](int64_t d, int64_t n) {
        const Vec<A> v = load_up_to(x + r * stride + block + d, n), winner = load_up_to(out + block + d, n);
        store(share + d, load(share + d) + (v == winner ? splat<A>(1) : Vec<A>{}));
      });
    }
    for_columns<A>(columns, [&](int64_t d, int64_t n) {
      store(share + d, load_up_to(grad + block + d, n) / load(share + d));
    });
    for (int64_t r = 0; r < rows; ++r) {
      for_columns<A>(columns, [&](int64_t d, int64_t n) {
        const int64_t at = r * stride + block + d;
        put<Stream>(grad_x + at, divide(load_up_to(x + at, n), load_up_to(out + block + d, n), load(share + d)), n);
      });
    }
  }
}

template <class T, bool Stream>
void zero_rows(T* out, int64_t rows, int64_t stride, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    for_columns<Acc<T>>(width, [&](int64_t d, int64_t n) { put<Stream>(out + r * stride + d, Vec<Acc<T>>{}, n); });
  }
}

template <class T, bool Ties, bool Stream>
void spread(const PatchPoolBackwardArgs& args, int64_t begin, int64_t end, int64_t column_begin, int64_t column_end) {
  const PatchPoolArgs& f = args.forward;
  const int64_t width = column_end - column_begin;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / f.capacity, c = i % f.capacity, entry = b * f.stride + c;
    const int64_t first = f.begin[entry], last = f.end[entry], rows = last - first;
    const int64_t patch = i * f.width + column_begin, row = b * f.num_bytes * f.width + column_begin;
    T* grad_x = static_cast<T*>(args.grad_x) + row;
    if (c == 0) {
      zero_rows<T, Stream>(grad_x, first, f.width, width);
    }
    if (rows > 0) {
      const T* x = Ties ? static_cast<const T*>(f.x) + row + first * f.width : nullptr;
      const T* out = Ties ? static_cast<const T*>(f.out) + patch : nullptr;
      const T* grad = static_cast<const T*>(args.grad) + patch;
      if (Ties && rows > kLong) {
        spread_long<T, Stream>(x, out, grad, grad_x + first * f.width, rows, f.width, width);
      } else {
        spread_short<T, Ties, Stream>(x, out, grad, grad_x + first * f.width, rows, f.width,
                                      f.reduce == Reduce::mean ? Acc<T>(rows) : Acc<T>(1), width);
      }
    }
    if (c == f.capacity - 1) {
      zero_rows<T, Stream>(grad_x + last * f.width, f.num_bytes - last, f.width, width);
    }
  }
  if constexpr (Stream) {
    stream_fence();
  }
}

}  // namespace

void patch_pool(const PatchPoolArgs& args, int64_t begin, int64_t end, int64_t column_begin, int64_t column_end) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    switch (args.reduce) {
      case Reduce::max:
        return pool<T, Reduce::max>(args, begin, end, column_begin, column_end);
      case Reduce::min:
        return pool<T, Reduce::min>(args, begin, end, column_begin, column_end);
      case Reduce::mean:
        return pool<T, Reduce::mean>(args, begin, end, column_begin, column_end);
      case Reduce::sum:
        return pool<T, Reduce::sum>(args, begin, end, column_begin, column_end);
    }
  })
}

void patch_pool_backward(const PatchPoolBackwardArgs& args, int64_t begin, int64_t end, int64_t column_begin,
                         int64_t column_end) {
  const bool ties = args.forward.reduce == Reduce::max || args.forward.reduce == Reduce::min;
  BLT_DISPATCH_FLOAT(args.forward.dtype, T, {
    const auto kernel = ties ? (args.stream ? spread<T, true, true> : spread<T, true, false>)
                             : (args.stream ? spread<T, false, true> : spread<T, false, false>);
    kernel(args, begin, end, column_begin, column_end);
  })
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
