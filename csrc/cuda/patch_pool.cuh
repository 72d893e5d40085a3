// patch_pool and its gradient.
// At least these bytes must move: x once and out once; in backward of max and min x, out, grad and grad_x once, and in
// backward of mean and sum grad and grad_x once.
//
// The work is dealt out in tiles of equally many bytes plus slots, so that neither a patch of 16k bytes nor thousands
// of empty slots fall to one warp. A warp has one tile and 16 bytes of columns a lane, and takes the patches whose
// slots lie in the tile, also their bytes beyond its end. Narrow rows leave lanes over, so there a warp has several
// tiles.
//
// A patch of more than kPoolTile bytes is long: each tile takes the bytes of it that lie in the tile. What it finds
// goes to `parts`, and the tile notes in `long_slots` which long patches it has met. Later launches read the notes and
// join the parts in order, or leave at once where there are none. What is done depends on the layout alone, so results
// are deterministic.
//
// Blocks do not communicate within a launch: each row of `parts`, each note, each slot and each byte has one writer.
#pragma once

#include "cuda/device.h"
#include "cuda/patch_pool.h"

namespace blt::cuda {

constexpr int kPoolWarps = 8;
constexpr int kPoolThreads = kPoolWarps * kWarp;
constexpr int kPoolBatch = 8;  // rows that a lane loads before it uses the first of them

// ---- columns --------------------------------------------------------------------------------------------------------

// N columns of a row, in the units that the kernels compute with: numbers of the arithmetic type ...
template <class T, int N, bool kPairs = (sizeof(T) == 2 && N > 1)>
struct Columns {
  using Unit = Acc<T>;
  static constexpr int kUnits = N;
  Unit unit[kUnits];

  static __device__ __forceinline__ Unit repeat(Acc<T> x) { return x; }
  static __device__ __forceinline__ Unit max(Unit a, Unit b) { return max_or_nan(a, b); }
  static __device__ __forceinline__ Unit min(Unit a, Unit b) { return min_or_nan(a, b); }
  static __device__ __forceinline__ Unit equal(Unit a, Unit b) { return a == b ? Unit(1) : Unit(0); }
  static __device__ __forceinline__ Unit add(Unit a, Unit b) { return a + b; }
  static __device__ __forceinline__ Unit multiply(Unit a, Unit b) { return a * b; }

  __device__ __forceinline__ Acc<T> column(int e) const { return unit[e]; }
  static __device__ __forceinline__ Columns of(const Acc<T> (&x)[N]) {
    Columns columns;
#pragma unroll
    for (int e = 0; e < N; ++e) columns.unit[e] = x[e];
    return columns;
  }
  static __device__ __forceinline__ Columns unpack(const Pack<T, N>& pack) {
    Columns columns;
#pragma unroll
    for (int e = 0; e < N; ++e) columns.unit[e] = widen(pack.data[e]);
    return columns;
  }
  __device__ __forceinline__ Pack<T, N> pack() const {
    Pack<T, N> pack;
#pragma unroll
    for (int e = 0; e < N; ++e) pack.data[e] = narrow<T>(unit[e]);
    return pack;
  }
};

// ... and pairs of 16-bit elements.
template <class T, int N>
struct Columns<T, N, true> {
  using Unit = uint32_t;
  static constexpr int kUnits = N / 2;
  Unit unit[kUnits];

  static __device__ __forceinline__ Unit repeat(float x) { return pair_of<T>(x, x); }
  static __device__ __forceinline__ Unit max(Unit a, Unit b) { return max_or_nan_pair<T>(a, b); }
  static __device__ __forceinline__ Unit min(Unit a, Unit b) { return min_or_nan_pair<T>(a, b); }
  static __device__ __forceinline__ Unit equal(Unit a, Unit b) { return equal_pair<T>(a, b); }
  static __device__ __forceinline__ Unit add(Unit a, Unit b) { return add_pair<T>(a, b); }
  static __device__ __forceinline__ Unit multiply(Unit a, Unit b) { return multiply_pair<T>(a, b); }

