// linear_entropy on the CPU. The matrix products are our own, because the result of a library's may depend on the
// number of rows and threads.
//
// A logit is a dot product of two contiguous rows. A tile of logits shares the loads of its rows, and each logit has
// one register: lane l adds up the elements l, l + L, ... in order, and the lanes are then added in a fixed tree. So
// every logit is computed the same way wherever its row lies.
#include "cpu/linear_entropy.h"

#include "cpu/entropy_row.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

namespace {

// The tiles fill the registers: their sums take 24 of 32 with AVX-512, and 12 of 16 otherwise.
#if defined(__AVX512F__)
constexpr int64_t kDotRows = 6, kProductVectors = 4;
#else
constexpr int64_t kDotRows = 3, kProductVectors = 2;
#endif
constexpr int64_t kProductRows = 6;

using Block = LinearEntropyBlock;
static_assert(Block::rows % kDotRows == 0);

// n elements from p[offset] on as elements of A: those in memory if they are A, otherwise a converted copy in
// `scratch`.
template <class A>
const A* converted(DType dtype, const void* p, int64_t offset, int64_t n, A* scratch) {
  BLT_DISPATCH_FLOAT(dtype, T, {
    const T* source = static_cast<const T*>(p) + offset;
    if constexpr (kSame<T, A>) {
      return source;
    } else if constexpr (kSame<Acc<T>, A>) {
      constexpr int64_t L = kLanes<A>;
      int64_t i = 0;
      for (; i + L <= n; i += L) {
        store(scratch + i, load(source + i));
      }
      store_n(scratch + i, load_n(source + i, n - i), n - i);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        scratch[i] = A(load1(source + i));
      }
    }
  })
  return scratch;
}

// out[i, j] (+)= a[i] . b[j] over n elements.
template <class A, int64_t M, int64_t N>
void dot_tile(const A* const* a, const A* const* b, int64_t n, A* out, int64_t ld, bool accumulate) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> sums[M][N] = {};
  const auto step = [&](auto read) {
    Vec<A> x[M];
    for (int64_t i = 0; i < M; ++i) {
      x[i] = read(a[i]);
    }
    for (int64_t j = 0; j < N; ++j) {
      const Vec<A> y = read(b[j]);
      for (int64_t i = 0; i < M; ++i) {
        sums[i][j] += x[i] * y;
      }
    }
  };
  int64_t k = 0;
  for (; k + L <= n; k += L) {
    step([&](const A* p) { return load(p + k); });
  }
  if (k < n) {
    step([&](const A* p) { return load_n(p + k, n - k); });
  }
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < N; ++j) {
      const A sum = horizontal_sum<A>(sums[i][j]);
      out[i * ld + j] = accumulate ? out[i * ld + j] + sum : sum;
    }
  }
}

template <class A, int64_t N>
void dot_column(const A* const* a, int64_t rows, const A* const* b, int64_t n, A* out, int64_t ld, bool accumulate) {
  int64_t i = 0;
  for (; i + kDotRows <= rows; i += kDotRows) {
    dot_tile<A, kDotRows, N>(a + i, b, n, out + i * ld, ld, accumulate);
  }
  for (; i < rows; ++i) {
    dot_tile<A, 1, N>(a + i, b, n, out + i * ld, ld, accumulate);
  }
}

// Computes the logits [rows, V] of rows begin .. begin + rows - 1, which are at most Block::rows.
template <class A>
void row_logits(const LinearEntropyArgs& args, int64_t begin, int64_t rows, A* logits, A* scratch) {
  const int64_t V = args.vocab, D = args.width;
  A* const weight_scratch = scratch + Block::rows * Block::depth;
  for (int64_t d = 0; d == 0 || d < D; d += Block::depth) {
    const int64_t n = min_of(Block::depth, D - d);
    const A* a[Block::rows];
    for (int64_t i = 0; i < rows; ++i) {
      a[i] = converted(args.hidden_dtype, args.hidden, (begin + i) * D + d, n, scratch + i * Block::depth);
    }
    for (int64_t v = 0; v < V; v += Block::vocab) {
      const int64_t count = min_of(Block::vocab, V - v);
      const A* b[Block::vocab];
      for (int64_t j = 0; j < count; ++j) {
        b[j] = converted(args.weight_dtype, args.weight, (v + j) * D + d, n, weight_scratch + j * Block::depth);
      }
      if (count == Block::vocab) {
        dot_column<A, Block::vocab>(a, rows, b, n, logits + v, V, d > 0);
      } else {
        for (int64_t j = 0; j < count; ++j) {
          dot_column<A, 1>(a, rows, b + j, n, logits + v + j, V, d > 0);
        }
      }
    }
  }
}

