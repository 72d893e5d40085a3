// encoder_cross_attention and decoder_cross_attention, and their gradients.
// Floor: q, k and v once, out and lse once; backward: q, k, v, grad and lse once, the three gradients once.
//
// A group of lanes, 8 elements each, takes one key head of an owner: of a patch or of a byte. It reads each row of the
// other side once for all the queries (keys) that it holds in registers, so that memory is read once but for what other
// groups of the same block find in L1: the K slots of a byte's patch, read by each of its bytes, next to each other.
// - Forward: the owner is what has the queries. All its queries see the same consecutive keys; their softmax is online.
// - Backward with window 1: the owner is a patch, and one walk over its bytes gives all gradients. Sets of lanes share
//   the held rows, two each, as far as a warp goes: each has its own part of the sums.
//   The encoder walks twice, the second time from L1: what p dp sums to must be known first.
// - Otherwise: a pass over the queries (grad_q, and what a softmax is made of), then one over the keys, which walks the
//   queries that see them. It reads everything twice.
// A patch of more than kAttentionTile bytes is divided where a patch is an owner: each tile of bytes holds at most two
// parts of such patches, found by a kernel of its own, and a last kernel joins a patch's parts in order.
//
// Blocks do not communicate within a launch: each row is written by one group. What a group does depends on the layout
// alone: results are deterministic. Lanes of a warp make equally many steps, so that all can take part in shuffles.
//
// Heads of more than 256 elements are shared by several groups, a chunk of columns each: every one of them computes
// whole dot products, and its own columns of the results.
#pragma once

#include "cuda/cross_attention.h"
#include "cuda/device.h"

