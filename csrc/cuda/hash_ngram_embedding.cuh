// hash_ngram_ids, hash_ngram_embedding and the gradient of its table.
//
// Forward. At least these bytes must move: the tokens once (which is nothing beside the rest), G table rows and a row
// of base for each position, and out once. A block hashes the n-grams of a tile of positions, with a thread for each
// position and prime, and leaves the addresses of their rows in shared memory. Then all threads gather, each for a pack
// of columns of 16 bytes: the loads of up to kInFlight tables and of base are under way at once, and the sum is stored
// once. Tables exceed every cache, but frequent n-grams come from L2: table rows are kept there, base and out are not.
//
// Gradient. At least these bytes must move: a row of grad for each position and table, and each table row that is read
// once; a dense gradient also has the zeros of the other rows. torch sorts the keys before (ops/cuda/sort.h), stably,
// so that the entries of a table row, a run, follow each other in order of position. The sorted entries are cut into
// tiles of kRunTile. A tile, in which each thread has a pack of columns, sums the runs that start in it, also their
// entries beyond its end. A run of more than kRunTile entries is long (padding has such runs, and very frequent
// n-grams): each tile that it reaches sums its own entries as a part of the run into `parts`, and a second kernel joins
// the parts in order. Results are deterministic, because the tile that sums an entry depends on the sorted keys alone.
//
// Blocks do not communicate within a launch: each row of out is written by one tile, and row t of `parts` by tile t.
#pragma once

#include "common/search.h"
#include "cuda/device.h"
#include "cuda/hash_ngram_embedding.h"

namespace blt::cuda {

constexpr int kHashThreads = 256;

// ---- hashes ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t number(const HashArgs& args, int i) {
  return args.numbers != nullptr ? args.numbers[i] : args.few[i];
}

// Where the sequence of position j starts. Whatever the offsets are, it lies in 0 .. j.
template <class Int>
__device__ __forceinline__ int64_t last_not_above(const Int* offsets, int64_t n, int64_t j) {
  const int64_t above = partition_point(int64_t(0), n, [&](int64_t i) { return int64_t(offsets[i]) <= j; });
  return above == 0 ? 0 : max_of(int64_t(0), int64_t(offsets[above - 1]));
}

__device__ __forceinline__ int64_t sequence_start(const HashArgs& args, int64_t j) {
  if (args.offsets64 != nullptr) {
    return last_not_above(args.offsets64, args.num_offsets, j);
  }
  if (args.offsets32 != nullptr) {
    return last_not_above(args.offsets32, args.num_offsets, j);
  }
  return j / args.row_length * args.row_length;
}

// Calls emit(column, id) for every size, with prime number q, at position j.
template <class Emit>
__device__ __forceinline__ void hash_position(const HashArgs& args, int64_t j, int q, const Emit& emit) {
  const int sizes = args.num_sizes;
  hash_ngrams(
      args, uint64_t(number(args, 2 * sizes + q)), sequence_start(args, j), j, [&](int k) { return number(args, k); },
      [&](int k, int64_t id) { emit(q * sizes + int(number(args, sizes + k)), id); });
}

// Calls emit(position - first, column, id) for all columns of `count` positions, which are the work of a block.
template <class Emit>
__device__ __forceinline__ void hash_tile(const HashArgs& args, int64_t first, int count, const Emit& emit) {
  for (int i = int(threadIdx.x); i < count * args.num_primes; i += kHashThreads) {
    const int k = i % count;
    hash_position(args, first + k, i / count, [&](int g, int64_t id) { emit(k, g, id); });
  }
}

struct Numbers {
  int64_t data[kHashThreads];
};

__global__ void __launch_bounds__(kHashThreads) store_numbers_kernel(Numbers numbers, int64_t* out, int count) {
  if (int(threadIdx.x) < count) {
    out[threadIdx.x] = numbers.data[threadIdx.x];
  }
}

// The ids go through shared memory: the G ids of a position are adjacent, but those that a warp computes at a time are
// not.
__global__ void __launch_bounds__(kHashThreads) hash_ngram_ids_kernel(HashArgs args, int64_t* ids, int tile) {
  __shared__ int64_t found[kMaxTables];  // [tile, G]
  const int tables = args.num_primes * args.num_sizes;
  const int64_t first = int64_t(blockIdx.x) * tile;
  const int count = int(min_of(int64_t(tile), args.positions - first));
  hash_tile(args, first, count, [&](int k, int g, int64_t id) { found[k * tables + g] = id; });
  __syncthreads();
  for (int i = int(threadIdx.x); i < count * tables; i += kHashThreads) {
    ids[first * tables + i] = found[i];
  }
}