template <class A>
void entropies(const LinearEntropyArgs& args, int64_t begin, int64_t end, A* scratch) {
  A* const logits = scratch + (Block::rows + Block::vocab) * Block::depth;
  for (int64_t r = begin; r < end; r += Block::rows) {
    const int64_t rows = min_of(Block::rows, end - r);
    row_logits(args, r, rows, logits, scratch);
    row_entropies(logits, rows, args.vocab, static_cast<A*>(args.out) + r);
  }
}

template <class A>
void logit_gradients(const LinearEntropyArgs& args, int64_t begin, int64_t end, A* scratch) {
  for (int64_t r = begin; r < end; r += Block::rows) {
    const int64_t rows = min_of(Block::rows, end - r);
    A* const logits = static_cast<A*>(args.out) + r * args.vocab;
    row_logits(args, r, rows, logits, scratch);
    for (int64_t i = 0; i < rows; ++i) {
      A* const row = logits + i * args.vocab;
      row_gradient(row, args.vocab, static_cast<const A*>(args.grad)[r + i], row);
    }
  }
}

// out[i, j] (+)= sum_k a[i * row_stride + k * depth_stride] * b[k, j], where b has n rows of kProductVectors registers.
template <class A, int64_t M>
void product_tile(const A* a, int64_t row_stride, int64_t depth_stride, const A* b, int64_t n, A* out, int64_t ld,
                  int64_t columns, bool accumulate) {
  constexpr int64_t L = kLanes<A>, N = kProductVectors;
  Vec<A> sums[M][N] = {};
  for (int64_t k = 0; k < n; ++k) {
    Vec<A> y[N];
    for (int64_t j = 0; j < N; ++j) {
      y[j] = load(b + (k * N + j) * L);
    }
    for (int64_t i = 0; i < M; ++i) {
      const A x = a[i * row_stride + k * depth_stride];
      for (int64_t j = 0; j < N; ++j) {
        sums[i][j] += x * y[j];
      }
    }
  }
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < N; ++j) {
      const int64_t width = min_of(L, columns - j * L);
      A* const p = out + i * ld + j * L;
      if (width > 0) {
        store_n(p, accumulate ? load_n(p, width) + sums[i][j] : sums[i][j], width);
      }
    }
  }
}

template <class A>
void products(const ProductArgs& args, int64_t begin, int64_t end, int64_t first, int64_t last) {
  constexpr int64_t W = kProductVectors * kLanes<A>, kBlock = 128;
  const auto* const a = static_cast<const A*>(args.a);
  const auto* const b = static_cast<const A*>(args.b);
  auto* const out = static_cast<A*>(args.out);
  alignas(64) A panel[kBlock * W];
  for (int64_t c = first; c < last; c += W) {
    const int64_t columns = min_of(W, last - c);
    for (int64_t k = 0; k < args.depth; k += kBlock) {
      const int64_t n = min_of(kBlock, args.depth - k);
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t j = 0; j < W; ++j) {
          panel[row * W + j] = j < columns ? b[(k + row) * args.columns + c + j] : A(0);
        }
      }
      const bool accumulate = args.accumulate || k > 0;
      const auto tile = [&]<int64_t M>(int64_t i) {
        product_tile<A, M>(a + i * args.row_stride + k * args.depth_stride, args.row_stride, args.depth_stride, panel,
                           n, out + i * args.columns + c, args.columns, columns, accumulate);
      };
      int64_t i = begin;
      for (; i + kProductRows <= end; i += kProductRows) {
        tile.template operator()<kProductRows>(i);
      }
      for (; i < end; ++i) {
        tile.template operator()<1>(i);
      }
    }
  }
}

}  // namespace

void linear_entropy(const LinearEntropyArgs& args, int64_t begin, int64_t end, void* scratch) {
  args.dtype == DType::f64 ? entropies(args, begin, end, static_cast<double*>(scratch))
                           : entropies(args, begin, end, static_cast<float*>(scratch));
}

void linear_entropy_logit_gradient(const LinearEntropyArgs& args, int64_t begin, int64_t end, void* scratch) {
  args.dtype == DType::f64 ? logit_gradients(args, begin, end, static_cast<double*>(scratch))
                           : logit_gradients(args, begin, end, static_cast<float*>(scratch));
}

void product(const ProductArgs& args, int64_t begin, int64_t end, int64_t first, int64_t last) {
  args.dtype == DType::f64 ? products<double>(args, begin, end, first, last)
                           : products<float>(args, begin, end, first, last);
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