namespace blt::cuda {

constexpr int kAttentionThreads = 256;
constexpr int kWalkThreads = 128;  // of kernels that hold much: registers are given out in finer steps
constexpr int kColumns = 8;        // consecutive elements of a row that a lane holds

// ---- who does what --------------------------------------------------------------------------------------------------

// How the work is dealt out: `owners` of `pieces` = blocks of held rows * chunks of columns * heads, a group each.
// Either a block of threads has some whole owners, or an owner some blocks.
struct AttentionShape {
  int lanes;  // that share a row: a power of two
  int split;  // such sets of lanes in a group, which share the held rows: a power of two
  int64_t owners;
  int chunks, heads;
  unsigned pieces, pieces_per_block, owners_per_block, blocks_per_owner;
};

struct AttentionUnit {
  bool active;
  int64_t owner, block;
  int chunk, head;
};

__device__ __forceinline__ AttentionUnit attention_unit(const AttentionShape& shape) {
  const unsigned group = threadIdx.x / unsigned(shape.lanes * shape.split), within = group / shape.pieces_per_block;
  const unsigned piece =
      blockIdx.x % shape.blocks_per_owner * shape.pieces_per_block + group % shape.pieces_per_block;
  const unsigned row = piece / unsigned(shape.heads);
  AttentionUnit unit;
  unit.owner = int64_t(blockIdx.x / shape.blocks_per_owner) * shape.owners_per_block + within;
  unit.active = within < shape.owners_per_block && piece < shape.pieces && unit.owner < shape.owners;
  unit.block = shape.chunks == 1 ? row : row / unsigned(shape.chunks);
  unit.chunk = shape.chunks == 1 ? 0 : int(row % unsigned(shape.chunks));
  unit.head = int(piece % unsigned(shape.heads));
  return unit;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// A lane's elements of a row, in words: 16-bit elements do not take a register each.
template <class T>
struct Row {
  static constexpr int kWords = kColumns * int(sizeof(T)) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ Acc<T> operator[](int e) const {
    if constexpr (sizeof(T) == 2) {
      return widen(bit_cast<T>(uint16_t(e % 2 == 0 ? words[e / 2] : words[e / 2] >> 16)));
    } else if constexpr (sizeof(T) == 4) {
      return bit_cast<float>(words[e]);
    } else {
      return bit_cast<double>(uint64_t(words[2 * e + 1]) << 32 | words[2 * e]);
    }
  }
};

// A lane of a group, and how it reads and writes rows. kPlain: 16 bytes at a time, in one chunk.
template <class T, bool kPlain>
struct Lane {
  using A = Acc<T>;
  static constexpr int kN = 16 / int(sizeof(T));
  int width, lanes, chunks, chunk, lane;

  __device__ __forceinline__ Lane(const CrossAttentionArgs& args, const AttentionShape& shape, int chunk)
      : width(int(args.width)),
        lanes(shape.lanes),
        chunks(shape.chunks),
        chunk(chunk),
        lane(int(threadIdx.x) & (shape.lanes - 1)) {}

  __device__ __forceinline__ bool leads() const { return lane == 0 && chunk == 0; }
  __device__ __forceinline__ int column(int of_chunk) const { return (of_chunk * lanes + lane) * kColumns; }

  // Zeros unless `valid`.
  __device__ __forceinline__ Row<T> load(const T* row, bool valid) const { return load_chunk(row, chunk, valid); }
  __device__ __forceinline__ Row<T> load_chunk(const T* row, int of_chunk, bool valid) const {
    Row<T> x{};
    const int first = column(kPlain ? 0 : of_chunk);
    if constexpr (kPlain) {
#pragma unroll
      for (int p = 0; p < kColumns / kN; ++p) {
        if (valid && first + p * kN < width) {
          const uint4 words = __ldg(reinterpret_cast<const uint4*>(row + first) + p);
          x.words[4 * p] = words.x, x.words[4 * p + 1] = words.y;
          x.words[4 * p + 2] = words.z, x.words[4 * p + 3] = words.w;
        }
      }
    } else {
      T elements[kColumns] = {};
      for (int e = 0; e < kColumns; ++e) {
        if (valid && first + e < width) elements[e] = row[first + e];
      }
      memcpy(x.words, elements, sizeof(elements));
    }
    return x;
  }

  __device__ __forceinline__ void store(T* row, const A (&x)[kColumns]) const {
    const int first = column(kPlain ? 0 : chunk);
    if constexpr (kPlain) {
#pragma unroll
      for (int p = 0; p < kColumns / kN; ++p) {
        Pack<T, kN> pack;
#pragma unroll
        for (int e = 0; e < kN; ++e) pack.data[e] = narrow<T>(x[p * kN + e]);
        if (first + p * kN < width) store_once<kN>(row + first + p * kN, pack);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kColumns; ++e) {
        if (first + e < width) row[first + e] = narrow<T>(x[e]);
      }
    }
  }

  // The dot product of two rows, of which x and y are this lane's elements. The same in all lanes of the group.
  __device__ __forceinline__ A dot(const Row<T>& x, const T* x_row, const Row<T>& y, const T* y_row, bool valid) const {
    A sum = 0;
#pragma unroll
    for (int e = 0; e < kColumns; ++e) sum += x[e] * y[e];
    if constexpr (!kPlain) {
      for (int other = 0; other < chunks; ++other) {
        if (other != chunk) {
          const Row<T> a = load_chunk(x_row, other, valid), b = load_chunk(y_row, other, valid);
#pragma unroll
          for (int e = 0; e < kColumns; ++e) sum += a[e] * b[e];
        }
      }
    }
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      if (distance < lanes) sum += __shfl_xor_sync(kFullWarp, sum, distance);
    }
    return sum;
  }

  // `parts` are accumulators: this lane's elements of a row of them.
  __device__ __forceinline__ void store_part(A* row, const A (&x)[kColumns]) const {
    const int first = column(chunk);
#pragma unroll
    for (int e = 0; e < kColumns; ++e) {
      if (first + e < width) row[first + e] = x[e];
    }
  }
  // acc += factor * row
  __device__ __forceinline__ void add_part(const A* row, A factor, A (&acc)[kColumns]) const {
    const int first = column(chunk);
#pragma unroll
    for (int e = 0; e < kColumns; ++e) {
      if (first + e < width) acc[e] += factor * row[first + e];
    }
  }
};

// acc += factor * x
template <class T>
__device__ __forceinline__ void add_scaled(Acc<T> factor, const Row<T>& x, Acc<T> (&acc)[kColumns]) {
#pragma unroll
  for (int e = 0; e < kColumns; ++e) acc[e] += factor * x[e];
}

// Rows that are loaded before the first of them is used. Patches are short, and what lies beyond their end is computed
// for nothing.
template <class T>
constexpr int kAhead = sizeof(T) == 8 ? 1 : 2;

// Threads of a block, and blocks on a multiprocessor, which limits registers, of kernels that hold so many rows.
constexpr int attention_threads(int rows) { return rows > 2 ? kWalkThreads : kAttentionThreads; }
template <class T>
constexpr int attention_blocks(int rows) {
  return rows > 2 ? 3 : sizeof(T) == 8 ? 1 : 2;
}

// ---- layout: values that are no layout's stay within the tensors ----------------------------------------------------

__device__ __forceinline__ int64_t clamp_to(int64_t x, int64_t limit) { return max_of(int64_t(0), min_of(x, limit)); }

// Positions of the sorted `values` that are at most x.
__device__ __forceinline__ int64_t count_up_to(const int32_t* values, int64_t count, int64_t x) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] <= x) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Rows begin .. end - 1 of the other side; `part` of the parts to write, -1 where there is only one.
struct AttentionWork {
  int64_t owner = -1;  // b * C + patch, or b * N + byte; -1: nothing to do
  int64_t begin = 0, end = 0, part = -1;
  __device__ __forceinline__ int count() const { return end > begin ? int(end - begin) : 0; }
};

struct Layout {
  const CrossAttentionArgs& args;

  __device__ __forceinline__ int64_t begin(int64_t b, int64_t c) const {
    return clamp_to(args.begin[b * args.stride + c], args.num_bytes);
  }
  __device__ __forceinline__ int64_t end(int64_t b, int64_t c) const {
    return clamp_to(args.end[b * args.stride + c], args.num_bytes);
  }
  // The patch whose bytes include byte i, or an id that is none.
  __device__ __forceinline__ int64_t patch_of(int64_t b, int64_t i) const {
    return args.encoder ? count_up_to(args.begin + b * args.stride, args.capacity + 1, i) - 1
                        : min_of(int64_t(args.ids[b * args.num_bytes + i]), args.capacity - 1);
  }