  __device__ __forceinline__ float column(int e) const {
    return e % 2 == 0 ? low_of<T>(unit[e / 2]) : high_of<T>(unit[e / 2]);
  }
  static __device__ __forceinline__ Columns of(const float (&x)[N]) {
    Columns columns;
#pragma unroll
    for (int e = 0; e < N; e += 2) columns.unit[e / 2] = pair_of<T>(x[e], x[e + 1]);
    return columns;
  }
  static __device__ __forceinline__ Columns unpack(const Pack<T, N>& pack) { return bit_cast<Columns>(pack); }
  __device__ __forceinline__ Pack<T, N> pack() const { return bit_cast<Pack<T, N>>(*this); }
};

template <class T, int N>
__device__ __forceinline__ Columns<T, N> load_columns(const T* p) {
  return Columns<T, N>::unpack(load<N>(p));
}
template <class T, int N>
__device__ __forceinline__ Columns<T, N> load_columns_once(const T* p) {
  return Columns<T, N>::unpack(load_once<N>(p));
}
template <class T, int N>
__device__ __forceinline__ void store_columns_once(T* p, const Columns<T, N>& columns) {
  store_once<N>(p, columns.pack());
}

template <class T, int N>
__device__ __forceinline__ Columns<T, N> repeat_columns(Acc<T> x) {
  Columns<T, N> columns;
#pragma unroll
  for (auto& unit : columns.unit) unit = Columns<T, N>::repeat(x);
  return columns;
}

// a = op(a, b), unit by unit.
template <class T, int N, class Op>
__device__ __forceinline__ void update(Columns<T, N>& a, const Columns<T, N>& b, const Op& op) {
#pragma unroll
  for (int i = 0; i < Columns<T, N>::kUnits; ++i) a.unit[i] = op(a.unit[i], b.unit[i]);
}

// The maximum, the minimum or the sum of rows, with NaN where one of them has NaN.
template <class T, int N, Reduce kReduce>
struct Reduction {
  using C = Columns<T, N>;
  C best = repeat_columns<T, N>(kReduce == Reduce::max ? minus_infinity<Acc<T>>() : -minus_infinity<Acc<T>>());

  __device__ __forceinline__ void add(const C& row) { update(best, row, kReduce == Reduce::max ? C::max : C::min); }
  __device__ __forceinline__ Acc<T> column(int e) const { return best.column(e); }
  __device__ __forceinline__ C result(Acc<T>) const { return best; }
};

template <class T, int N>
struct Reduction<T, N, Reduce::sum> {
  using C = Columns<T, N>;
  Acc<T> sum[N] = {};

