// rowwise_adagrad_update on the CPU. A row of the gradient is read twice, the second time from the first-level cache;
// the rows of the table lie far apart, so the coming one is prefetched.
#include "cpu/rowwise_adagrad_update.h"

#include "cpu/vec.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

namespace {

// Calls each(d, n) for the columns d .. d + n - 1 of every register of a row.
template <class A, class Each>
BLT_INLINE void for_each_register(int64_t width, const Each& each) {
  for (int64_t d = 0; d < width; d += kLanes<A>) {
    each(d, min_of(kLanes<A>, width - d));
  }
}

template <class T>
BLT_INLINE Vec<Acc<T>> load_some(const T* p, int64_t n) {
  return n == kLanes<Acc<T>> ? load(p) : load_n(p, n);
}

template <class T>
void update(const RowwiseAdagradArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A scale = A(args.scale), kept = A(1 - args.lr * args.weight_decay);
  T* const table = static_cast<T*>(args.table);
  A* const state = static_cast<A*>(args.state);
  for (int64_t i = begin; i < end; ++i) {
    const T* const value = static_cast<const T*>(args.values) + i * args.width;
    T* const row = table + args.rows[i] * args.width;
    const char* const coming = reinterpret_cast<const char*>(table + args.rows[min_of(i + 1, end - 1)] * args.width);
    for (int64_t line = 0; line < args.width * int64_t(sizeof(T)); line += 64) {
      __builtin_prefetch(coming + line, 1);
    }
    Vec<A> squares{};
    for_each_register<A>(args.width, [&](int64_t d, int64_t n) BLT_INLINE_LAMBDA {
      const Vec<A> g = load_some(value + d, n) * scale;
      squares += g * g;
    });
    A& sum = state[args.rows[i]];
    sum += horizontal_sum<A>(squares) / A(args.width);
    const A factor = scale * A(args.lr) / (A(__builtin_sqrt(sum)) + A(args.eps));
    for_each_register<A>(args.width, [&](int64_t d, int64_t n) BLT_INLINE_LAMBDA {
      const Vec<A> updated = load_some(row + d, n) * kept - load_some(value + d, n) * factor;
      if (n == kLanes<A>) {
        store(row + d, updated);
      } else {
        store_n(row + d, updated, n);
      }
    });
  }
}

}  // namespace

void rowwise_adagrad_update(const RowwiseAdagradArgs& args, int64_t begin, int64_t end) {
  BLT_DISPATCH_FLOAT(args.dtype, T, return update<T>(args, begin, end))
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