  // Slots first_seen(p) .. p are visible from slot p, and slot p from p .. last_seer(p) - 1.
  __device__ __forceinline__ int64_t first_seen(int64_t p) const {
    if (args.window == 1) return p;
    int64_t start = 0;
    if (args.sequences > 0) {
      const int64_t n = count_up_to(args.cu_patches, args.sequences + 1, p);
      start = n > 0 ? clamp_to(args.cu_patches[n - 1], p) : 0;
    }
    return max_of(start, p - args.window + 1);
  }
  __device__ __forceinline__ int64_t last_seer(int64_t p) const {
    if (args.window == 1) return p + 1;
    int64_t stop = args.capacity;
    if (args.sequences > 0) {
      const int64_t n = count_up_to(args.cu_patches, args.sequences + 1, p);
      stop = n <= args.sequences ? min_of(int64_t(args.cu_patches[n]), args.capacity) : args.capacity;
    }
    return min_of(stop, p + args.window);
  }

  // Of a query: the patch's, or the byte's. The keys that it sees.
  __device__ __forceinline__ AttentionWork keys_of(int64_t owner) const {
    AttentionWork work;
    work.owner = owner;
    if (args.encoder) {
      const int64_t b = owner / args.capacity, p = owner % args.capacity;
      if (begin(b, p) < end(b, p)) {
        work.begin = b * args.num_bytes + begin(b, first_seen(p));
        work.end = b * args.num_bytes + end(b, p);
      }
    } else {
      const int64_t b = owner / args.num_bytes, id = min_of(int64_t(args.ids[owner]), args.capacity - 1);
      if (id >= 0) {
        work.begin = (b * args.capacity + first_seen(id)) * args.slots;
        work.end = (b * args.capacity + id + 1) * args.slots;
      }
    }
    return work;
  }

  // Of a key: the byte's, or the patch's. The queries that see it, and maybe some that see nothing.
  __device__ __forceinline__ AttentionWork queries_of(int64_t owner) const {
    AttentionWork work;
    work.owner = owner;
    if (args.encoder) {
      const int64_t b = owner / args.num_bytes, p = patch_of(b, owner % args.num_bytes);
      if (p >= 0 && p < args.capacity) {
        work.begin = (b * args.capacity + p) * args.slots;
        work.end = (b * args.capacity + last_seer(p)) * args.slots;
      }
    } else {
      const int64_t b = owner / args.capacity, p = owner % args.capacity;
      int64_t last = last_seer(p);
      while (last > p + 1 && begin(b, last - 1) >= end(b, last - 1)) --last;
      work.begin = b * args.num_bytes + begin(b, p);
      work.end = b * args.num_bytes + end(b, last - 1);
    }
    return work;
  }

  __device__ __forceinline__ int64_t tiles() const { return (args.num_bytes + kAttentionTile - 1) / kAttentionTile; }

  // The patch of work item `index`, of which the first `parts` are the parts of long patches. Bytes of a patch: encoder
  // keys, decoder queries.
  __device__ __forceinline__ AttentionWork bytes_of(int64_t index, int64_t parts) const {
    AttentionWork work;
    if (index >= parts) {
      const int64_t patch = index - parts, b = patch / args.capacity, c = patch % args.capacity;
      if (parts == 0 || end(b, c) - begin(b, c) <= kAttentionTile) {
        work = {patch, b * args.num_bytes + begin(b, c), b * args.num_bytes + end(b, c), -1};
      }
      return work;
    }
    const int64_t c = args.long_patches[index], b = index / 2 / tiles(), first = index / 2 % tiles() * kAttentionTile;
    if (c >= 0) {
      work = {b * args.capacity + c, b * args.num_bytes + max_of(begin(b, c), first),
              b * args.num_bytes + min_of(end(b, c), first + kAttentionTile), index};
    }
    return work;
  }
  // The long patch of which this is a part, or -1.
  __device__ __forceinline__ int64_t long_patch(int64_t index) const {
    const bool begins_here = index % 2 == 1;
    const int64_t b = index / 2 / tiles(), first = index / 2 % tiles() * kAttentionTile;
    const int64_t c = patch_of(b, begins_here ? min_of(first + kAttentionTile, args.num_bytes) - 1 : first);
    const bool is_long = c >= 0 && c < args.capacity && end(b, c) - begin(b, c) > kAttentionTile;
    return is_long && begins_here == (begin(b, c) >= first) ? c : -1;
  }

  // All parts of a long patch: of the tiles begin .. end - 1, counted over all rows.
  __device__ __forceinline__ AttentionWork parts_of(int64_t patch) const {
    AttentionWork work;
    const int64_t b = patch / args.capacity, c = patch % args.capacity;
    work.owner = patch;
    work.begin = b * tiles() + begin(b, c) / kAttentionTile;
    work.end = b * tiles() + (end(b, c) - 1) / kAttentionTile + 1;
    return work;
  }
  // Those of the long patch that begins in a tile.
  __device__ __forceinline__ AttentionWork parts_from(int64_t tile) const {
    const AttentionWork part = bytes_of(tile * 2 + 1, tile * 2 + 2);
    return part.owner < 0 ? part : parts_of(part.owner);
  }
  // Of parts_of, the one in a tile.
  static __device__ __forceinline__ int64_t part_in(const AttentionWork& parts, int64_t tile) {
    return tile * 2 + (tile == parts.begin ? 1 : 0);
  }
};

// Number j of the queries that an owner has for a key head: an index of [query rows * H], or -1.
__device__ __forceinline__ int64_t query_of(const CrossAttentionArgs& args, int64_t owner, int head, int64_t j) {
  const int64_t rows = args.encoder ? args.slots : 1;
  if (args.heads == args.kv_heads) {  // no divisions
    return owner >= 0 && j < rows ? (owner * rows + j) * args.heads + head : -1;
  }
  const int64_t shared = args.heads / args.kv_heads;
  return owner >= 0 && j < rows * shared ? (owner * rows + j / shared) * args.heads + head * shared + j % shared : -1;
}