  __device__ __forceinline__ void add(const C& row) {
#pragma unroll
    for (int e = 0; e < N; ++e) sum[e] += row.column(e);
  }
  __device__ __forceinline__ Acc<T> column(int e) const { return sum[e]; }
  __device__ __forceinline__ C result(Acc<T> factor) const {
    Acc<T> scaled[N];
#pragma unroll
    for (int e = 0; e < N; ++e) scaled[e] = sum[e] * factor;
    return C::of(scaled);
  }
};

// What the sum of that many rows is multiplied with.
template <class T>
__device__ __forceinline__ Acc<T> factor_of(Reduce reduce, int rows) {
  if (reduce != Reduce::mean) {
    return 1;
  }
  // 16-bit results do not show the last bit of the quotient.
  return sizeof(T) == 2 ? Acc<T>(reciprocal_approx(float(rows))) : 1 / Acc<T>(rows);
}

// What each winner of a patch receives. Where NaN won there are none, and it is NaN or infinite.
template <class T>
__device__ __forceinline__ Acc<T> share_of(Acc<T> grad, Acc<T> winners) {
  if constexpr (sizeof(T) == 2) {
    return grad * reciprocal_approx(winners);
  } else {
    return winners == 1 ? grad : grad / winners;  // most patches have one winner, and a division is long
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// No tensor that fits a GPU has 2^32 tiles and chunks: each of them moves 128 bytes or more.
struct PoolShape {
  unsigned log2_lanes;           // of the lanes that work on a tile together, each on a pack of columns
  unsigned packs;                // packs of columns in a row
  unsigned chunks;               // chunks of a row, of as many packs as there are lanes
  unsigned tiles;                // tiles in a batch row
  int64_t row_of_x, row_of_out;  // elements of a batch row of x, of out
};

inline PoolShape pool_shape(const PatchPoolArgs& args, int columns_of_a_pack) {
  PoolShape shape{0,
                  unsigned(args.width / columns_of_a_pack),
                  0,
                  unsigned(pool_tiles(args.num_bytes, args.capacity)),
                  args.num_bytes * args.width,
                  args.capacity * args.width};
  while ((1u << shape.log2_lanes) < min_of(shape.packs, unsigned(kWarp))) ++shape.log2_lanes;
  shape.chunks = (shape.packs + (1u << shape.log2_lanes) - 1) >> shape.log2_lanes;
  return shape;
}

inline int64_t pool_blocks(const PatchPoolArgs& args, const PoolShape& shape) {
  const int64_t tiles_of_a_block = kPoolThreads >> shape.log2_lanes;
  return (args.batch * shape.tiles * shape.chunks + tiles_of_a_block - 1) / tiles_of_a_block;
}

// The bytes first .. last - 1 of a row.
struct PoolRows {
  int first, last;
  __device__ __forceinline__ int count() const { return last - first; }
  __device__ __forceinline__ PoolRows within(int row0, int row1) const {
    return {max_of(first, row0), min_of(last, row1)};
  }
};

// What one thread works on: a tile and a pack of columns. Threads that are not active have none.
//
// Slots and bytes of a row are counted in one order, in which each slot comes just before its bytes: slot c has place
// begin[c] + c, and byte i of patch c has place i + c + 1.
struct PoolTile {
  bool active;
  bool writes_notes;        // this thread writes what the tile notes
  unsigned index;           // the tile, counted over all batch rows
  unsigned b;               // the batch row
  int64_t column;           // the first column of the pack
  unsigned place0, place1;  // places place0 .. place1 - 1 lie in the tile
  unsigned slot0, slot1;    // slots slot0 .. slot1 - 1
  int row0, row1;           // bytes row0 .. row1 - 1
  int num_bytes;
  const int32_t *begin, *end;  // of batch row b

  // The bytes of slot c, clamped so that any values stay within the row.
  __device__ __forceinline__ PoolRows rows(unsigned c) const { return {clamp(begin[c]), clamp(end[c])}; }
  __device__ __forceinline__ int clamp(int i) const { return max_of(0, min_of(i, num_bytes)); }
  // The bytes before place `place`, which c slots come before.
  __device__ __forceinline__ int bytes_before(unsigned place, unsigned c) const {
    return place > c ? int(min_of(place - c, unsigned(num_bytes))) : 0;
  }
};

// How many slots of a row come before place `place`, when the answer is one of low .. low + length. 2^log2_lanes lanes
// search together: in each step they look at equally many slots, and so cut the length by that factor. All lanes of the
// warp must call this, with the same length.
__device__ __forceinline__ unsigned slots_before(const int32_t* begin, unsigned capacity, unsigned low, unsigned length,
                                                 unsigned place, unsigned log2_lanes) {
  const unsigned warp_lane = threadIdx.x % kWarp, lanes = 1u << log2_lanes, lane = warp_lane % lanes;
  const unsigned log2_cut = max_of(log2_lanes, 1u);  // one lane halves the length
#pragma unroll 1
  while (length > 0) {
    const unsigned step = (length + (1u << log2_cut)) >> log2_cut;
    const unsigned slot = low + (lane + 1) * step - 1;
    const bool is_before = slot < capacity && unsigned(begin[slot]) + slot < place;
    const unsigned votes = __ballot_sync(kFullWarp, is_before) >> (warp_lane - lane);
    low += step * unsigned(__popc(lanes == kWarp ? votes : votes & ((1u << lanes) - 1)));
    length = step - 1;
  }
  return low;
}

template <int N>
__device__ __forceinline__ PoolTile pool_tile(const PatchPoolArgs& args, const PoolShape& shape) {
  const unsigned lane = threadIdx.x & ((1u << shape.log2_lanes) - 1);
  const unsigned unit = blockIdx.x * (kPoolThreads >> shape.log2_lanes) + (threadIdx.x >> shape.log2_lanes);
  const unsigned tiles = unsigned(args.batch) * shape.tiles;
  const unsigned tile = unit / shape.chunks, chunk = unit - tile * shape.chunks;
  const unsigned pack = (chunk << shape.log2_lanes) + lane;
  PoolTile t{};
  t.active = tile < tiles && pack < shape.packs;
  t.writes_notes = t.active && pack == 0;
  t.index = min_of(tile, tiles - 1);  // lanes that are not active take part in searches
  t.b = t.index / shape.tiles;
  t.column = int64_t(pack) * N;
  t.num_bytes = int(args.num_bytes);
  t.begin = args.begin + t.b * args.stride;
  t.end = args.end + t.b * args.stride;
  t.place0 = (t.index - t.b * shape.tiles) * unsigned(kPoolTile);
  t.place1 = min_of(t.place0 + unsigned(kPoolTile), unsigned(args.num_bytes) + unsigned(args.capacity));
  return t;
}

// Finds the slots and bytes of the tile. All lanes of the warp must call this.
__device__ __forceinline__ void find_slots(const PatchPoolArgs& args, const PoolShape& shape, PoolTile& t) {
  const unsigned capacity = unsigned(args.capacity);
  t.slot0 = slots_before(t.begin, capacity, 0, capacity, t.place0, shape.log2_lanes);
  t.slot1 = slots_before(t.begin, capacity, t.slot0, unsigned(kPoolTile), t.place1, shape.log2_lanes);
  t.row0 = t.bytes_before(t.place0, t.slot0);
  t.row1 = t.bytes_before(t.place1, t.slot1);
}

// Calls body(rows) for each slot of the tile.
template <class Body>
__device__ __forceinline__ void for_each_patch(const PoolTile& t, const Body& body) {
  const int32_t *begin = t.begin + t.slot0, *end = t.end + t.slot0;
  int left = int(t.slot1 - t.slot0);
  int next_begin = 0, next_end = 0;  // are loaded one patch ahead
  if (left > 0) {
    next_begin = *begin;
    next_end = *end;
  }
#pragma unroll 1
  for (; left > 0; --left) {
    const PoolRows rows{t.clamp(next_begin), t.clamp(next_end)};
    ++begin;
    ++end;
    if (left > 1) {
      next_begin = *begin;
      next_end = *end;
    }
    body(rows);
  }
}

// Calls body(0), then body for as many more of 1 .. 7 as makes up the count of 1 .. 8 rows. The numbers are constants,
// so they may name registers, and rows are loaded together without a test of each.
template <class Body>
__device__ __forceinline__ void for_each_row(int rows, const Body& body) {
  static_assert(kPoolBatch == 8);
  const int more = rows - 1;
  body(0);
  if (more & 4) {
    body(1), body(2), body(3), body(4);
  }
  if (more & 2) {
    body(5), body(6);
  }
  if (more & 1) {
    body(7);
  }
}

// Row `row` of a matrix with `width` columns.
template <class P>
__device__ __forceinline__ P* row_of(P* matrix, unsigned row, int64_t width) {
  return matrix + uint64_t(row) * uint64_t(width);
}

// ---- long patches ---------------------------------------------------------------------------------------------------

// The part of a long patch that lies in a tile: which = 0 where it began in an earlier tile, and 1 where it begins
// here.
template <class A>
__device__ __forceinline__ A* part_of(const PatchPoolArgs& args, int64_t tile, int which, int64_t column) {
  return static_cast<A*>(args.parts) + (tile * 2 + which) * args.width + column;
}

// Calls body(slot, rows, part) for the long patches that a tile meets, with those rows of them that lie in the tile:
// one that began in an earlier tile (which = 0) and one that begins here (which = 1), where there may be no rows. The
// tile notes their slots, or -1, for the launches that follow.
template <class A, class Body>
__device__ __forceinline__ void for_each_long_patch(const PatchPoolArgs& args, const PoolTile& t, const Body& body) {
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const unsigned c = (which == 0 ? t.slot0 : t.slot1) - 1;
    bool is_met = which == 0 ? t.slot0 > 0 : t.slot0 < t.slot1;
    if (is_met) {
      const PoolRows rows = t.rows(c);
      is_met = rows.count() > kPoolTile && (which == 1 || rows.last > t.row0);
      if (is_met) {
        body(c, rows.within(t.row0, t.row1), part_of<A>(args, t.index, which, t.column));
      }
    }
    if (t.writes_notes && args.long_slots != nullptr) {
      args.long_slots[2 * int64_t(t.index) + which] = is_met ? int(c) : -1;
    }
  }
}

// How many columns of a part are read or written in one access, where rows of x have packs of N columns.
template <class A, int N>
constexpr int kPartColumns = N == 1 ? 1 : 16 / int(sizeof(A));

template <class A, int N, class Columns>
__device__ __forceinline__ void write_part(A* part, const Columns& columns) {
  constexpr int M = kPartColumns<A, N>;
#pragma unroll
  for (int first = 0; first < N; first += M) {
    Pack<A, M> pack;
#pragma unroll
    for (int e = 0; e < M; ++e) pack.data[e] = columns.column(first + e);
    store_once<M>(part + first, pack);
  }
}

template <class T, int N>
__device__ __forceinline__ Columns<T, N> read_part(const Acc<T>* part) {
  constexpr int M = kPartColumns<Acc<T>, N>;
  Acc<T> columns[N];
#pragma unroll
  for (int first = 0; first < N; first += M) {
    const Pack<Acc<T>, M> pack = load<M>(part + first);
#pragma unroll
    for (int e = 0; e < M; ++e) columns[first + e] = pack.data[e];
  }
  return Columns<T, N>::of(columns);
}

// Long patches with more parts than this are joined by a whole block, others by a warp each.
constexpr int kPartsOfAWarp = kPoolBatch;

inline int64_t join_blocks(const PatchPoolArgs& args, const PoolShape& shape, int columns_of_a_lane) {
  const int64_t columns = kWarp * columns_of_a_lane;
  return (args.batch * shape.tiles + kWarp - 1) / kWarp * ((args.width + columns - 1) / columns);
}

// Joins the parts of the long patches that begin in 32 tiles, in 32 packs of N columns, and calls
// body(tile, batch row, slot, rows, first column, total). Where no patch is long that is one load a lane.
template <class A, int N, class Op, class Body>
__device__ __forceinline__ void join_parts(const PatchPoolArgs& args, const PoolShape& shape, A identity, const Op& op,
                                           const Body& body) {
  __shared__ Pack<A, N> totals[kPoolWarps][kWarp];
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp);
  const unsigned groups = (unsigned(args.width) + kWarp * N - 1) / (kWarp * N);
  const unsigned tiles = unsigned(args.batch) * shape.tiles, first = blockIdx.x / groups * kWarp;
  const int own = first + lane < tiles ? args.long_slots[2 * (int64_t(first) + lane) + 1] : -1;
  const int64_t column = (int64_t(blockIdx.x % groups) * kWarp + lane) * N;
  const bool active = column < args.width;
  const auto combine = [&](Pack<A, N>& total, const Pack<A, N>& part) {
#pragma unroll
    for (int e = 0; e < N; ++e) total.data[e] = op(total.data[e], part.data[e]);
  };
  int turn = 0;
  for (unsigned found = __ballot_sync(kFullWarp, own >= 0); found != 0; found &= found - 1) {
    const int source = __ffs(int(found)) - 1, c = __shfl_sync(kFullWarp, own, source);
    const unsigned tile = first + unsigned(source), b = tile / shape.tiles;
    const auto clamped = [&](const int32_t* at) {
      return max_of(0, min_of(at[b * args.stride + c], int32_t(args.num_bytes)));
    };
    const PoolRows rows{clamped(args.begin), clamped(args.end)};
    // The last byte has place rows.last - 1 + (c + 1) in its row.
    const int parts = int(b * shape.tiles + unsigned((int64_t(rows.last) + c) / kPoolTile) - tile) + 1;
    const bool is_shared = parts > kPartsOfAWarp;
    const int share = (parts + kPoolWarps - 1) / kPoolWarps;
    const bool is_mine = turn++ % kPoolWarps == warp;
    int part = is_shared ? warp * share : 0;
    const int end = is_shared ? min_of(part + share, parts) : is_mine ? parts : 0;
    Pack<A, N> total;
#pragma unroll
    for (int e = 0; e < N; ++e) total.data[e] = identity;
#pragma unroll 1
    for (; active && part < end; part += kPoolBatch) {
      Pack<A, N> v[kPoolBatch];
      const int batch = min_of(end - part, kPoolBatch);
      int next = part;
      for_each_row(batch, [&](int u) {
        v[u] = load_once<N>(part_of<A>(args, int64_t(tile) + next, next == 0 ? 1 : 0, column));
        ++next;
      });
      for_each_row(batch, [&](int u) { combine(total, v[u]); });
    }
    if (is_shared) {
      totals[warp][lane] = total;
      __syncthreads();
      for (int other = 1; warp == 0 && other < kPoolWarps; ++other) {
        combine(total, totals[other][lane]);
      }
      __syncthreads();
    }
    if (active && (is_shared ? warp == 0 : is_mine)) {
      body(int64_t(tile), int64_t(b), c, rows, column, total.data);
    }
  }
}

// ---- kernels --------------------------------------------------------------------------------------------------------

template <class T, int N, Reduce kReduce>
__global__ void __launch_bounds__(kPoolThreads, 3) patch_pool_kernel(PatchPoolArgs args, PoolShape shape) {
  PoolTile t = pool_tile<N>(args, shape);
  find_slots(args, shape, t);
  if (!t.active) {
    return;
  }
  const T* const x = static_cast<const T*>(args.x) + t.b * shape.row_of_x + t.column;
  for_each_long_patch<Acc<T>>(args, t, [&](unsigned, const PoolRows& rows, Acc<T>* part) {
    Reduction<T, N, kReduce> reduction;
#pragma unroll 4
    for (int row = rows.first; row < rows.last; ++row) {
      reduction.add(load_columns_once<T, N>(row_of(x, unsigned(row), args.width)));
    }
    write_part<Acc<T>, N>(part, reduction);
  });
  T* next_out = row_of(static_cast<T*>(args.out) + t.b * shape.row_of_out + t.column, t.slot0, args.width);
  for_each_patch(t, [&](const PoolRows& rows) {
    T* const out = next_out;
    next_out += args.width;
    if (rows.count() > kPoolTile) {
      return;
    }
    Reduction<T, N, kReduce> reduction;
    const T* row = row_of(x, unsigned(rows.first), args.width);
#pragma unroll 1
    for (int left = rows.count(); left > 0; left -= kPoolBatch) {
      const int batch = min_of(left, kPoolBatch);
      Columns<T, N> v[kPoolBatch];
      for_each_row(batch, [&](int u) {
        v[u] = load_columns_once<T, N>(row);
        row += args.width;
      });
      for_each_row(batch, [&](int u) { reduction.add(v[u]); });
    }
    store_columns_once<T, N>(
        out, rows.count() > 0 ? reduction.result(factor_of<T>(args.reduce, rows.count())) : repeat_columns<T, N>(0));
  });
}

template <class T, int N, Reduce kReduce>
__global__ void __launch_bounds__(kPoolThreads, 3) patch_pool_join_kernel(PatchPoolArgs args, PoolShape shape) {
  using A = Acc<T>;
  constexpr int M = kPartColumns<A, N>;
  const A identity = kReduce == Reduce::sum   ? A(0)
                     : kReduce == Reduce::max ? minus_infinity<A>()
                                              : -minus_infinity<A>();
  const auto op = [](A a, A b) {
    return kReduce == Reduce::sum ? a + b : kReduce == Reduce::max ? max_or_nan(a, b) : min_or_nan(a, b);
  };
  join_parts<A, M>(args, shape, identity, op,
                   [&](int64_t, int64_t b, int c, const PoolRows& rows, int64_t column, const A(&total)[M]) {
                     const A factor = factor_of<T>(args.reduce, rows.count());
                     Pack<T, M> result;
#pragma unroll
                     for (int e = 0; e < M; ++e) result.data[e] = narrow<T>(total[e] * factor);
                     T* const out = static_cast<T*>(args.out) + b * args.capacity * args.width + column;
                     store_once<M>(row_of(out, unsigned(c), args.width), result);
                   });
}

// Gives zeros to the bytes of a tile that lie before the first patch and after the last one.
template <class T, int N>
__device__ __forceinline__ void give_zeros(const PatchPoolArgs& args, const PoolTile& t, T* grad_x) {
  const int capacity = int(args.capacity);
  const int head = capacity > 0 ? t.rows(0).first : t.num_bytes;
  const int tail = capacity > 0 ? t.rows(unsigned(capacity) - 1).last : t.num_bytes;
  const auto fill = [&](int first, int last) {
#pragma unroll 1
    for (; first < last; ++first) {
      store_columns_once<T, N>(row_of(grad_x, unsigned(first), args.width), repeat_columns<T, N>(0));
    }
  };
  fill(t.row0, min_of(t.row1, head));
  fill(max_of(t.row0, tail), t.row1);
}

// Where one thread works in the tensors of a backward.
template <class T>
struct PoolGradients {
  const T *x, *out, *grad;
  T* grad_x;
  int64_t width;

