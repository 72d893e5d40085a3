// patch_pool on the CPU. Forward reads x once, row after row, as memory likes it: of a page of memory that two threads
// read half each, both pay the cost. Backward of max and min reads x twice, to count ties and to write: where a patch is
// short, strip after strip of columns, so that the second time is from the cache.
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

template <class T, Reduce R, class Out>
void pool_block(const T* x, int64_t rows, int64_t stride, int64_t width, Out* out) {
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

template <class T, Reduce R, class Out>
void pool_rows(const T* x, int64_t rows, int64_t width, Out* out) {
  for (int64_t d = 0; d < width; d += kBlock) {
    pool_block<T, R>(x + d, rows, width, min_of(kBlock, width - d), out + d);
  }
}

// Where the part that begins at row `begin` of a divided patch has its accumulators.
template <class A>
BLT_INLINE A* part_of(const PatchPoolArgs& args, const DividedPatch& divided, int64_t begin) {
  const int64_t part = divided.first_part + (begin - divided.begin) / kPieceRows;
  return static_cast<A*>(args.parts) + part * args.parts_stride;
}

template <class T, Reduce R>
void pool(const PatchPoolArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const PatchPiece& piece = args.pieces[i];
    const T* x = static_cast<const T*>(args.x) + piece.begin * args.width;
    T* out = static_cast<T*>(args.out) + piece.patch * args.width;
    const int64_t rows = piece.end - piece.begin;
    if (rows == 0) {
      memset(out, 0, size_t(args.width) * sizeof(T));
    } else if (piece.divided < 0) {
      pool_rows<T, R>(x, rows, args.width, out);
    } else {
      constexpr Reduce kPart = R == Reduce::mean ? Reduce::sum : R;
      pool_rows<T, kPart>(x, rows, args.width, part_of<Acc<T>>(args, args.divided[piece.divided], piece.begin));
    }
  }
}

template <class T, Reduce R>
void join(const PatchPoolArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  alignas(64) A acc[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const DividedPatch& divided = args.divided[i];
    const int64_t rows = divided.end - divided.begin, parts = (rows + kPieceRows - 1) / kPieceRows;
    for (int64_t block = 0; block < args.width; block += kBlock) {
      const int64_t columns = min_of(kBlock, args.width - block);
      const A* x = part_of<A>(args, divided, divided.begin) + block;
      reduce_rows<A, R>(x, parts, args.parts_stride, columns, acc);
      T* out = static_cast<T*>(args.out) + divided.patch * args.width + block;
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

// The rows of x, in each of the columns, that equal the result. `ties` has room for whole registers.
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

// ties -> what each of them receives.
template <class T>
void share_among(const T* grad, int64_t columns, Acc<T>* ties) {
  for_columns<Acc<T>>(columns, [&](int64_t d, int64_t n) { store(ties + d, load_up_to(grad + d, n) / load(ties + d)); });
}

template <class T, bool Stream>
void give_shares(const T* x, const T* out, const Acc<T>* share, T* grad_x, int64_t rows, int64_t stride,
                 int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for_columns<Acc<T>>(columns, [&](int64_t d, int64_t n) {
      const int64_t at = r * stride + d;
      put<Stream>(grad_x + at, divide(load_up_to(x + at, n), load_up_to(out + d, n), load(share + d)), n);
    });
  }
}

// max and min of a patch of which a strip of columns may fall out of the cache: row after row, in blocks of columns.
template <class T, bool Stream>
void spread_long(const T* x, const T* out, const T* grad, T* grad_x, int64_t rows, int64_t width) {
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
    const PatchPiece& piece = f.pieces[i];
    if (piece.divided < 0) {
      continue;
    }
    const T* x = static_cast<const T*>(f.x) + piece.begin * f.width;
    const T* out = static_cast<const T*>(f.out) + piece.patch * f.width;
    Acc<T>* ties = part_of<Acc<T>>(f, f.divided[piece.divided], piece.begin);
    for (int64_t d = 0; d < f.width; d += kBlock) {
      count_ties(x + d, out + d, piece.end - piece.begin, f.width, min_of(kBlock, f.width - d), ties + d);
    }
  }
}

template <class T>
void shares_of_divided(const PatchPoolBackwardArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const PatchPoolArgs& f = args.forward;
  for (int64_t i = begin; i < end; ++i) {
    const DividedPatch& divided = f.divided[i];
    A* first = part_of<A>(f, divided, divided.begin);
    for (int64_t row = divided.begin + kPieceRows; row < divided.end; row += kPieceRows) {
      const A* ties = part_of<A>(f, divided, row);
      for_columns<A>(f.width, [&](int64_t d, int64_t) { store(first + d, load(first + d) + load(ties + d)); });
    }
    share_among(static_cast<const T*>(args.grad) + divided.patch * f.width, f.width, first);
  }
}

template <class T, bool Ties, bool Stream>
void spread(const PatchPoolBackwardArgs& args, int64_t begin, int64_t end) {
  const PatchPoolArgs& f = args.forward;
  for (int64_t i = begin; i < end; ++i) {
    const PatchPiece& piece = f.pieces[i];
    const int64_t rows = piece.end - piece.begin, patch = piece.patch * f.width;
    T* grad_x = static_cast<T*>(args.grad_x) + piece.begin * f.width;
    if (piece.patch < 0) {
      zero_rows<T, Stream>(grad_x, rows, f.width);
      continue;
    }
    const DividedPatch* divided = piece.divided < 0 ? nullptr : f.divided + piece.divided;
    const T* x = Ties ? static_cast<const T*>(f.x) + piece.begin * f.width : nullptr;
    const T* out = Ties ? static_cast<const T*>(f.out) + patch : nullptr;
    const T* grad = static_cast<const T*>(args.grad) + patch;
    if (Ties && divided != nullptr) {
      give_shares<T, Stream>(x, out, part_of<Acc<T>>(f, *divided, divided->begin), grad_x, rows, f.width, f.width);
    } else if (Ties && rows > kLong) {
      spread_long<T, Stream>(x, out, grad, grad_x, rows, f.width);
    } else {
      const int64_t count = divided == nullptr ? rows : divided->end - divided->begin;
      spread_short<T, Ties, Stream>(x, out, grad, grad_x, rows, f.width,
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
  BLT_DISPATCH_FLOAT(args.forward.dtype, T, { shares_of_divided<T>(args, begin, end); })
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