// Row of slot s of a patch in the parts.
template <class A>
__device__ __forceinline__ A* part_row(const CrossAttentionArgs& args, int64_t part, int64_t slot_and_head,
                                       int64_t heads, int64_t numbers) {
  return static_cast<A*>(args.parts) + (part * args.slots * heads + slot_and_head) * numbers;
}
// Of a query of a patch.
template <class A>
__device__ __forceinline__ A* query_part(const CrossAttentionArgs& args, int64_t part, int64_t patch, int64_t query) {
  return part_row<A>(args, part, query - patch * args.slots * args.heads, args.heads, args.width + 2);
}

// A thread for each part: those of no patch are most, and must cost little.
__global__ void __launch_bounds__(kAttentionThreads)
    attention_long_kernel(CrossAttentionArgs args, int64_t parts) {
  const int64_t index = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (index < parts) {
    args.long_patches[index] = int32_t(Layout{args}.long_patch(index));
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// A softmax so far, about its largest score.
template <class A>
struct OnlineSoftmax {
  A top = minus_infinity<A>(), sum = 0;
  A acc[kColumns] = {};

  // Makes room for scores of at most `score`, and keeps NaN out of `top`: it will be in `sum`.
  __device__ __forceinline__ void raise(A score) {
    if (score > top) {
      const A factor = exp_of(top - score);
      top = score;
      sum *= factor;
#pragma unroll
      for (int e = 0; e < kColumns; ++e) acc[e] *= factor;
    }
  }
  __device__ __forceinline__ A weight(A score) const {
    return score == minus_infinity<A>() ? A(0) : exp_of(score - top);
  }
};

// A softmax whose sum is 0 saw nothing but -inf, or, unless `seen`, nothing.
template <class T, bool kPlain>
__device__ __forceinline__ void finish(const CrossAttentionArgs& args, const Lane<T, kPlain>& lane, int64_t query,
                                       bool seen, OnlineSoftmax<Acc<T>>& softmax) {
  using A = Acc<T>;
  const A inverse = seen ? A(1) / softmax.sum : A(0);
#pragma unroll
  for (int e = 0; e < kColumns; ++e) softmax.acc[e] *= inverse;
  lane.store(static_cast<T*>(args.out) + query * args.width, softmax.acc);
  if (lane.leads()) {
    const A lse = softmax.sum != 0 ? softmax.top + log_of(softmax.sum) : inverse * A(0) + minus_infinity<A>();
    static_cast<A*>(args.lse)[query] = lse;
  }
}

// Owners: the encoder's patches with window 1, after the parts of long ones, otherwise what has the queries.
template <class T, int Q, bool kPlain>
__global__ void __launch_bounds__(attention_threads(Q), attention_blocks<T>(Q))
    attention_kernel(CrossAttentionArgs args, AttentionShape shape, int64_t parts) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, kPlain> lane(args, shape, unit.chunk);
  const Layout layout{args};
  AttentionWork work;
  if (unit.active) {
    work = args.encoder && args.window == 1 ? layout.bytes_of(unit.owner, parts) : layout.keys_of(unit.owner);
  }
  const int count = work.count(), steps = warp_max(count);
  const A scale = A(args.scale);
  const T* queries = static_cast<const T*>(args.q);
  const int64_t stride = args.kv_heads * args.width, first = work.begin * stride + unit.head * args.width;
  const T *keys = static_cast<const T*>(args.k) + first, *values = static_cast<const T*>(args.v) + first;
  int64_t query[Q];
  Row<T> q[Q];
  OnlineSoftmax<A> softmax[Q];
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    query[t] = query_of(args, work.owner, unit.head, unit.block * Q + t);
    q[t] = lane.load(queries + query[t] * args.width, query[t] >= 0);
  }
  for (int i = 0; i < steps; i += U) {
    Row<T> k[U], v[U];
#pragma unroll
    for (int u = 0; u < U; ++u) k[u] = lane.load(keys + (i + u) * stride, i + u < count);
#pragma unroll
    for (int u = 0; u < U; ++u) v[u] = lane.load(values + (i + u) * stride, i + u < count);
#pragma unroll
    for (int t = 0; t < Q; ++t) {
      A score[U], top = minus_infinity<A>();
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const bool valid = i + u < count;
        const T *q_row = queries + query[t] * args.width, *k_row = keys + (i + u) * stride;
        score[u] = lane.dot(q[t], q_row, k[u], k_row, valid && query[t] >= 0);
        score[u] = valid ? score[u] * scale : minus_infinity<A>();
        top = score[u] > top ? score[u] : top;
      }
      softmax[t].raise(top);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const A weight = softmax[t].weight(score[u]);
        softmax[t].sum += weight;
        add_scaled<T>(weight, v[u], softmax[t].acc);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    if (query[t] < 0) {
      continue;
    }
    if (work.part >= 0) {
      A* part = query_part<A>(args, work.part, work.owner, query[t]);
      lane.store_part(part, softmax[t].acc);
      if (lane.leads()) part[args.width] = softmax[t].top, part[args.width + 1] = softmax[t].sum;
    } else {
      finish(args, lane, query[t], count > 0, softmax[t]);
    }
  }
}