  __device__ __forceinline__ PoolGradients(const PatchPoolBackwardArgs& args, const PoolShape& shape, const PoolTile& t)
      : width(args.forward.width) {
    const int64_t slots = t.b * shape.row_of_out + t.column;
    const int64_t bytes = t.b * shape.row_of_x + t.column;
    x = static_cast<const T*>(args.forward.x) + bytes;
    out = static_cast<const T*>(args.forward.out) + slots;
    grad = static_cast<const T*>(args.grad) + slots;
    grad_x = static_cast<T*>(args.grad_x) + bytes;
  }

  // Counts for each column the rows that equal the winner. The counts of one tile are exact in 16 bits.
  template <int N>
  __device__ __forceinline__ void count(const PoolRows& rows, const Columns<T, N>& winner,
                                        Columns<T, N>& winners) const {
    static_assert(kPoolTile <= 256);
#pragma unroll 4
    for (int row = rows.first; row < rows.last; ++row) {
      Columns<T, N> is_winner = load_columns<T, N>(row_of(x, unsigned(row), width));
      update(is_winner, winner, Columns<T, N>::equal);
      update(winners, is_winner, Columns<T, N>::add);
    }
  }

  // Gives the share to rows that equal the winner, and to others the share times 0, which is NaN where NaN won.
  template <int N>
  __device__ __forceinline__ void give(const PoolRows& rows, const Columns<T, N>& winner,
                                       const Columns<T, N>& share) const {
#pragma unroll 4
    for (int row = rows.first; row < rows.last; ++row) {
      Columns<T, N> is_winner = load_columns_once<T, N>(row_of(x, unsigned(row), width));
      update(is_winner, winner, Columns<T, N>::equal);
      update(is_winner, share, Columns<T, N>::multiply);
      store_columns_once<T, N>(row_of(grad_x, unsigned(row), width), is_winner);
    }
  }
};

template <class T, int N>
__device__ __forceinline__ Columns<T, N> shares_of(const Columns<T, N>& grad, const Columns<T, N>& winners) {
  Acc<T> shares[N];
#pragma unroll
  for (int e = 0; e < N; ++e) shares[e] = share_of<T>(grad.column(e), winners.column(e));
  return Columns<T, N>::of(shares);
}

// The gradient of max and min in short patches and outside of patches. Of long patches it counts the winners.
template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads, 3)
    patch_pool_winners_kernel(PatchPoolBackwardArgs args, PoolShape shape) {
  using C = Columns<T, N>;
  const PatchPoolArgs& f = args.forward;
  PoolTile t = pool_tile<N>(f, shape);
  find_slots(f, shape, t);
  if (!t.active) {
    return;
  }
  const PoolGradients<T> at(args, shape, t);
  give_zeros<T, N>(f, t, at.grad_x);
  for_each_long_patch<Acc<T>>(f, t, [&](unsigned c, const PoolRows& rows, Acc<T>* part) {
    C winners = repeat_columns<T, N>(0);
    at.count(rows, load_columns<T, N>(row_of(at.out, c, at.width)), winners);
    write_part<Acc<T>, N>(part, winners);
  });
  const T *next_out = row_of(at.out, t.slot0, at.width), *next_grad = row_of(at.grad, t.slot0, at.width);
  for_each_patch(t, [&](const PoolRows& rows) {
    const T *const out = next_out, *const grad_out = next_grad;
    next_out += at.width;
    next_grad += at.width;
    if (rows.count() <= 0 || rows.count() > kPoolTile) {
      return;
    }
    const C winner = load_columns_once<T, N>(out), grad = load_columns_once<T, N>(grad_out);
    C winners = repeat_columns<T, N>(0);
    if (rows.count() > kPoolBatch) {
      at.count(rows, winner, winners);
      at.give(rows, winner, shares_of(grad, winners));
      return;
    }
    // The usual patch stays in registers.
    C is_winner[kPoolBatch];
    const T* from = row_of(at.x, unsigned(rows.first), at.width);
    for_each_row(rows.count(), [&](int u) {
      is_winner[u] = load_columns_once<T, N>(from);
      from += at.width;
    });
    for_each_row(rows.count(), [&](int u) {
      update(is_winner[u], winner, C::equal);
      update(winners, is_winner[u], C::add);
    });
    const C share = shares_of(grad, winners);
    T* to = row_of(at.grad_x, unsigned(rows.first), at.width);
    for_each_row(rows.count(), [&](int u) {
      update(is_winner[u], share, C::multiply);
      store_columns_once<T, N>(to, is_winner[u]);
      to += at.width;
    });
  });
}

