// patch_pool and its gradient.
// At least these bytes must move: x once and out once; in backward of max and min x, out, grad and grad_x once, and in
// backward of mean and sum grad and grad_x once.
//
// The work is dealt out in tiles of equally many bytes plus slots, so that neither a patch of 16k bytes nor thousands
// of empty slots fall to one thread. A tile reduces the patches whose slots lie in it, also their bytes beyond its end.
// A patch of more than kPoolTile bytes is long: each tile reduces the bytes of it that lie in the tile, as a part of
// the patch, to `parts`, and a second kernel joins the parts in order. What a tile does depends on the layout alone, so
// results are deterministic.
//
// Blocks do not communicate within a launch: each row of `parts`, each slot and each byte is written by one tile.
#pragma once

#include "common/search.h"
#include "cuda/device.h"
#include "cuda/patch_pool.h"

namespace blt::cuda {

constexpr int kPoolThreads = 256;

struct PoolShape {
  int lanes;       // threads that work on a tile together, each on a pack of columns
  int64_t packs;   // packs of columns in a row
  int64_t chunks;  // chunks of `lanes` packs in a row
  int64_t tiles;   // tiles in a batch row
};

inline PoolShape pool_shape(const PatchPoolArgs& args, int columns_of_a_pack) {
  const int64_t packs = args.width / columns_of_a_pack;
  int64_t lanes = packs < kWarp ? packs : (packs + kWarp - 1) / kWarp * kWarp;
  lanes = lanes < kPoolThreads ? lanes : kPoolThreads;
  return {int(lanes), packs, (packs + lanes - 1) / lanes, pool_tiles(args.num_bytes, args.capacity)};
}

// How many slots of a row come before place `position`. Slots and bytes are counted in one order, in which each slot
// comes just before its bytes: slot c has place begin[c] + c.
__device__ __forceinline__ int64_t slots_before(const int32_t* begin, int64_t capacity, int64_t position) {
  return partition_point(int64_t(0), capacity, [&](int64_t c) { return begin[c] + c < position; });
}

// What one thread works on: a tile and a pack of columns. Threads that are not active have none.
struct PoolTile {
  bool active;
  int64_t index;         // the tile, counted over all batch rows
  int64_t row_tile;      // the first tile of batch row b
  int64_t b, column;     // the batch row; the first column of the pack
  int64_t row0, row1;    // bytes row0 .. row1 - 1 lie in the tile
  int64_t slot0, slot1;  // slots slot0 .. slot1 - 1 lie in the tile
  int64_t num_bytes;
  const int32_t *begin, *end;  // of batch row b