// The decoder with window 1. Owners: kByteTile consecutive bytes; the keys that they see stay in registers from byte to
// byte of a patch.
constexpr int kByteTile = 8;

template <class T, int K>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_decoder_kernel(CrossAttentionArgs args, AttentionShape shape) {
  using A = Acc<T>;
  constexpr int U = sizeof(T) == 2 ? 4 : 2;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, true> lane(args, shape, 0);
  const int64_t begin = unit.owner * kByteTile;
  const int count = unit.active ? int(min_of(int64_t(kByteTile), args.batch * args.num_bytes - begin)) : 0;
  const int slots = int(args.slots), shared = int(args.heads / args.kv_heads);
  const A scale = A(args.scale);
  const int64_t slot_stride = args.kv_heads * args.width;
  Row<T> k[K] = {}, v[K] = {};
  int64_t held = -1;  // the patch, of those of all rows, whose keys they are
  for (int i = 0; i < kByteTile * shared; i += U) {  // byte after byte, each with all its heads
    int64_t query[U], patch[U];
    Row<T> q[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int byte = shared == 1 ? i + u : (i + u) / shared, head = i + u - byte * shared;
      const bool valid = byte < count;
      query[u] = valid ? (begin + byte) * args.heads + unit.head * shared + head : -1;
      const int64_t id = valid ? min_of(int64_t(args.ids[begin + byte]), args.capacity - 1) : -1;
      patch[u] = id < 0 ? -1 : (begin + byte) / args.num_bytes * args.capacity + id;
      q[u] = lane.load(static_cast<const T*>(args.q) + query[u] * args.width, valid);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (patch[u] >= 0 && patch[u] != held) {
        held = patch[u];
        const int64_t first = held * slots * slot_stride + unit.head * args.width;
#pragma unroll
        for (int s = 0; s < K; ++s) {
          k[s] = lane.load(static_cast<const T*>(args.k) + first + s * slot_stride, s < slots);
          v[s] = lane.load(static_cast<const T*>(args.v) + first + s * slot_stride, s < slots);
        }
      }
      A score[K], top = minus_infinity<A>();
#pragma unroll
      for (int s = 0; s < K; ++s) {
        score[s] = scale * lane.dot(q[u], nullptr, k[s], nullptr, true);
        score[s] = s < slots && patch[u] >= 0 ? score[s] : minus_infinity<A>();
        top = score[s] > top ? score[s] : top;
      }
      OnlineSoftmax<A> softmax;
      softmax.top = top;
      if (patch[u] >= 0) {
#pragma unroll
        for (int s = 0; s < K; ++s) {
          const A weight = softmax.weight(score[s]);
          softmax.sum += weight;
          add_scaled<T>(weight, v[s], softmax.acc);
        }
      }
      if (query[u] >= 0) {
        finish(args, lane, query[u], patch[u] >= 0, softmax);
      }
    }
  }
}

// Owners: tiles; the long patch that begins in one.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_join_kernel(CrossAttentionArgs args, AttentionShape shape) {
  using A = Acc<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, kPlain> lane(args, shape, unit.chunk);
  const AttentionWork parts = unit.active ? Layout{args}.parts_from(unit.owner) : AttentionWork{};
  const int64_t query = query_of(args, parts.owner, unit.head, unit.block);
  if (query < 0) {
    return;
  }
  const auto part_in = [&](int64_t tile) {
    return query_part<A>(args, Layout::part_in(parts, tile), parts.owner, query);
  };
  OnlineSoftmax<A> softmax;
#pragma unroll 8
  for (int64_t tile = parts.begin; tile < parts.end; ++tile) {
    const A top = part_in(tile)[args.width];
    softmax.top = top > softmax.top ? top : softmax.top;
  }
#pragma unroll 4
  for (int64_t tile = parts.begin; tile < parts.end; ++tile) {
    const A* part = part_in(tile);
    const A weight = softmax.weight(part[args.width]);
    softmax.sum += weight * part[args.width + 1];
    lane.add_part(part, weight, softmax.acc);
  }
  finish(args, lane, query, true, softmax);
}

// ---- backward: what all of it needs ---------------------------------------------------------------------------------

// A query in backward. With e_j = exp(score_j - lse), which is the softmax but for the rounding of lse:
//   p_j = e_j / sum,   delta = the sum of p_j dp_j,   dscore_j = scale p_j (dp_j - delta)   where sum = the sum of e_j.
template <class A>
struct SoftmaxSums {
  A sum = 0, delta = 0;  // delta: until `divide`, of e_j dp_j

  __device__ __forceinline__ void add(A e, A dp) {
    sum += e;
    delta += e * dp;
  }
  __device__ __forceinline__ void divide() { delta /= sum; }
};

// ---- backward in two passes -----------------------------------------------------------------------------------------

