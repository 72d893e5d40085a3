// hash_ngram_embedding on the CPU. Tables exceed every cache, so the forward pass computes the rows of coming positions
// early and prefetches them. The table gradient is written once, row by row, from a sort of (id, position).
#include "cpu/hash_ngram_embedding.h"

#include "common/search.h"
#include "cpu/vec.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

namespace {

// Fetches into the second-level cache. The first is too small for rows that are wanted only after the present ones.
BLT_INLINE void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// ---- ids -----------------------------------------------------------------------------------------------------------

// Calls emit(column, id) for every column of position j, in a sequence that starts at `start`.
template <class Emit>
BLT_INLINE void hash_position(const HashArgs& args, int64_t start, int64_t j, const Emit& emit) {
  for (int q = 0; q < args.num_primes; ++q) {
    const int64_t first = int64_t(q) * args.num_sizes;
    hash_ngrams(
        args, uint64_t(args.primes[q]), start, j, [&](int k) { return args.sizes[k]; },
        [&](int k, int64_t id) { emit(first + args.size_numbers[k], id); });
  }
}

// The first i with values[i] >= x, or n; the values ascend.
BLT_INLINE int64_t first_not_below(const int64_t* values, int64_t n, int64_t x) {
  return partition_point(int64_t(0), n, [&](int64_t i) { return values[i] < x; });
}

// Calls emit(position, column, id) for positions begin .. end - 1.
template <class Emit>
BLT_INLINE void hash_positions(const HashArgs& args, int64_t begin, int64_t end, const Emit& emit) {
  int64_t s = first_not_below(args.bounds, args.num_bounds, begin + 1) - 1;
  for (int64_t j = begin; j < end; ++j) {
    while (args.bounds[s + 1] <= j) {  // the last bound is B * N
      ++s;
    }
    hash_position(args, args.bounds[s], j, [&](int64_t g, int64_t id) { emit(j, g, id); });
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------

// Stores n elements of a row of out.
template <class T>
BLT_INLINE void put(T* to, Vec<Acc<T>> v, int64_t n, bool streaming) {
  if (n < kLanes<Acc<T>>) {
    store_n(to, v, n);
  } else if (streaming) {
    stream(to, v);
  } else {
    store(to, v);
  }
}

// How many columns are summed together: their sums fit in registers, and they are whole cache lines in every dtype.
template <class A>
constexpr int64_t kBlock = 256 / int64_t(sizeof(A));

// Sums `count` table rows for one position, and prefetches the rows `next`, which are wanted soon.
template <class T, class U>
BLT_INLINE void sum_rows(const HashEmbeddingArgs& args, const T* const* rows, const T* const* next, int64_t count,
                         int64_t position) {
  using A = Acc<T>;
  constexpr int64_t kVecs = kBlock<A> / kLanes<A>;
  const U* base = args.base == nullptr ? nullptr : static_cast<const U*>(args.base) + position * args.width;
  U* out = static_cast<U*>(args.out) + position * args.width;
  const bool divide = args.divisor != 1;
  const A divisor = A(args.divisor);
  int64_t d = 0;
  for (; d + kBlock<A> <= args.width; d += kBlock<A>) {
    Vec<A> sum[kVecs];
    for (int64_t v = 0; v < kVecs; ++v) {
      sum[v] = base == nullptr ? Vec<A>{} : load(base + d + v * kLanes<A>);
    }
    for (int64_t g = 0; g < count; ++g) {
      const char* coming = reinterpret_cast<const char*>(next[g] + d);
      for (int64_t line = 0; line < kBlock<A> * int64_t(sizeof(T)); line += 64) {
        prefetch(coming + line);
      }
      for (int64_t v = 0; v < kVecs; ++v) {
        sum[v] = sum[v] + load(rows[g] + d + v * kLanes<A>);
      }
    }
    for (int64_t v = 0; v < kVecs; ++v) {
      put(out + d + v * kLanes<A>, divide ? sum[v] / divisor : sum[v], kLanes<A>, args.streaming);
    }
  }
  for (; d < args.width; d += kLanes<A>) {
    const int64_t n = min_of(kLanes<A>, args.width - d);
    Vec<A> sum = base == nullptr ? Vec<A>{} : load_n(base + d, n);
    for (int64_t g = 0; g < count; ++g) {
      prefetch(next[g] + d);
      sum = sum + load_n(rows[g] + d, n);
    }
    put(out + d, divide ? sum / divisor : sum, n, args.streaming);
  }
}

template <class T, class U>
void embed(const HashEmbeddingArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kBuffer = 2 * kMaxTables;
  const T* rows[kBuffer];
  const int64_t count = args.hash.num_primes * args.hash.num_sizes;
  // How many positions lie between a prefetch and its use: about 16 KB of rows, but at least one position.
  const int64_t position_bytes = max_of(1, count * args.width * int64_t(sizeof(T)));
  const int64_t held = kBuffer / count;
  const int64_t ahead = min_of(max_of(1, 16384 / position_bytes), held / 2);
  const T* table = static_cast<const T*>(args.table);
  for (int64_t j = begin; j < end; j += held - ahead) {
    const int64_t stop = min_of(end, j + held - ahead), known = min_of(end, stop + ahead);
    hash_positions(args.hash, j, known, [&](int64_t position, int64_t g, int64_t id) {
      rows[(position - j) * count + g] = table + (g * args.hash.num_rows + id) * args.table_stride;
    });
    for (int64_t position = j; position < stop; ++position) {
      const int64_t next = min_of(position + ahead, known - 1);
      sum_rows<T, U>(args, rows + (position - j) * count, rows + (next - j) * count, count, position);
    }
  }
  stream_fence();
}

// ---- table gradient ------------------------------------------------------------------------------------------------

// Sorts keys by the bits low_bit .. high_bit - 1. Entries with equal ids keep the order of their positions. The sort is
// our own because the C++ standard library must not be included here, and std::stable_sort compares where this one
// counts.
void radix_sort(uint64_t* keys, uint64_t* scratch, int64_t n, int64_t low_bit, int64_t high_bit) {
  constexpr int64_t kMaxDigitBits = 11;
  const int64_t passes = (high_bit - low_bit + kMaxDigitBits - 1) / kMaxDigitBits;
  uint64_t *from = keys, *to = scratch;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = low_bit + (high_bit - low_bit) * pass / passes;
    const int64_t last = low_bit + (high_bit - low_bit) * (pass + 1) / passes;
    const int64_t digits = int64_t(1) << (last - first);
    int64_t place[1 << kMaxDigitBits];
    memset(place, 0, size_t(digits) * sizeof(int64_t));
    for (int64_t i = 0; i < n; ++i) {
      ++place[int64_t(from[i] >> first) & (digits - 1)];
    }
    int64_t sum = 0;
    for (int64_t digit = 0; digit < digits; ++digit) {
      const int64_t entries = place[digit];
      place[digit] = sum;
      sum += entries;
    }
    for (int64_t i = 0; i < n; ++i) {
      to[place[int64_t(from[i] >> first) & (digits - 1)]++] = from[i];
    }
    uint64_t* const sorted = to;
    to = from;
    from = sorted;
  }
  if (from != keys) {
    memcpy(keys, from, size_t(n) * sizeof(uint64_t));
  }
}

// Calls run(id, first, last) for each id of one column, which the sorted keys first .. last - 1 hold.
template <class Run>
BLT_INLINE void for_each_run(const HashSortArgs& args, const uint64_t* keys, const Run& run) {
  for (int64_t first = 0, last; first < args.num_positions; first = last) {
    const uint64_t id = keys[first] >> args.position_bits;
    for (last = first + 1; last < args.num_positions && keys[last] >> args.position_bits == id; ++last) {
    }
    run(int64_t(id), first, last);
  }
}

template <class T, class U>
void sole_rows(const HashGradArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A divisor = A(args.divisor);
  for (int64_t position = begin; position < end; ++position) {
    const U* grad = static_cast<const U*>(args.grad) + position * args.width;
    for (int64_t g = 0; g < args.tables; ++g) {
      const int64_t row = args.sole_rows[position * args.tables + g];
      if (row < 0) {
        continue;
      }
      T* out = static_cast<T*>(args.out) + row * args.width;
      for (int64_t d = 0; d < args.width; d += kLanes<A>) {
        const int64_t n = min_of(kLanes<A>, args.width - d);
        const Vec<A> v = n == kLanes<A> ? load(grad + d) : load_n(grad + d, n);
        put(out + d, v / divisor, n, args.streaming);
      }
    }
  }
  stream_fence();
}

template <class T, class U>
void shared_rows(const HashGradArgs& args, int64_t num_shared, int64_t begin, int64_t end, int64_t d_begin,
                 int64_t d_end) {
  using A = Acc<T>;
  const int64_t width = d_end - d_begin, num_entries = args.shared_begin[num_shared];
  const auto grad_row = [&](int64_t entry) {
    return static_cast<const U*>(args.grad) + args.shared_positions[entry] * args.width + d_begin;
  };
  const A divisor = A(args.divisor);
  A sum[kSharedTile];
  for (int64_t i = first_not_below(args.shared_begin, num_shared, begin); i < num_shared && args.shared_begin[i] < end;
       ++i) {
    T* out = static_cast<T*>(args.out) + args.shared_rows[i] * args.width + d_begin;
    const int64_t first = args.shared_begin[i], last = args.shared_begin[i + 1] - 1;  // at least two entries
    for (int64_t entry = first; entry <= last; ++entry) {
      const U* grad = grad_row(entry);
      const char* coming = reinterpret_cast<const char*>(grad_row(min_of(entry + 2, num_entries - 1)));
      for (int64_t line = 0; line < width * int64_t(sizeof(U)); line += 64) {
        prefetch(coming + line);
      }
      for (int64_t d = 0; d < width; d += kLanes<A>) {
        const int64_t n = min_of(kLanes<A>, width - d);
        Vec<A> v = n == kLanes<A> ? load(grad + d) : load_n(grad + d, n);
        if (entry != first) {
          v = load(sum + d) + v;
        }
        if (entry != last) {
          store(sum + d, v);
        } else {
          put(out + d, v / divisor, n, args.streaming);
        }
      }
    }
  }
  stream_fence();
}

template <class T>
void unread_rows(const HashGradArgs& args, int64_t num_rows, int64_t begin, int64_t end) {
  T* const out = static_cast<T*>(args.out);
  int64_t done = begin;
  const auto clear_to = [&](int64_t row) {
    memset(out + done * args.width, 0, size_t((row - done) * args.width) * sizeof(T));
  };
  for (int64_t i = first_not_below(args.rows, num_rows, begin); i < num_rows && args.rows[i] < end; ++i) {
    clear_to(args.rows[i]);
    done = args.rows[i] + 1;
  }
  clear_to(end);
}

}  // namespace

void hash_ngram_ids(const HashArgs& args, int64_t* ids, int64_t begin, int64_t end) {
  const int64_t count = args.num_primes * args.num_sizes;
  hash_positions(args, begin, end, [&](int64_t j, int64_t g, int64_t id) { ids[j * count + g] = id; });
}

void hash_ngram_embedding(const HashEmbeddingArgs& args, int64_t begin, int64_t end) {
  BLT_DISPATCH_TABLE(args.table_dtype, args.out_dtype, T, U, return embed<T, U>(args, begin, end))
}

void hash_ngram_keys(const HashSortArgs& args, int64_t begin, int64_t end) {
  hash_positions(args.hash, begin, end, [&](int64_t j, int64_t g, int64_t id) {
    args.keys[g * args.num_positions + j] = uint64_t(id) << args.position_bits | uint64_t(j);
  });
}

void hash_ngram_sort(const HashSortArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.num_positions;
  int64_t id_bits = 0;
  while ((args.hash.num_rows - 1) >> id_bits != 0) {
    ++id_bits;
  }
  for (int64_t g = begin; g < end; ++g) {
    uint64_t* keys = args.keys + g * n;
    radix_sort(keys, args.scratch + g * n, n, args.position_bits, args.position_bits + id_bits);
    HashRowCounts counts{};
    for_each_run(args, keys, [&](int64_t, int64_t first, int64_t last) {
      ++counts.rows;
      if (last - first > 1) {
        ++counts.shared_rows;
        counts.shared_entries += last - first;
      }
    });
    args.counts[g] = counts;
  }
}

void hash_ngram_list_rows(const HashSortArgs& sort, const HashGradArgs& args, const HashRowCounts* before,
                          int64_t begin, int64_t end) {
  const uint64_t position_mask = (uint64_t(1) << sort.position_bits) - 1;
  for (int64_t g = begin; g < end; ++g) {
    const uint64_t* keys = sort.keys + g * sort.num_positions;
    HashRowCounts next = before[g];
    for_each_run(sort, keys, [&](int64_t id, int64_t first, int64_t last) {
      const int64_t row = g * sort.hash.num_rows + id;
      const int64_t out_row = args.dense ? row : next.rows;
      const bool shared = last - first > 1;
      args.rows[next.rows++] = row;
      if (shared) {
        args.shared_begin[next.shared_rows] = next.shared_entries;
        args.shared_rows[next.shared_rows++] = out_row;
      }
      for (int64_t i = first; i < last; ++i) {
        const int64_t position = int64_t(keys[i] & position_mask);
        args.sole_rows[position * args.tables + g] = shared ? -1 : out_row;
        if (shared) {
          args.shared_positions[next.shared_entries++] = position;
        }
      }
    });
  }
}

void hash_ngram_sole_rows(const HashGradArgs& args, int64_t begin, int64_t end) {
  BLT_DISPATCH_TABLE(args.table_dtype, args.grad_dtype, T, U, return sole_rows<T, U>(args, begin, end))
}

void hash_ngram_shared_rows(const HashGradArgs& args, int64_t num_shared, int64_t begin, int64_t end, int64_t d_begin,
                            int64_t d_end) {
  BLT_DISPATCH_TABLE(args.table_dtype, args.grad_dtype, T, U,
                     return shared_rows<T, U>(args, num_shared, begin, end, d_begin, d_end))
}

void hash_ngram_unread_rows(const HashGradArgs& args, int64_t num_rows, int64_t begin, int64_t end) {
  BLT_DISPATCH_FLOAT(args.table_dtype, T, return unread_rows<T>(args, num_rows, begin, end))
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
