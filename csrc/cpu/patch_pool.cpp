// patch_pool on the CPU. Forward reads x once, row after row: memory is fastest when each page is read from its start
// to its end by one thread. Backward of max and min reads x twice, first to count ties and then to write the gradient.
// It takes a short patch in strips of columns, so that the second reading finds the strip in the cache.
#include "cpu/patch_pool.h"

#include "cpu/vec.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

namespace {

constexpr int64_t kBlock = 1024;    // columns whose accumulators stay in the first-level cache
constexpr int64_t kChunk = 128;     // rows that are added in one run; longer sums are sums of chunks, for accuracy
constexpr int64_t kStripRows = 64;  // a strip of more rows may fall out of the cache: its lines share cache sets

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

// Calls body(d, n) for each register of columns d .. d + n - 1. For whole registers n is a constant, so that the
// compiler makes plain loads and stores of them.
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

// The hardware prefetches within a memory page only, and a row is often about a page: so the code fetches the start of
// the next row itself.
template <class T>
BLT_INLINE void prefetch_start(const T* row) {
  for (int64_t line = 0; line < 4; ++line) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + line * 64);
  }
}

// acc[0 .. width - 1] = the reduction of `rows` >= 1 rows. acc has room for whole registers.
template <class T, Reduce R>
void reduce_rows(const T* x, int64_t rows, int64_t stride, int64_t width, Acc<T>* acc) {
  using A = Acc<T>;
  prefetch_start(x + stride);
  for_columns<A>(width, [&](int64_t d, int64_t n) { store(acc + d, load_up_to(x + d, n)); });
  for (int64_t r = 1; r < rows; ++r) {
    const T* row = x + r * stride;
    prefetch_start(row + stride);
    for_columns<A>(width,
                   [&](int64_t d, int64_t n) { store(acc + d, combine<R>(load(acc + d), load_up_to(row + d, n))); });
  }
}

template <class T, Reduce R, class Out>
void pool_block(const T* x, int64_t rows, int64_t stride, int64_t width, Out* out) {
  using A = Acc<T>;
  alignas(64) A acc[kBlock], chunk[kBlock];
  const int64_t head = rows - 1;  // the last row goes straight into the result
  if (head > 0) {
    reduce_rows<T, R>(x, min_of(head, kChunk), stride, width, acc);
  }
  for (int64_t r = kChunk; r < head; r += kChunk) {
    reduce_rows<T, R>(x + r * stride, min_of(head - r, kChunk), stride, width, chunk);
    for_columns<A>(width, [&](int64_t d, int64_t) { store(acc + d, combine<R>(load(acc + d), load(chunk + d))); });
  }
  const T* last = x + head * stride;
  prefetch_start(last + stride);  // usually the first row of the next patch
  for_columns<A>(width, [&](int64_t d, int64_t n) {
    Vec<A> v = load_up_to(last + d, n);
    v = head > 0 ? combine<R>(load(acc + d), v) : v;
    store_up_to(out + d, R == Reduce::mean ? v / A(rows) : v, n);
  });
}

template <class T, Reduce R, class Out>
void pool_rows(const T* x, int64_t rows, int64_t width, Out* out) {
  for (int64_t d = 0; d < width; d += kBlock) {
    pool_block<T, R>(x + d, rows, width, min_of(kBlock, width - d), out + d);
  }
}

// The accumulators of the part of a long patch that begins at row `begin`.
template <class A>
BLT_INLINE A* part_of(const PatchPoolArgs& args, const LongPatch& patch, int64_t begin) {
  const int64_t part = patch.first_part + (begin - patch.begin) / kPartRows;
  return static_cast<A*>(args.parts) + part * args.parts_stride;
}

template <class T, Reduce R>
void pool(const PatchPoolArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const PoolItem& item = args.items[i];
    const T* x = static_cast<const T*>(args.x) + item.begin * args.width;
    T* out = static_cast<T*>(args.out) + item.patch * args.width;
    const int64_t rows = item.end - item.begin;
    if (rows == 0) {
      memset(out, 0, size_t(args.width) * sizeof(T));
    } else if (item.long_patch < 0) {
      pool_rows<T, R>(x, rows, args.width, out);
    } else {
      constexpr Reduce kPart = R == Reduce::mean ? Reduce::sum : R;
      pool_rows<T, kPart>(x, rows, args.width, part_of<Acc<T>>(args, args.long_patches[item.long_patch], item.begin));
    }
  }
}