// Owners: what has the queries.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_queries_kernel(CrossAttentionArgs args, AttentionShape shape) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, kPlain> lane(args, shape, unit.chunk);
  const AttentionWork work = unit.active ? Layout{args}.keys_of(unit.owner) : AttentionWork{};
  const int64_t query = query_of(args, work.owner, unit.head, unit.block);
  const int count = work.count(), steps = warp_max(count);
  const A scale = A(args.scale);
  const int64_t stride = args.kv_heads * args.width, first = work.begin * stride + unit.head * args.width;
  const T *keys = static_cast<const T*>(args.k) + first, *values = static_cast<const T*>(args.v) + first;
  const T *q_row = static_cast<const T*>(args.q) + query * args.width;
  const T *g_row = static_cast<const T*>(args.grad) + query * args.width;
  const Row<T> q = lane.load(q_row, query >= 0), g = lane.load(g_row, query >= 0);
  const A lse = query >= 0 ? static_cast<const A*>(args.lse)[query] : A(0);
  SoftmaxSums<A> sums;
  A grad_q[kColumns] = {};
  const auto walk = [&](const auto& body) {
    for (int i = 0; i < steps; i += U) {
      Row<T> k[U], v[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        k[u] = lane.load(keys + (i + u) * stride, i + u < count);
        v[u] = lane.load(values + (i + u) * stride, i + u < count);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const bool valid = i + u < count;
        const A score = scale * lane.dot(q, q_row, k[u], keys + (i + u) * stride, valid);
        const A dp = lane.dot(g, g_row, v[u], values + (i + u) * stride, valid);
        if (valid) body(exp_of(score - lse), dp, k[u]);
      }
    }
  };
  walk([&](A e, A dp, const Row<T>&) { sums.add(e, dp); });
  sums.divide();
  if (args.grad_q != nullptr) {
    walk([&](A e, A dp, const Row<T>& k) { add_scaled<T>(scale * (e / sums.sum) * (dp - sums.delta), k, grad_q); });
  }
  if (query < 0) {
    return;
  }
  if (lane.leads()) {
    A* terms = static_cast<A*>(args.row_terms) + query * 2;
    terms[0] = sums.sum, terms[1] = sums.delta;
  }
  if (args.grad_q != nullptr) {
    lane.store(static_cast<T*>(args.grad_q) + query * args.width, grad_q);
  }
}

// Owners: what has the keys.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_keys_kernel(CrossAttentionArgs args, AttentionShape shape) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, kPlain> lane(args, shape, unit.chunk);
  const AttentionWork work = unit.active ? Layout{args}.queries_of(unit.owner) : AttentionWork{};
  const int count = work.count(), steps = warp_max(count), shared = int(args.heads / args.kv_heads);
  const A scale = A(args.scale);
  const int64_t key = work.owner * (args.encoder ? 1 : args.slots) + unit.block;
  const int64_t at = (key * args.kv_heads + unit.head) * args.width;
  const T *k_row = static_cast<const T*>(args.k) + at, *v_row = static_cast<const T*>(args.v) + at;
  const Row<T> k = lane.load(k_row, unit.active), v = lane.load(v_row, unit.active);
  A grad_k[kColumns] = {}, grad_v[kColumns] = {};
  for (int head = 0; head < shared; ++head) {
    for (int i = 0; i < steps; i += U) {
      Row<T> q[U], g[U];
      int64_t query[U];
      bool valid[U];
      A lse[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        query[u] = (work.begin + i + u) * args.heads + unit.head * shared + head;
        lse[u] = i + u < count ? static_cast<const A*>(args.lse)[query[u]] : minus_infinity<A>();
        valid[u] = lse[u] != minus_infinity<A>();
        q[u] = lane.load(static_cast<const T*>(args.q) + query[u] * args.width, valid[u]);
        g[u] = lane.load(static_cast<const T*>(args.grad) + query[u] * args.width, valid[u]);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const T* q_row = static_cast<const T*>(args.q) + query[u] * args.width;
        const T* g_row = static_cast<const T*>(args.grad) + query[u] * args.width;
        const A score = scale * lane.dot(k, k_row, q[u], q_row, valid[u]);
        const A dp = lane.dot(v, v_row, g[u], g_row, valid[u]);
        if (valid[u]) {
          const A* terms = static_cast<const A*>(args.row_terms) + query[u] * 2;
          const A p = exp_of(score - lse[u]) / terms[0];
          add_scaled<T>(scale * p * (dp - terms[1]), q[u], grad_k);
          add_scaled<T>(p, g[u], grad_v);
        }
      }
    }
  }
  if (unit.active) {
    if (args.grad_k != nullptr) lane.store(static_cast<T*>(args.grad_k) + at, grad_k);
    if (args.grad_v != nullptr) lane.store(static_cast<T*>(args.grad_v) + at, grad_v);
  }
}

// ---- backward in one walk over the bytes of a patch -----------------------------------------------------------------

// Sums over the sets of lanes of a group, each with its share of the held rows. All lanes of the warp take part.
template <class A, int N>
__device__ __forceinline__ void sum_of_shares(const AttentionShape& shape, A (&x)[N]) {
  for (int distance = shape.lanes; distance < shape.lanes * shape.split; distance *= 2) {
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] += __shfl_xor_sync(kFullWarp, x[e], distance);
  }
}

