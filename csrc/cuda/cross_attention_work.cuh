// Cross-attention: who works on which rows, and how long patches are divided.
//
// A patch of more than kAttentionTile bytes is divided where a patch is an owner: each tile of bytes holds at most two
// parts of such patches, found by a kernel of its own, and a last kernel joins a patch's parts in order.
#pragma once

#include "common/search.h"
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

// ---- layout: values that are no layout's stay within the tensors ----------------------------------------------------

__device__ __forceinline__ int64_t clamp_to(int64_t x, int64_t limit) { return max_of(int64_t(0), min_of(x, limit)); }

// Positions of the sorted `values` that are at most x.
__device__ __forceinline__ int64_t count_up_to(const int32_t* values, int64_t count, int64_t x) {
  return partition_point(int64_t(0), count, [&](int64_t i) { return values[i] <= x; });
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

}  // namespace blt::cuda