template <class Key>
__global__ void __launch_bounds__(kHashThreads) hash_ngram_keys_kernel(HashArgs args, Key* keys) {
  const int64_t i = int64_t(blockIdx.x) * kHashThreads + threadIdx.x;
  if (i >= args.positions * args.num_primes) {
    return;
  }
  const int64_t j = i % args.positions;
  hash_position(args, j, int(i / args.positions),
                [&](int g, int64_t id) { keys[g * args.positions + j] = Key(g * args.num_rows + id); });
}

// ---- forward --------------------------------------------------------------------------------------------------------

constexpr int kInFlight = 8;  // table rows that a thread loads before it adds the first of them

template <class T, class U, int N>
__global__ void __launch_bounds__(kHashThreads, 2) hash_ngram_embedding_kernel(HashEmbeddingArgs args, int tile) {
  using A = Acc<T>;
  __shared__ int64_t rows[kMaxTables];  // [tile, G]: first elements of table rows
  const HashArgs& hash = args.hash;
  const int tables = hash.num_primes * hash.num_sizes;
  const int64_t first = int64_t(blockIdx.x) * tile;
  const int count = int(min_of(int64_t(tile), hash.positions - first));
  hash_tile(hash, first, count,
            [&](int k, int g, int64_t id) { rows[k * tables + g] = (g * hash.num_rows + id) * args.table_stride; });
  __syncthreads();

  const T* const table = static_cast<const T*>(args.table);
  const U* const base = static_cast<const U*>(args.base);
  U* const out = static_cast<U*>(args.out);
  const uint32_t packs = uint32_t(args.width / N);
  for (uint32_t i = threadIdx.x; i < uint32_t(count) * packs; i += kHashThreads) {
    const uint32_t k = i / packs;
    const int64_t column = int64_t(i - k * packs) * N;
    const int64_t at = (first + k) * args.width + column;
    const int64_t* const row = rows + int(k) * tables;
    Pack<U, N> from_base;  // without a value where base is null, because a default would wait for what is loaded
    if (base != nullptr) {
      from_base = load_once<N>(base + at);
    }
    A sum[N] = {};
    for (int g = 0; g < tables; g += kInFlight) {
      Pack<T, N> v[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (g + u < tables) v[u] = load<N>(table + row[g + u] + column);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (g + u < tables) {
#pragma unroll
          for (int e = 0; e < N; ++e) sum[e] += widen(v[u].data[e]);
        }
      }
    }
    Pack<U, N> result;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      result.data[e] = narrow<U>((base == nullptr ? sum[e] : sum[e] + widen(from_base.data[e])) * A(args.factor));
    }
    store_once<N>(out + at, result);
  }
}

// ---- runs of equal keys ---------------------------------------------------------------------------------------------

static_assert(kRunTile == kWarp && kRunTile == 32);  // a ballot is the heads of a tile

__device__ __forceinline__ int64_t key_at(const SortedKeys& sorted, int64_t i) {
  return sorted.keys64 != nullptr ? sorted.keys64[i] : int64_t(sorted.keys32[i]);
}

// Marks the entries that start a run, a warp for each tile, and counts them in `counts` unless that is null.
__global__ void __launch_bounds__(kHashThreads)
    hash_ngram_runs_kernel(SortedKeys sorted, const int64_t* places, int64_t num_positions, int32_t* positions,
                           int32_t* counts) {
  const int64_t i = int64_t(blockIdx.x) * kHashThreads + threadIdx.x;
  bool head = false;
  if (i < sorted.entries) {
    positions[i] = int32_t(uint32_t(places[i]) % uint32_t(num_positions));
    head = i == 0 || key_at(sorted, i - 1) != key_at(sorted, i);
  }
  const uint32_t heads = __ballot_sync(kFullWarp, head);
  if (threadIdx.x % kWarp == 0 && i < sorted.entries) {
    sorted.heads[i / kRunTile] = heads;
    if (counts != nullptr) {
      counts[i / kRunTile] = __popc(heads);
    }
  }
}

// The number of the run that starts with entry `head` of a tile, where runs[tile] runs start in this tile or before it.
__device__ __forceinline__ int64_t run_number(const SortedKeys& sorted, const int64_t* runs, int64_t tile, int head) {
  return runs[tile] - __popc(sorted.heads[tile] >> head);
}

// Writes the key of each run to `rows`. num_rows is at least the number of runs and at most that of entries.
__global__ void __launch_bounds__(kHashThreads)
    hash_ngram_rows_kernel(SortedKeys sorted, const int64_t* runs, int64_t* rows, int64_t num_rows) {
  const int64_t i = int64_t(blockIdx.x) * kHashThreads + threadIdx.x;
  if (i >= sorted.entries) {
    return;
  }
  if ((sorted.heads[i / kRunTile] >> (i % kRunTile) & 1u) != 0) {
    rows[run_number(sorted, runs, i / kRunTile, int(i % kRunTile))] = key_at(sorted, i);
  }
  if (i < num_rows && i >= runs[(sorted.entries - 1) / kRunTile]) {
    rows[i] = key_at(sorted, sorted.entries - 1);
  }
}