// Owners: patches, after the parts of long ones. First with `only_sums` the parts alone: the sums of a long patch's
// queries must be known before the walk proper.
template <class T, int Q>
__global__ void __launch_bounds__(kWalkThreads, 3)
    attention_encoder_backward_kernel(CrossAttentionArgs args, AttentionShape shape, int64_t parts, bool only_sums) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, true> lane(args, shape, 0);
  const Layout layout{args};
  const int share = int(threadIdx.x) / shape.lanes % shape.split;
  const AttentionWork work = unit.active ? layout.bytes_of(unit.owner, parts) : AttentionWork{};
  const bool sums_are_known = work.part >= 0 && !only_sums;
  const int count = work.count(), steps = warp_max(count), steps_of_sums = warp_max(sums_are_known ? 0 : count);
  const A scale = A(args.scale);
  const int64_t stride = args.kv_heads * args.width, first = work.begin * stride + unit.head * args.width;
  const T *keys = static_cast<const T*>(args.k) + first, *values = static_cast<const T*>(args.v) + first;
  int64_t query[Q];
  Row<T> q[Q], g[Q];
  A lse[Q], sum[Q], delta[Q], grad_q[Q][kColumns];
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    query[t] = query_of(args, work.owner, unit.head, share * Q + t);
    q[t] = lane.load(static_cast<const T*>(args.q) + query[t] * args.width, query[t] >= 0);
    g[t] = lane.load(static_cast<const T*>(args.grad) + query[t] * args.width, query[t] >= 0);
    lse[t] = query[t] >= 0 ? static_cast<const A*>(args.lse)[query[t]] : A(0);
    sum[t] = delta[t] = 0;
#pragma unroll
    for (int e = 0; e < kColumns; ++e) grad_q[t][e] = 0;
  }
  Row<T> k[U], v[U];
  A e[U][Q], dp[U][Q];  // softmax but for a factor, and its gradient
  const auto compute = [&](int i) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      k[u] = lane.load(keys + (i + u) * stride, i + u < count);
      v[u] = lane.load(values + (i + u) * stride, i + u < count);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int t = 0; t < Q; ++t) {
        const A score = scale * lane.dot(q[t], nullptr, k[u], nullptr, true);
        dp[u][t] = lane.dot(g[t], nullptr, v[u], nullptr, true);
        e[u][t] = i + u < count && query[t] >= 0 ? exp_of(score - lse[t]) : A(0);
      }
    }
  };
  for (int i = 0; i < steps_of_sums; i += U) {
    compute(i);
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int t = 0; t < Q; ++t) {
        sum[t] += e[u][t];
        delta[t] += e[u][t] * dp[u][t];
      }
    }
  }
  if (only_sums) {
#pragma unroll
    for (int t = 0; t < Q; ++t) {
      if (work.part >= 0 && query[t] >= 0 && lane.leads()) {
        A* part = query_part<A>(args, work.part, work.owner, query[t]);
        part[args.width] = sum[t], part[args.width + 1] = delta[t];
      }
    }
    return;
  }
  if (sums_are_known) {
    const AttentionWork all = layout.parts_of(work.owner);
#pragma unroll
    for (int t = 0; t < Q; ++t) {
      sum[t] = delta[t] = 0;
      for (int64_t tile = all.begin; query[t] >= 0 && tile < all.end; ++tile) {
        const A* part = query_part<A>(args, Layout::part_in(all, tile), work.owner, query[t]);
        sum[t] += part[args.width], delta[t] += part[args.width + 1];
      }
    }
  }
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    sum[t] = query[t] >= 0 ? A(1) / sum[t] : A(0);  // from here on its inverse
    delta[t] *= sum[t];
  }
  for (int i = 0; i < steps; i += U) {
    compute(i);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      A grad_k[kColumns] = {}, grad_v[kColumns] = {};
      if (i + u < count) {
#pragma unroll
        for (int t = 0; t < Q; ++t) {
          if (query[t] >= 0) {
            const A p = e[u][t] * sum[t], dscore = scale * p * (dp[u][t] - delta[t]);
            add_scaled<T>(dscore, k[u], grad_q[t]);
            add_scaled<T>(dscore, q[t], grad_k);
            add_scaled<T>(p, g[t], grad_v);
          }
        }
      }
      sum_of_shares(shape, grad_k);
      sum_of_shares(shape, grad_v);
      if (i + u < count) {
        const int64_t at = first + (i + u) * stride;
        if (args.grad_k != nullptr && share == 0) lane.store(static_cast<T*>(args.grad_k) + at, grad_k);
        if (args.grad_v != nullptr && share == shape.split - 1) lane.store(static_cast<T*>(args.grad_v) + at, grad_v);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < Q; ++t) {
    if (query[t] >= 0) {
      if (work.part >= 0) {
        lane.store_part(query_part<A>(args, work.part, work.owner, query[t]), grad_q[t]);
      } else if (args.grad_q != nullptr) {
        lane.store(static_cast<T*>(args.grad_q) + query[t] * args.width, grad_q[t]);
      }
    }
  }
}