  // The bytes first(c) .. last(c) - 1 of slot c, clamped so that any values stay within the row.
  __device__ __forceinline__ int64_t first(int64_t c) const { return clamp(begin[c]); }
  __device__ __forceinline__ int64_t last(int64_t c) const { return clamp(end[c]); }
  __device__ __forceinline__ int64_t rows(int64_t c) const { return last(c) - first(c); }
  __device__ __forceinline__ int64_t clamp(int64_t i) const { return max_of(int64_t(0), min_of(i, num_bytes)); }
};

template <int N>
__device__ __forceinline__ PoolTile pool_tile(const PatchPoolArgs& args, const PoolShape& shape) {
  const int64_t groups = blockDim.x / shape.lanes;
  const int64_t task = int64_t(blockIdx.x) * groups + threadIdx.x / shape.lanes;
  const int64_t pack = task % shape.chunks * shape.lanes + threadIdx.x % shape.lanes;
  PoolTile t{};
  t.index = task / shape.chunks;
  t.active = t.index < args.batch * shape.tiles && pack < shape.packs;
  if (t.active) {
    t.b = t.index / shape.tiles;
    t.row_tile = t.b * shape.tiles;
    t.column = pack * N;
    t.num_bytes = args.num_bytes;
    t.begin = args.begin + t.b * args.stride;
    t.end = args.end + t.b * args.stride;
    const int64_t first = (t.index - t.row_tile) * kPoolTile;
    const int64_t last = min_of(first + kPoolTile, args.num_bytes + args.capacity);
    t.slot0 = slots_before(t.begin, args.capacity, first);
    t.slot1 = slots_before(t.begin, args.capacity, last);
    t.row0 = first - t.slot0;
    t.row1 = last - t.slot1;
  }
  return t;
}

// parts[tile, which], where which = 0 is the part of a long patch that began in an earlier tile, and 1 that of a long
// patch that begins here.
template <class A>
__device__ __forceinline__ A* part_of(const PatchPoolArgs& args, int64_t tile, int which, int64_t column) {
  return static_cast<A*>(args.parts) + (tile * 2 + which) * args.width + column;
}

// Min is computed as max: min x = -max(-x).
template <class A>
__device__ __forceinline__ A sign_of(Reduce reduce) {
  return reduce == Reduce::min ? A(-1) : A(1);
}

template <bool kExtreme, class A>
__device__ __forceinline__ A identity() {
  return kExtreme ? minus_infinity<A>() : A(0);
}

template <bool kExtreme, class A>
__device__ __forceinline__ A combine(A acc, A v) {
  if constexpr (kExtreme) {
    return v > acc || v != v ? v : acc;  // NaN wins, as in torch.amax
  } else {
    return acc + v;
  }
}

template <class T, int N, bool kExtreme>
__device__ __forceinline__ void reduce_rows(const T* x, int64_t rows, int64_t stride, Acc<T> sign, Acc<T> (&acc)[N]) {
  constexpr int kUnroll = 4;
#pragma unroll
  for (int e = 0; e < N; ++e) acc[e] = identity<kExtreme, Acc<T>>();
  for (int left = int(rows); left > 0; left -= kUnroll) {
    Pack<T, N> v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u < left) v[u] = load_once<N>(x);
      x += stride;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u < left) {
#pragma unroll
        for (int e = 0; e < N; ++e) acc[e] = combine<kExtreme>(acc[e], sign * widen(v[u].data[e]));
      }
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void write(T* p, const Acc<T> (&acc)[N], Acc<T> factor) {
  Pack<T, N> v;
#pragma unroll
  for (int e = 0; e < N; ++e) v.data[e] = narrow<T>(acc[e] * factor);
  store_once<N>(p, v);
}

// Calls body(slot, first row, rows, which) for the parts of long patches that lie in a tile.
template <class Body>
__device__ __forceinline__ void for_each_part(const PoolTile& t, const Body& body) {
  if (t.slot0 > 0 && t.rows(t.slot0 - 1) > kPoolTile) {
    const int64_t c = t.slot0 - 1, last = min_of(t.last(c), t.row1);
    if (t.row0 < last) {
      body(c, t.row0, last - t.row0, 0);
    }
  }
  if (t.slot0 < t.slot1 && t.rows(t.slot1 - 1) > kPoolTile) {
    const int64_t c = t.slot1 - 1;
    body(c, t.first(c), t.row1 - t.first(c), 1);
  }
}

template <class T, int N, bool kExtreme>
__global__ void __launch_bounds__(kPoolThreads, 2) patch_pool_kernel(PatchPoolArgs args, PoolShape shape) {
  using A = Acc<T>;
  const PoolTile t = pool_tile<N>(args, shape);
  if (!t.active) {
    return;
  }
  const T* x = static_cast<const T*>(args.x) + t.b * args.num_bytes * args.width + t.column;
  T* out = static_cast<T*>(args.out) + t.b * args.capacity * args.width + t.column;
  const A sign = sign_of<A>(args.reduce);
  A acc[N];
  for (int64_t c = t.slot0; c < t.slot1; ++c) {
    const int64_t rows = t.rows(c);
    if (rows > kPoolTile) {
      continue;
    }
    reduce_rows<T, N, kExtreme>(x + t.first(c) * args.width, rows, args.width, sign, acc);
    if (rows <= 0) {
#pragma unroll
      for (int e = 0; e < N; ++e) acc[e] = 0;
    }
    write<T, N>(out + c * args.width, acc, rows <= 0 ? A(1) : args.reduce == Reduce::mean ? A(1) / A(rows) : sign);
  }
  for_each_part(t, [&](int64_t, int64_t first, int64_t rows, int which) {
    reduce_rows<T, N, kExtreme>(x + first * args.width, rows, args.width, sign, acc);
    A* part = part_of<A>(args, t.index, which, t.column);
#pragma unroll
    for (int e = 0; e < N; ++e) part[e] = acc[e];
  });
}

// Joins the parts of the long patch c that begins in a tile: the part in this tile and those in the tiles after it.
template <int N, bool kExtreme, class A>
__device__ __forceinline__ void join_parts(const PatchPoolArgs& args, const PoolTile& t, int64_t c, A (&acc)[N]) {
  // The last byte of patch c has place end[c] - 1 + (c + 1) in its row.
  const int64_t last = t.row_tile + (t.last(c) + c) / kPoolTile;
#pragma unroll
  for (int e = 0; e < N; ++e) acc[e] = identity<kExtreme, A>();
  for (int64_t tile = t.index; tile <= last; ++tile) {
    const A* part = part_of<A>(args, tile, tile == t.index ? 1 : 0, t.column);
#pragma unroll
    for (int e = 0; e < N; ++e) acc[e] = combine<kExtreme>(acc[e], part[e]);
  }
}

// The slot of the long patch that begins in the tile, or -1.
__device__ __forceinline__ int64_t long_patch(const PoolTile& t) {
  return t.active && t.slot0 < t.slot1 && t.rows(t.slot1 - 1) > kPoolTile ? t.slot1 - 1 : -1;
}

template <class T, int N, bool kExtreme>
__global__ void __launch_bounds__(kPoolThreads, 2) patch_pool_join_kernel(PatchPoolArgs args, PoolShape shape) {
  using A = Acc<T>;
  const PoolTile t = pool_tile<N>(args, shape);
  const int64_t c = long_patch(t);
  if (c < 0) {
    return;
  }
  A acc[N];
  join_parts<N, kExtreme>(args, t, c, acc);
  write<T, N>(static_cast<T*>(args.out) + (t.b * args.capacity + c) * args.width + t.column, acc,
              args.reduce == Reduce::mean ? A(1) / A(t.rows(c)) : sign_of<A>(args.reduce));
}

// Counts, for each column, the rows that equal the result of the patch.
template <class T, int N>
__device__ __forceinline__ void count_ties(const T* x, int64_t rows, int64_t stride, const Pack<T, N>& winner,
                                           Acc<T> (&ties)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) ties[e] = 0;
#pragma unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    const Pack<T, N> v = load<N>(x + r * stride);
#pragma unroll
    for (int e = 0; e < N; ++e) ties[e] += widen(v.data[e]) == widen(winner.data[e]) ? Acc<T>(1) : Acc<T>(0);
  }
}