// Writes what each winner of a long patch receives to the part where the patch begins.
template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads, 3)
    patch_pool_shares_kernel(PatchPoolBackwardArgs args, PoolShape shape) {
  using A = Acc<T>;
  constexpr int M = kPartColumns<A, N>;
  const PatchPoolArgs& f = args.forward;
  join_parts<A, M>(
      f, shape, A(0), [](A a, A b) { return a + b; },
      [&](int64_t tile, int64_t b, int c, const PoolRows&, int64_t column, const A(&winners)[M]) {
        const T* const grad = static_cast<const T*>(args.grad) + b * f.capacity * f.width + column;
        const Pack<T, M> given = load_once<M>(row_of(grad, unsigned(c), f.width));
        Pack<A, M> share;
#pragma unroll
        for (int e = 0; e < M; ++e) share.data[e] = share_of<T>(widen(given.data[e]), winners[e]);
        store_once<M>(part_of<A>(f, tile, 1, column), share);
      });
}

// The gradient of max and min in long patches.
template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads, 3) patch_pool_long_kernel(PatchPoolBackwardArgs args, PoolShape shape) {
  const PatchPoolArgs& f = args.forward;
  const PoolTile t = pool_tile<N>(f, shape);
  if (!t.active) {
    return;
  }
  const PoolGradients<T> at(args, shape, t);
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const int c = f.long_slots[2 * int64_t(t.index) + which];
    if (c < 0) {
      continue;
    }
    const PoolRows rows = t.rows(unsigned(c));
    // Slot c has place rows.first + c, and its share lies in the tile of that place.
    const int64_t tile = t.b * shape.tiles + (int64_t(rows.first) + c) / kPoolTile;
    const Columns<T, N> share = read_part<T, N>(part_of<Acc<T>>(f, tile, 1, t.column));
    at.give(rows.within(t.bytes_before(t.place0, unsigned(c) + 1), t.bytes_before(t.place1, unsigned(c) + 1)),
            load_columns<T, N>(row_of(at.out, unsigned(c), at.width)), share);
  }
}