// Owners: patches, after the parts of long ones.
template <class T, int K>
__global__ void __launch_bounds__(kWalkThreads, 3)
    attention_decoder_backward_kernel(CrossAttentionArgs args, AttentionShape shape, int64_t parts) {
  using A = Acc<T>;
  constexpr int U = kAhead<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, true> lane(args, shape, 0);
  const AttentionWork work = unit.active ? Layout{args}.bytes_of(unit.owner, parts) : AttentionWork{};
  const int count = work.count(), steps = warp_max(count), shared = int(args.heads / args.kv_heads);
  const int share = int(threadIdx.x) / shape.lanes % shape.split;
  const int slots = work.owner >= 0 ? int(args.slots) - share * K : 0;  // from the first one of this share
  const A scale = A(args.scale);
  const int64_t stride = args.heads * args.width;
  const int64_t slot_stride = args.kv_heads * args.width;
  const int64_t first_slot = (work.owner * args.slots + share * K) * slot_stride + unit.head * args.width;
  Row<T> k[K], v[K];
  A grad_k[K][kColumns], grad_v[K][kColumns];
#pragma unroll
  for (int s = 0; s < K; ++s) {
    k[s] = lane.load(static_cast<const T*>(args.k) + first_slot + s * slot_stride, s < slots);
    v[s] = lane.load(static_cast<const T*>(args.v) + first_slot + s * slot_stride, s < slots);
#pragma unroll
    for (int e = 0; e < kColumns; ++e) grad_k[s][e] = grad_v[s][e] = 0;
  }
  for (int head = 0; head < shared; ++head) {
    const int64_t query = work.begin * args.heads + unit.head * shared + head, first = query * args.width;
    for (int i = 0; i < steps; i += U) {
      Row<T> q[U], g[U];
      A lse[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const bool valid = i + u < count;
        q[u] = lane.load(static_cast<const T*>(args.q) + first + (i + u) * stride, valid);
        g[u] = lane.load(static_cast<const T*>(args.grad) + first + (i + u) * stride, valid);
        lse[u] = valid ? static_cast<const A*>(args.lse)[query + (i + u) * args.heads] : A(0);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        A e[K], dp[K], sums[2] = {};  // of e and of e dp
#pragma unroll
        for (int s = 0; s < K; ++s) {
          const A score = scale * lane.dot(q[u], nullptr, k[s], nullptr, true);
          dp[s] = lane.dot(g[u], nullptr, v[s], nullptr, true);
          e[s] = exp_of(score - lse[u]);
          if (s < slots) {
            sums[0] += e[s];
            sums[1] += e[s] * dp[s];
          }
        }
        sum_of_shares(shape, sums);
        A grad_q[kColumns] = {};
        if (i + u < count) {
          const A inverse = A(1) / sums[0], delta = sums[1] * inverse;
#pragma unroll
          for (int s = 0; s < K; ++s) {
            if (s < slots) {
              const A p = e[s] * inverse, dscore = scale * p * (dp[s] - delta);
              add_scaled<T>(dscore, k[s], grad_q);
              add_scaled<T>(dscore, q[u], grad_k[s]);
              add_scaled<T>(p, g[u], grad_v[s]);
            }
          }
        }
        sum_of_shares(shape, grad_q);
        if (i + u < count && args.grad_q != nullptr && share == 0) {
          lane.store(static_cast<T*>(args.grad_q) + first + (i + u) * stride, grad_q);
        }
      }
    }
  }
#pragma unroll
  for (int s = 0; s < K; ++s) {
    if (s < slots) {
      if (work.part >= 0) {
        const int64_t row = (share * K + s) * args.kv_heads + unit.head;
        A* part = part_row<A>(args, work.part, row, args.kv_heads, 2 * args.width);
        lane.store_part(part, grad_k[s]);
        lane.store_part(part + args.width, grad_v[s]);
      } else {
        const int64_t at = first_slot + s * slot_stride;
        if (args.grad_k != nullptr) lane.store(static_cast<T*>(args.grad_k) + at, grad_k[s]);
        if (args.grad_v != nullptr) lane.store(static_cast<T*>(args.grad_v) + at, grad_v[s]);
      }
    }
  }
}

// Gradients of a patch's slots are the sums of the parts: of rows of `numbers`, from number `from`. Owners: tiles; the
// long patch that begins in one.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(1))
    attention_sum_kernel(CrossAttentionArgs args, AttentionShape shape, T* out, int64_t numbers, int64_t from) {
  using A = Acc<T>;
  const AttentionUnit unit = attention_unit(shape);
  const Lane<T, true> lane(args, shape, 0);
  const AttentionWork parts = unit.active ? Layout{args}.parts_from(unit.owner) : AttentionWork{};
  if (parts.owner < 0) {
    return;
  }
  const int64_t row = unit.block * shape.heads + unit.head;
  A sum[kColumns] = {};
#pragma unroll 4
  for (int64_t tile = parts.begin; tile < parts.end; ++tile) {
    lane.add_part(part_row<A>(args, Layout::part_in(parts, tile), row, shape.heads, numbers) + from, A(1), sum);
  }
  lane.store(out + (parts.owner * args.slots * shape.heads + row) * args.width, sum);
}

// Bytes that belong to no patch have no gradient, in one or two tensors of `accesses` a byte. A warp for 32 bytes.
template <class Access>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_zero_kernel(CrossAttentionArgs args, int64_t accesses, Access* first, Access* second) {
  const int64_t thread = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x, row = thread / kWarp * kWarp;
  bool outside = false;
  if (thread < args.batch * args.num_bytes) {
    const int64_t b = thread / args.num_bytes, i = thread % args.num_bytes;
    if (args.capacity == 0) {
      outside = true;
    } else if (args.encoder) {
      outside = i < Layout{args}.begin(b, 0) || i >= Layout{args}.end(b, args.capacity - 1);
    } else {
      outside = args.ids[thread] < 0;
    }
  }
  const unsigned rows = __ballot_sync(kFullWarp, outside);
  for (int r = 0; r < kWarp; ++r) {
    if ((rows >> r & 1) != 0) {
      for (int64_t j = threadIdx.x % kWarp; j < accesses; j += kWarp) {
        if (first != nullptr) first[(row + r) * accesses + j] = Access{};
        if (second != nullptr) second[(row + r) * accesses + j] = Access{};
      }
    }
  }
}

}  // namespace blt::cuda