// Writes the gradient of rows: those that equal the result receive the share. Where NaN won no row is equal, and 0 / 0
// makes every gradient NaN.
template <class T, int N>
__device__ __forceinline__ void give_shares(const T* x, T* grad_x, int64_t rows, int64_t stride,
                                            const Pack<T, N>& winner, const Acc<T> (&share)[N]) {
#pragma unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    const Pack<T, N> v = load<N>(x + r * stride);
    Pack<T, N> g;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      g.data[e] = narrow<T>(widen(v.data[e]) == widen(winner.data[e]) ? share[e] : share[e] * Acc<T>(0));
    }
    store_once<N>(grad_x + r * stride, g);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads, 2) patch_pool_ties_kernel(PatchPoolBackwardArgs args, PoolShape shape) {
  using A = Acc<T>;
  const PatchPoolArgs& f = args.forward;
  const PoolTile t = pool_tile<N>(f, shape);
  if (!t.active) {
    return;
  }
  const T* x = static_cast<const T*>(f.x) + t.b * f.num_bytes * f.width + t.column;
  const T* out = static_cast<const T*>(f.out) + t.b * f.capacity * f.width + t.column;
  for_each_part(t, [&](int64_t c, int64_t first, int64_t rows, int which) {
    A ties[N];
    count_ties<T, N>(x + first * f.width, rows, f.width, load<N>(out + c * f.width), ties);
    A* part = part_of<A>(f, t.index, which, t.column);
#pragma unroll
    for (int e = 0; e < N; ++e) part[e] = ties[e];
  });
}

