// patch_pool on the CPU: one pass over the bytes of each patch, accumulators in registers.
#include "cpu/patch_pool.h"

#include "cpu/vec.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

namespace {

template <class T, Reduce R>
void pool_patch(const T* x, int64_t rows, int64_t width, T* out) {
  using A = Acc<T>;
  for (int64_t d = 0; d < width; d += kLanes<A>) {
    const int64_t n = min_of(kLanes<A>, width - d);
    const auto row = [&](int64_t r) { return n == kLanes<A> ? load(x + r * width + d) : load_n(x + r * width + d, n); };
    Vec<A> acc = row(0);
    for (int64_t r = 1; r < rows; ++r) {
      const Vec<A> v = row(r);
      if constexpr (R == Reduce::max) {
        acc = (v > acc) | (v != v) ? v : acc;  // NaN wins, as in torch.amax
      } else if constexpr (R == Reduce::min) {
        acc = (v < acc) | (v != v) ? v : acc;
      } else {
        acc = acc + v;
      }
    }
    if constexpr (R == Reduce::mean) {
      acc = acc / A(rows);
    }
    if (n == kLanes<A>) {
      store(out + d, acc);
    } else {
      store_n(out + d, acc, n);
    }
  }
}

template <class T, Reduce R>
void pool(const PatchPoolArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / args.capacity, c = i % args.capacity;
    const int32_t* offsets = args.offsets + b * (args.capacity + 1) + c;
    T* out = static_cast<T*>(args.out) + i * args.width;
    const int64_t rows = offsets[1] - offsets[0];
    if (rows <= 0) {
      memset(out, 0, size_t(args.width) * sizeof(T));
      continue;
    }
    pool_patch<T, R>(static_cast<const T*>(args.x) + (b * args.num_bytes + offsets[0]) * args.width, rows, args.width,
                     out);
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

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
