// patch_pool and its gradient.
// Floor: x once, out once; backward of max and min: x, out and grad once, grad_x once; of mean and sum: grad and grad_x.
//
// Balance: tiles of equally many bytes plus slots, so that neither a patch of 16k bytes nor thousands of empty slots fall
// to one thread. A tile owns the slots that lie in it, and all bytes of their patches, a few beyond its end; of a patch
// of more than kPoolTile bytes each tile reduces the bytes that lie in it, to `parts`, and a second kernel joins them in
// order. What a tile does depends on the layout alone: results are deterministic.
//
// Blocks do not communicate within a launch: each `parts` row, slot and byte is written by one tile.
#pragma once

#include "common/search.h"
#include "cuda/device.h"
#include "cuda/patch_pool.h"

namespace blt::cuda {

constexpr int kPoolThreads = 256;

// Threads that share a tile, a pack of columns each; how many such groups of columns there are; tiles of a batch row.
struct PoolShape {
  int lanes;
  int64_t packs, chunks, tiles;
};

inline PoolShape pool_shape(const PatchPoolArgs& args, int columns_of_a_pack) {
  const int64_t packs = args.width / columns_of_a_pack;
  int64_t lanes = packs < kWarp ? packs : (packs + kWarp - 1) / kWarp * kWarp;
  lanes = lanes < kPoolThreads ? lanes : kPoolThreads;
  return {int(lanes), packs, (packs + lanes - 1) / lanes, pool_tiles(args.num_bytes, args.capacity)};
}

// The slots of a row that come before item `position` of the merged order, in which slot c is item begin[c] + c.
__device__ __forceinline__ int64_t slots_before(const int32_t* begin, int64_t capacity, int64_t position) {
  return partition_point(int64_t(0), capacity, [&](int64_t c) { return begin[c] + c < position; });
}

// What one thread works on: a tile and a pack of columns. Inactive threads have none.
struct PoolTile {
  bool active;
  int64_t index;       // of the tile, over all rows
  int64_t row_tile;    // of the first tile of row b
  int64_t b, column;   // of the batch; the first of the pack
  int64_t row0, row1;  // bytes that lie in the tile
  int64_t slot0, slot1;
  int64_t num_bytes;
  const int32_t *begin, *end;  // of row b

  // Of slot c; values that are no layout's stay within the row.
  __device__ __forceinline__ int64_t first(int64_t c) const { return clamp(begin[c]); }
  __device__ __forceinline__ int64_t last(int64_t c) const { return clamp(end[c]); }
  __device__ __forceinline__ int64_t rows(int64_t c) const { return last(c) - first(c); }
  __device__ __forceinline__ int64_t clamp(int64_t i) const { return max_of(int64_t(0), min_of(i, num_bytes)); }
};

template <int N>
__device__ __forceinline__ PoolTile pool_tile(const PatchPoolArgs& args, const PoolShape& shape) {
  const int64_t groups = blockDim.x / shape.lanes;
  const int64_t unit = int64_t(blockIdx.x) * groups + threadIdx.x / shape.lanes;
  const int64_t pack = unit % shape.chunks * shape.lanes + threadIdx.x % shape.lanes;
  PoolTile t{};
  t.index = unit / shape.chunks;
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

// parts[tile, which]: 0 for the bytes of a long patch that began in an earlier tile, 1 for one that begins here.
template <class A>
__device__ __forceinline__ A* part_of(const PatchPoolArgs& args, int64_t tile, int which, int64_t column) {
  return static_cast<A*>(args.parts) + (tile * 2 + which) * args.width + column;
}

// Max and min are one: min x = -max(-x).
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

// body(slot, first row, rows, which) for the parts of long patches that lie in a tile.
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

// The parts of the long patch that begins in a tile: its own, and those of the tiles after it.
template <int N, bool kExtreme, class A>
__device__ __forceinline__ void join_parts(const PatchPoolArgs& args, const PoolTile& t, int64_t c, A (&acc)[N]) {
  // The last byte of patch c is item end[c] - 1 + (c + 1) of its row.
  const int64_t last = t.row_tile + (t.last(c) + c) / kPoolTile;
#pragma unroll
  for (int e = 0; e < N; ++e) acc[e] = identity<kExtreme, A>();
  for (int64_t tile = t.index; tile <= last; ++tile) {
    const A* part = part_of<A>(args, tile, tile == t.index ? 1 : 0, t.column);
#pragma unroll
    for (int e = 0; e < N; ++e) acc[e] = combine<kExtreme>(acc[e], part[e]);
  }
}

// Whether a long patch begins in the tile: the slot, or -1.
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

// How often each column of some rows equals the patch's result.
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

// Bytes that won get their share. Where NaN won nothing is equal, and 0 / 0 makes every gradient NaN.
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

// What each winner of a long patch receives, to the part where the patch begins.
template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads, 2) patch_pool_shares_kernel(PatchPoolBackwardArgs args, PoolShape shape) {
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
__global__ void __launch_bounds__(kPoolThreads, 2) patch_pool_backward_kernel(PatchPoolBackwardArgs args, PoolShape shape) {
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
  // Rows of one patch, of which `share` is what each of them (max, min: each winner) receives.
  const auto spread = [&](int64_t c, int64_t first, int64_t rows) {
    if constexpr (kExtreme) {
      give_shares<T, N>(x + first * f.width, grad_x + first * f.width, rows, f.width, load<N>(out + c * f.width), share);
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
    if constexpr (kExtreme) {  // the shares lie where the patch begins: slot c is item first(c) + c of its row
      const A* part = part_of<A>(f, t.row_tile + (t.first(c) + c) / kPoolTile, 1, t.column);
#pragma unroll
      for (int e = 0; e < N; ++e) share[e] = part[e];
    } else {
      load_grad(c);
    }
    spread(c, first, rows);
  });
  // Bytes before the first patch and after the last.
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