// Writes what each winner of a long patch receives to the part where the patch begins.
template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads, 2)
    patch_pool_shares_kernel(PatchPoolBackwardArgs args, PoolShape shape) {
  using A = Acc<T>;
  const PatchPoolArgs& f = args.forward;
  const PoolTile t = pool_tile<N>(f, shape);
  const int64_t c = long_patch(t);
  if (c < 0) {
    return;
  }
  A ties[N];
  join_parts<N, false>(f, t, c, ties);
  const T* grad = static_cast<const T*>(args.grad) + (t.b * f.capacity + c) * f.width + t.column;
  A* part = part_of<A>(f, t.index, 1, t.column);
#pragma unroll
  for (int e = 0; e < N; ++e) part[e] = widen(grad[e]) / ties[e];
}

template <class T, int N, bool kExtreme>
__global__ void __launch_bounds__(kPoolThreads, 2)
    patch_pool_backward_kernel(PatchPoolBackwardArgs args, PoolShape shape) {
  using A = Acc<T>;
  const PatchPoolArgs& f = args.forward;
  const PoolTile t = pool_tile<N>(f, shape);
  if (!t.active) {
    return;
  }
  const T* x = kExtreme ? static_cast<const T*>(f.x) + t.b * f.num_bytes * f.width + t.column : nullptr;
  const T* out = kExtreme ? static_cast<const T*>(f.out) + t.b * f.capacity * f.width + t.column : nullptr;
  const T* grad = static_cast<const T*>(args.grad) + t.b * f.capacity * f.width + t.column;
  T* grad_x = static_cast<T*>(args.grad_x) + t.b * f.num_bytes * f.width + t.column;
  A share[N];
  // Writes rows of one patch, where `share` is what each row (for max and min each winner) receives.
  const auto spread = [&](int64_t c, int64_t first, int64_t rows) {
    if constexpr (kExtreme) {
      give_shares<T, N>(x + first * f.width, grad_x + first * f.width, rows, f.width, load<N>(out + c * f.width),
                        share);
    } else {
      Pack<T, N> g;
#pragma unroll
      for (int e = 0; e < N; ++e) g.data[e] = narrow<T>(share[e]);
#pragma unroll 4
      for (int64_t r = 0; r < rows; ++r) store_once<N>(grad_x + (first + r) * f.width, g);
    }
  };
  const auto load_grad = [&](int64_t c) {
    const Pack<T, N> g = load<N>(grad + c * f.width);
    const A factor = f.reduce == Reduce::mean ? A(1) / A(t.rows(c)) : A(1);
#pragma unroll
    for (int e = 0; e < N; ++e) share[e] = widen(g.data[e]) * factor;
  };
  for (int64_t c = t.slot0; c < t.slot1; ++c) {
    const int64_t rows = t.rows(c);
    if (rows <= 0 || rows > kPoolTile) {
      continue;
    }
    load_grad(c);
    if constexpr (kExtreme) {
      A ties[N];
      count_ties<T, N>(x + t.first(c) * f.width, rows, f.width, load<N>(out + c * f.width), ties);
#pragma unroll
      for (int e = 0; e < N; ++e) share[e] /= ties[e];
    }
    spread(c, t.first(c), rows);
  }
  for_each_part(t, [&](int64_t c, int64_t first, int64_t rows, int) {
    if constexpr (kExtreme) {  // the share lies in the part where the patch begins; slot c has place first(c) + c
      const A* part = part_of<A>(f, t.row_tile + (t.first(c) + c) / kPoolTile, 1, t.column);
#pragma unroll
      for (int e = 0; e < N; ++e) share[e] = part[e];
    } else {
      load_grad(c);
    }
    spread(c, first, rows);
  });
  // Bytes before the first patch and after the last one receive zeros.
  const int64_t head = f.capacity > 0 ? t.first(0) : f.num_bytes, tail = f.capacity > 0 ? t.last(f.capacity - 1) : 0;
  for (int64_t i = t.row0; i < t.row1; ++i) {
    if (i < head || i >= tail) {
      Pack<T, N> zero;
#pragma unroll
      for (int e = 0; e < N; ++e) zero.data[e] = narrow<T>(A(0));
      store_once<N>(grad_x + i * f.width, zero);
    }
  }
}

}  // namespace blt::cuda