// Writes zeros to the rows from *count to the last; a row is `accesses` long.
template <class Access>
__global__ void __launch_bounds__(kHashThreads)
    hash_ngram_padding_kernel(const int64_t* count, int64_t num_rows, int64_t accesses, Access* out) {
  const int64_t first = *count * accesses + int64_t(blockIdx.x) * kHashThreads + threadIdx.x;
  for (int64_t i = first; i < num_rows * accesses; i += int64_t(gridDim.x) * kHashThreads) {
    out[i] = Access{};
  }
}

// The entries of a tile.
struct RunTile {
  int64_t first;   // entry
  int count;       // how many entries there are
  uint32_t heads;  // bit i: entry i starts a run
  int lead;        // how many entries lie before the first head; they continue a run of earlier tiles

  __device__ __forceinline__ int last_head() const { return kRunTile - 1 - __clz(int(heads)); }
};

// Tiles beyond the last one are empty.
__device__ __forceinline__ RunTile run_tile(const SortedKeys& sorted, int64_t tile) {
  RunTile t{};
  t.first = tile * kRunTile;
  if (t.first < sorted.entries) {
    t.count = int(min_of(int64_t(kRunTile), sorted.entries - t.first));
    t.heads = sorted.heads[tile];
    t.lead = t.heads == 0 ? t.count : __ffs(int(t.heads)) - 1;
  }
  return t;
}

// Whether the last run that starts in a tile is longer than a tile.
__device__ __forceinline__ bool starts_long_run(const RunTile& t, const RunTile& next) {
  return t.heads != 0 && t.count - t.last_head() + next.lead > kRunTile;
}

// ---- table gradient -------------------------------------------------------------------------------------------------

template <class T, int N>
__device__ __forceinline__ void write_table_row(const HashGradArgs& args, int64_t tile, int head, int64_t column,
                                                const Acc<T> (&sum)[N]) {
  const int64_t row = args.runs != nullptr ? run_number(args.sorted, args.runs, tile, head)
                                           : key_at(args.sorted, tile * kRunTile + head);
  Pack<T, N> v;
#pragma unroll
  for (int e = 0; e < N; ++e) v.data[e] = narrow<T>(sum[e] * Acc<T>(args.factor));
  store_once<N>(static_cast<T*>(args.out) + row * args.width + column, v);
}

// How many blocks of hash_ngram_sum_kernel share a multiprocessor. Four have enough rows in flight. Accumulators in
// fp64 would spill registers then, and so would bf16 before sm_80, which converts in several instructions.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class A>
constexpr int kSumBlocks = 3;
#else
template <class A>
constexpr int kSumBlocks = sizeof(A) == 8 ? 3 : 4;
#endif

// Sums the runs of each tile. A task is a tile and a pack of columns, and each thread has one.
template <class T, class U, int N>
__global__ void __launch_bounds__(kHashThreads, kSumBlocks<Acc<T>>) hash_ngram_sum_kernel(HashGradArgs args) {
  using A = Acc<T>;
  constexpr int kRows = 6;  // loaded together
  const int64_t packs = args.width / N, task = int64_t(blockIdx.x) * kHashThreads + threadIdx.x;
  const int64_t tile = task / packs, column = task % packs * N;
  const RunTile t = run_tile(args.sorted, tile), next = run_tile(args.sorted, tile + 1);
  if (t.count == 0) {
    return;
  }
  // This thread sums entries begin .. end - 1, counted from the first of the tile. The tile in which a long run starts
  // leaves it to the tiles after it, and the first of these sums the entries in the tile before as well.
  bool part = false;
  int begin = t.lead, end = t.count;
  if (tile > 0 && t.lead > 0) {
    const RunTile before = run_tile(args.sorted, tile - 1);
    part = before.heads == 0 || starts_long_run(before, t);
    if (part) {
      begin = before.heads == 0 ? 0 : before.last_head() - kRunTile;
    }
  }
  if (starts_long_run(t, next)) {
    end = t.last_head();
  } else if (t.heads != 0) {
    end += next.lead;
  }

  const U* const grad = static_cast<const U*>(args.grad) + column;
  const int32_t* const positions = args.positions + t.first;
  A sum[N] = {};
  int head = -1;  // the first entry of the run that is being summed; -1: it is a part of a long run
  const auto finish = [&] {
    if (head >= 0) {
      write_table_row<T, N>(args, tile, head, column, sum);
    } else {
      A* const to = static_cast<A*>(args.parts) + tile * args.width + column;
#pragma unroll
      for (int e = 0; e < N; ++e) to[e] = sum[e];
    }
  };
  for (int i = begin; i < end; i += kRows) {
    Pack<U, N> v[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (i + u < end) v[u] = load<N>(grad + int64_t(positions[i + u]) * args.width);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (i + u >= end) {
        continue;
      }
      if (unsigned(i + u) < unsigned(kRunTile) && (t.heads >> (i + u) & 1u) != 0) {
        if (i + u > begin) {
          finish();
        }
        head = i + u;
#pragma unroll
        for (int e = 0; e < N; ++e) sum[e] = 0;
      }
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] += widen(v[u].data[e]);
    }
  }
  if (begin < end) {
    finish();
  }
}