template <class T, Reduce R>
void join(const PatchPoolArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  alignas(64) A acc[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const LongPatch& patch = args.long_patches[i];
    const int64_t rows = patch.end - patch.begin, parts = (rows + kPartRows - 1) / kPartRows;
    for (int64_t block = 0; block < args.width; block += kBlock) {
      const int64_t columns = min_of(kBlock, args.width - block);
      const A* x = part_of<A>(args, patch, patch.begin) + block;
      reduce_rows<A, R>(x, parts, args.parts_stride, columns, acc);
      T* out = static_cast<T*>(args.out) + patch.patch * args.width + block;
      for_columns<A>(columns, [&](int64_t d, int64_t n) {
        const Vec<A> v = load(acc + d);
        store_up_to(out + d, R == Reduce::mean ? v / A(rows) : v, n);
      });
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

// The gradient of a row, as torch.amax has it: a row that equals the result receives the share grad / ties, another row
// receives 0. Where NaN won no row is equal, and every row receives 0 / 0.
template <class V>
BLT_INLINE V share_of(V x, V winner, V share) {
  return x == winner ? share : share * 0;
}

// Writes grad_x of U registers of columns of a patch. n lanes of the last register are in use.
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
      put<Stream>(grad_x + d, Ties ? share_of(load_up_to(x + d, n), winner[u], share[u]) : share[u], n);
    }
  }
}

template <class T, bool Ties, bool Stream>
void spread_by_strips(const T* x, const T* out, const T* grad, T* grad_x, int64_t rows, int64_t stride, Acc<T> divisor,
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

// Counts, for each column, the rows of x that equal the result. `ties` has room for whole registers.
template <class T>
void count_ties(const T* x, const T* out, int64_t rows, int64_t stride, int64_t columns, Acc<T>* ties) {
  using A = Acc<T>;
  for_columns<A>(columns, [&](int64_t d, int64_t) { store(ties + d, Vec<A>{}); });
  for (int64_t r = 0; r < rows; ++r) {
    for_columns<A>(columns, [&](int64_t d, int64_t n) {
      const Vec<A> v = load_up_to(x + r * stride + d, n), winner = load_up_to(out + d, n);
      store(ties + d, load(ties + d) + (v == winner ? splat<A>(1) : Vec<A>{}));
    });
  }
}

// Replaces the counts of ties by what each tied row receives.
template <class T>
void share_among(const T* grad, int64_t columns, Acc<T>* ties) {
  for_columns<Acc<T>>(columns,
                      [&](int64_t d, int64_t n) { store(ties + d, load_up_to(grad + d, n) / load(ties + d)); });
}

template <class T, bool Stream>
void give_shares(const T* x, const T* out, const Acc<T>* share, T* grad_x, int64_t rows, int64_t stride,
                 int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for_columns<Acc<T>>(columns, [&](int64_t d, int64_t n) {
      const int64_t at = r * stride + d;
      put<Stream>(grad_x + at, share_of(load_up_to(x + at, n), load_up_to(out + d, n), load(share + d)), n);
    });
  }
}

// Backward of max and min for a patch of more than kStripRows rows: row after row, in blocks of columns.
template <class T, bool Stream>
void spread_by_rows(const T* x, const T* out, const T* grad, T* grad_x, int64_t rows, int64_t width) {
  alignas(64) Acc<T> share[kBlock];
  for (int64_t block = 0; block < width; block += kBlock) {
    const int64_t columns = min_of(kBlock, width - block);
    count_ties(x + block, out + block, rows, width, columns, share);
    share_among(grad + block, columns, share);
    give_shares<T, Stream>(x + block, out + block, share, grad_x + block, rows, width, columns);
  }
}

template <class T, bool Stream>
void zero_rows(T* out, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    for_columns<Acc<T>>(width, [&](int64_t d, int64_t n) { put<Stream>(out + r * width + d, Vec<Acc<T>>{}, n); });
  }
}

template <class T>
void ties_of_parts(const PatchPoolBackwardArgs& args, int64_t begin, int64_t end) {
  const PatchPoolArgs& f = args.forward;
  for (int64_t i = begin; i < end; ++i) {
    const PoolItem& item = f.items[i];
    if (item.long_patch < 0) {
      continue;
    }
    const T* x = static_cast<const T*>(f.x) + item.begin * f.width;
    const T* out = static_cast<const T*>(f.out) + item.patch * f.width;
    Acc<T>* ties = part_of<Acc<T>>(f, f.long_patches[item.long_patch], item.begin);
    for (int64_t d = 0; d < f.width; d += kBlock) {
      count_ties(x + d, out + d, item.end - item.begin, f.width, min_of(kBlock, f.width - d), ties + d);
    }
  }
}