constexpr int kSpreadSlots = 4;  // slots whose gradients a lane loads before it uses the first of them

// The gradient of mean and sum.
template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads, 3)
    patch_pool_spread_kernel(PatchPoolBackwardArgs args, PoolShape shape) {
  const PatchPoolArgs& f = args.forward;
  PoolTile t = pool_tile<N>(f, shape);
  find_slots(f, shape, t);
  if (!t.active) {
    return;
  }
  const PoolGradients<T> at(args, shape, t);
  give_zeros<T, N>(f, t, at.grad_x);
  // What each row of a patch receives.
  const auto share_of_patch = [&](const Columns<T, N>& grad, int rows) {
    const Acc<T> factor = factor_of<T>(f.reduce, rows);
    Acc<T> scaled[N];
#pragma unroll
    for (int e = 0; e < N; ++e) scaled[e] = grad.column(e) * factor;
    return Columns<T, N>::of(scaled);
  };
  const auto spread = [&](const PoolRows& rows, const Columns<T, N>& share) {
    T* to = row_of(at.grad_x, unsigned(rows.first), at.width);
#pragma unroll 1
    for (int left = rows.count(); left > 0; left -= kPoolBatch) {
      for_each_row(min_of(left, kPoolBatch), [&](int) {
        store_columns_once<T, N>(to, share);
        to += at.width;
      });
    }
  };
  for_each_long_patch<Acc<T>>(f, t, [&](unsigned c, const PoolRows& rows, Acc<T>*) {
    spread(rows, share_of_patch(load_columns<T, N>(row_of(at.grad, c, at.width)), t.rows(c).count()));
  });
  // Gradients are loaded several patches ahead.
  const int32_t *begin = t.begin + t.slot0, *end = t.end + t.slot0;
  const T* from = row_of(at.grad, t.slot0, at.width);
#pragma unroll 1
  for (int left = int(t.slot1 - t.slot0); left > 0; left -= kSpreadSlots) {
    Columns<T, N> grad[kSpreadSlots];
    PoolRows rows[kSpreadSlots];
#pragma unroll
    for (int u = 0; u < kSpreadSlots; ++u) {
      rows[u] = {0, 0};
      if (u < left) {
        rows[u] = {begin[u], end[u]};
        grad[u] = load_columns_once<T, N>(from);
      }
      from += at.width;
    }
    begin += kSpreadSlots;
    end += kSpreadSlots;
#pragma unroll
    for (int u = 0; u < kSpreadSlots; ++u) {
      const PoolRows own{t.clamp(rows[u].first), t.clamp(rows[u].last)};
      if (own.count() > 0 && own.count() <= kPoolTile) {
        spread(own, share_of_patch(grad[u], own.count()));
      }
    }
  }
}

}  // namespace blt::cuda