// Adds the parts of tiles begin .. end - 1 to sum.
template <int N, class A>
__device__ __forceinline__ void add_parts(const HashGradArgs& args, int64_t begin, int64_t end, int64_t column,
                                          A (&sum)[N]) {
  constexpr int kRows = 8;
  const A* const parts = static_cast<const A*>(args.parts) + column;
  for (int64_t p = begin; p < end; p += kRows) {
    Pack<A, N> v[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (p + u < end) v[u] = load<N>(parts + (p + u) * args.width);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (p + u < end) {
#pragma unroll
        for (int e = 0; e < N; ++e) sum[e] += v[u].data[e];
      }
    }
  }
}

// The first entry whose key is larger than that of entry i.
__device__ __forceinline__ int64_t end_of_run(const SortedKeys& sorted, int64_t i) {
  const int64_t key = key_at(sorted, i);
  return partition_point(i, sorted.entries, [&](int64_t other) { return key_at(sorted, other) <= key; });
}

// Joins the parts of long runs. A block does kWarp tiles and kWarp packs of columns. A run of few parts goes to one
// warp, and the warps take turns; the parts of a run of many are dealt out to all warps, and their sums are added in
// order.
template <class T, int N>
__global__ void __launch_bounds__(kHashThreads) hash_ngram_join_kernel(HashGradArgs args, int64_t chunks) {
  using A = Acc<T>;
  constexpr int kWarps = kHashThreads / kWarp, kFew = 32;
  __shared__ A sums[kWarps][kWarp][N];
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t first = int64_t(blockIdx.x) / chunks * kWarp;
  const int64_t column = (int64_t(blockIdx.x) % chunks * kWarp + lane) * N;
  const bool active = column < args.width;
  int64_t parts = 0;  // of the long run that starts in tile first + lane; they lie in the tiles after it
  int start = 0;
  {
    const RunTile t = run_tile(args.sorted, first + lane);
    if (starts_long_run(t, run_tile(args.sorted, first + lane + 1))) {
      start = t.last_head();
      parts = (end_of_run(args.sorted, t.first + start) - 1) / kRunTile - (first + lane);
    }
  }
  const unsigned few = __ballot_sync(kFullWarp, parts > 0 && parts <= kFew);
  const unsigned many = __ballot_sync(kFullWarp, parts > kFew);
  int turn = 0;
  for (unsigned left = few; left != 0; left &= left - 1, ++turn) {
    if (turn % kWarps == warp) {
      const int of = __ffs(int(left)) - 1;
      const int64_t tile = first + of, count = __shfl_sync(kFullWarp, parts, of);
      const int head = __shfl_sync(kFullWarp, start, of);
      if (active) {
        A sum[N] = {};
        add_parts<N>(args, tile + 1, tile + 1 + count, column, sum);
        write_table_row<T, N>(args, tile, head, column, sum);
      }
    }
  }
  for (unsigned left = many; left != 0; left &= left - 1) {
    const int of = __ffs(int(left)) - 1;
    const int64_t tile = first + of, count = __shfl_sync(kFullWarp, parts, of);
    const int head = __shfl_sync(kFullWarp, start, of);
    const int64_t per_warp = (count + kWarps - 1) / kWarps, from = min_of(count, warp * per_warp);
    A sum[N] = {};
    if (active) {
      add_parts<N>(args, tile + 1 + from, tile + 1 + min_of(count, from + per_warp), column, sum);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) sums[warp][lane][e] = sum[e];
    __syncthreads();
    if (warp == 0 && active) {
      for (int w = 1; w < kWarps; ++w) {
#pragma unroll
        for (int e = 0; e < N; ++e) sum[e] += sums[w][lane][e];
      }
      write_table_row<T, N>(args, tile, head, column, sum);
    }
    __syncthreads();
  }
}

}  // namespace blt::cuda