template <class T>
void shares_of_long(const PatchPoolBackwardArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const PatchPoolArgs& f = args.forward;
  for (int64_t i = begin; i < end; ++i) {
    const LongPatch& patch = f.long_patches[i];
    A* first = part_of<A>(f, patch, patch.begin);
    for (int64_t row = patch.begin + kPartRows; row < patch.end; row += kPartRows) {
      const A* ties = part_of<A>(f, patch, row);
      for_columns<A>(f.width, [&](int64_t d, int64_t) { store(first + d, load(first + d) + load(ties + d)); });
    }
    share_among(static_cast<const T*>(args.grad) + patch.patch * f.width, f.width, first);
  }
}

template <class T, bool Ties, bool Stream>
void spread(const PatchPoolBackwardArgs& args, int64_t begin, int64_t end) {
  const PatchPoolArgs& f = args.forward;
  for (int64_t i = begin; i < end; ++i) {
    const PoolItem& item = f.items[i];
    const int64_t rows = item.end - item.begin, patch = item.patch * f.width;
    T* grad_x = static_cast<T*>(args.grad_x) + item.begin * f.width;
    if (item.patch < 0) {
      zero_rows<T, Stream>(grad_x, rows, f.width);
      continue;
    }
    const LongPatch* long_patch = item.long_patch < 0 ? nullptr : f.long_patches + item.long_patch;
    const T* x = Ties ? static_cast<const T*>(f.x) + item.begin * f.width : nullptr;
    const T* out = Ties ? static_cast<const T*>(f.out) + patch : nullptr;
    const T* grad = static_cast<const T*>(args.grad) + patch;
    if (Ties && long_patch != nullptr) {
      const Acc<T>* share = part_of<Acc<T>>(f, *long_patch, long_patch->begin);
      give_shares<T, Stream>(x, out, share, grad_x, rows, f.width, f.width);
    } else if (Ties && rows > kStripRows) {
      spread_by_rows<T, Stream>(x, out, grad, grad_x, rows, f.width);
    } else {
      const int64_t count = long_patch == nullptr ? rows : long_patch->end - long_patch->begin;
      spread_by_strips<T, Ties, Stream>(x, out, grad, grad_x, rows, f.width,
                                        f.reduce == Reduce::mean ? Acc<T>(count) : Acc<T>(1), f.width);
    }
  }
  if constexpr (Stream) {
    stream_fence();
  }
}

}  // namespace

void patch_pool(const PatchPoolArgs& args, int64_t begin, int64_t end) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    switch (args.reduce) {
      case Reduce::max:
        return pool<T, Reduce::max>(args, begin, end);
      case Reduce::min:
        return pool<T, Reduce::min>(args, begin, end);
      case Reduce::mean:
        return pool<T, Reduce::mean>(args, begin, end);
      case Reduce::sum:
        return pool<T, Reduce::sum>(args, begin, end);
    }
  })
}

void patch_pool_join(const PatchPoolArgs& args, int64_t begin, int64_t end) {
  BLT_DISPATCH_FLOAT(args.dtype, T, {
    switch (args.reduce) {
      case Reduce::max:
        return join<T, Reduce::max>(args, begin, end);
      case Reduce::min:
        return join<T, Reduce::min>(args, begin, end);
      case Reduce::mean:
        return join<T, Reduce::mean>(args, begin, end);
      case Reduce::sum:
        return join<T, Reduce::sum>(args, begin, end);
    }
  })
}

void patch_pool_ties(const PatchPoolBackwardArgs& args, int64_t begin, int64_t end) {
  BLT_DISPATCH_FLOAT(args.forward.dtype, T, { ties_of_parts<T>(args, begin, end); })
}

void patch_pool_shares(const PatchPoolBackwardArgs& args, int64_t begin, int64_t end) {
  BLT_DISPATCH_FLOAT(args.forward.dtype, T, { shares_of_long<T>(args, begin, end); })
}

void patch_pool_backward(const PatchPoolBackwardArgs& args, int64_t begin, int64_t end) {
  const bool ties = args.forward.reduce == Reduce::max || args.forward.reduce == Reduce::min;
  BLT_DISPATCH_FLOAT(args.forward.dtype, T, {
    const auto kernel = ties ? (args.stream ? spread<T, true, true> : spread<T, true, false>)
                             : (args.stream ? spread<T, false, true> : spread<T, false, false>);
    kernel(args, begin, end);
  })
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
