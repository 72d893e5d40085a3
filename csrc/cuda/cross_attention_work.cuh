// Cross-attention: which threads work on which rows, and how long patches are cut into parts.
//
// The work of a launch is a list of items: patches, bytes, or tiles of bytes. An item is cut into tasks, one for each
// group of lanes (docs/design.md has a drawing). Where the items are patches, a patch of more than kAttentionTile bytes
// is long: it is cut at the tiles of its row, so that a tile holds at most two parts of long patches. A kernel of its
// own finds these parts, they are items like the short patches, and a last kernel joins the parts of each patch in
// order.
#pragma once

#include "common/search.h"
#include "cuda/cross_attention.h"
#include "cuda/device.h"

namespace blt::cuda {

constexpr int kAttentionThreads = 256;
constexpr int kWalkThreads = 128;  // for kernels that hold many rows: small blocks share the registers out more finely
constexpr int kColumns = 8;        // consecutive elements of a row that a lane holds

// ---- items and tasks ------------------------------------------------------------------------------------------------

// How items are cut into tasks. An item has `tasks` = blocks of held rows * chunks of columns * heads, and each task is
// done by one group of lanes. A thread block does all tasks of several items, or several thread blocks share one item.
struct AttentionShape {
  int lanes;  // lanes that hold a row together: a power of two
  int sets;   // sets of `lanes` lanes in a group, which share out the held rows: a power of two
  int64_t items;
  int chunks, heads;
  unsigned tasks, tasks_per_block, items_per_block, blocks_per_item;
};

// What one group of lanes does of an item.
struct AttentionTask {
  bool active;    // there is such an item and task
  int64_t item;   // the number of the item
  int64_t block;  // of the rows that it holds
  int chunk, head;
};

__device__ __forceinline__ AttentionTask attention_task(const AttentionShape& shape) {
  const unsigned group = threadIdx.x / unsigned(shape.lanes * shape.sets), within = group / shape.tasks_per_block;
  const unsigned number = blockIdx.x % shape.blocks_per_item * shape.tasks_per_block + group % shape.tasks_per_block;
  const unsigned row = number / unsigned(shape.heads);
  AttentionTask task;
  task.item = int64_t(blockIdx.x / shape.blocks_per_item) * shape.items_per_block + within;
  task.active = within < shape.items_per_block && number < shape.tasks && task.item < shape.items;
  task.block = shape.chunks == 1 ? row : row / unsigned(shape.chunks);
  task.chunk = shape.chunks == 1 ? 0 : int(row % unsigned(shape.chunks));
  task.head = int(number % unsigned(shape.heads));
  return task;
}

// ---- the layout: any values are clamped, so that they stay within the tensors ---------------------------------------

__device__ __forceinline__ int64_t clamp_to(int64_t x, int64_t limit) { return max_of(int64_t(0), min_of(x, limit)); }

// How many of the sorted `values` are at most x.
__device__ __forceinline__ int64_t count_up_to(const int32_t* values, int64_t count, int64_t x) {
  return partition_point(int64_t(0), count, [&](int64_t i) { return values[i] <= x; });
}

// A patch or a byte, and rows begin .. end - 1 of the other side, which its queries see or which see its keys.
struct AttentionItem {
  int64_t index = -1;  // b * C + patch, or b * N + byte; -1: there is nothing to do
  int64_t begin = 0, end = 0;
  int64_t part = -1;  // which of `parts` takes the result; -1: the patch is not long
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
  // The patch that byte i belongs to (encoder) or sees (decoder); an id below 0 or from C on where there is none.
  __device__ __forceinline__ int64_t patch_of(int64_t b, int64_t i) const {
    return args.encoder ? count_up_to(args.begin + b * args.stride, args.capacity + 1, i) - 1
                        : min_of(int64_t(args.ids[b * args.num_bytes + i]), args.capacity - 1);
  }

  // Slot p sees slots first_seen(p) .. p, and slots p .. last_seer(p) - 1 see slot p.
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

  // The item of the queries of a patch (encoder) or of a byte (decoder): its rows are the keys that they see.
  __device__ __forceinline__ AttentionItem keys_of(int64_t index) const {
    AttentionItem item;
    item.index = index;
    if (args.encoder) {
      const int64_t b = index / args.capacity, p = index % args.capacity;
      if (begin(b, p) < end(b, p)) {
        item.begin = b * args.num_bytes + begin(b, first_seen(p));
        item.end = b * args.num_bytes + end(b, p);
      }
    } else {
      const int64_t b = index / args.num_bytes, id = min_of(int64_t(args.ids[index]), args.capacity - 1);
      if (id >= 0) {
        item.begin = (b * args.capacity + first_seen(id)) * args.slots;
        item.end = (b * args.capacity + id + 1) * args.slots;
      }
    }
    return item;
  }

  // The item of the keys of a byte (encoder) or of a patch (decoder): its rows are the queries that see them, and maybe
  // some queries that see nothing.
  __device__ __forceinline__ AttentionItem queries_of(int64_t index) const {
    AttentionItem item;
    item.index = index;
    if (args.encoder) {
      const int64_t b = index / args.num_bytes, p = patch_of(b, index % args.num_bytes);
      if (p >= 0 && p < args.capacity) {
        item.begin = (b * args.capacity + p) * args.slots;
        item.end = (b * args.capacity + last_seer(p)) * args.slots;
      }
    } else {
      const int64_t b = index / args.capacity, p = index % args.capacity;
      int64_t last = last_seer(p);
      while (last > p + 1 && begin(b, last - 1) >= end(b, last - 1)) --last;
      item.begin = b * args.num_bytes + begin(b, p);
      item.end = b * args.num_bytes + end(b, last - 1);
    }
    return item;
  }

  __device__ __forceinline__ int64_t tiles() const { return (args.num_bytes + kAttentionTile - 1) / kAttentionTile; }

  // Item number `index` of a walk over the bytes of patches (the encoder's keys, the decoder's queries): the first
  // `parts` items are the parts of long patches, and the others are the patches that are not long.
  __device__ __forceinline__ AttentionItem bytes_of(int64_t index, int64_t parts) const {
    AttentionItem item;
    if (index >= parts) {
      const int64_t patch = index - parts, b = patch / args.capacity, c = patch % args.capacity;
      if (parts == 0 || end(b, c) - begin(b, c) <= kAttentionTile) {
        item = {patch, b * args.num_bytes + begin(b, c), b * args.num_bytes + end(b, c), -1};
      }
      return item;
    }
    const int64_t c = args.long_patches[index], b = index / 2 / tiles(), first = index / 2 % tiles() * kAttentionTile;
    if (c >= 0) {
      item = {b * args.capacity + c, b * args.num_bytes + max_of(begin(b, c), first),
              b * args.num_bytes + min_of(end(b, c), first + kAttentionTile), index};
    }
    return item;
  }
  // The long patch that part `index` belongs to, or -1.
  __device__ __forceinline__ int64_t long_patch(int64_t index) const {
    const bool begins_here = index % 2 == 1;
    const int64_t b = index / 2 / tiles(), first = index / 2 % tiles() * kAttentionTile;
    const int64_t c = patch_of(b, begins_here ? min_of(first + kAttentionTile, args.num_bytes) - 1 : first);
    const bool is_long = c >= 0 && c < args.capacity && end(b, c) - begin(b, c) > kAttentionTile;
    return is_long && begins_here == (begin(b, c) >= first) ? c : -1;
  }

  // All parts of a long patch: its rows are the tiles begin .. end - 1, counted over all batch rows.
  __device__ __forceinline__ AttentionItem parts_of(int64_t patch) const {
    AttentionItem item;
    const int64_t b = patch / args.capacity, c = patch % args.capacity;
    item.index = patch;
    item.begin = b * tiles() + begin(b, c) / kAttentionTile;
    item.end = b * tiles() + (end(b, c) - 1) / kAttentionTile + 1;
    return item;
  }
  // All parts of the long patch that begins in a tile.
  __device__ __forceinline__ AttentionItem parts_from(int64_t tile) const {
    const AttentionItem part = bytes_of(tile * 2 + 1, tile * 2 + 2);
    return part.index < 0 ? part : parts_of(part.index);
  }
  // Which of the parts that parts_of returned lies in a tile.
  static __device__ __forceinline__ int64_t part_in(const AttentionItem& parts, int64_t tile) {
    return tile * 2 + (tile == parts.begin ? 1 : 0);
  }
};

// Query number j of a patch or byte, for a key head: its index in [query rows * H], or -1 where there is none.
__device__ __forceinline__ int64_t query_of(const CrossAttentionArgs& args, int64_t index, int head, int64_t j) {
  const int64_t rows = args.encoder ? args.slots : 1;
  if (args.heads == args.kv_heads) {  // no divisions
    return index >= 0 && j < rows ? (index * rows + j) * args.heads + head : -1;
  }
  const int64_t heads_per_key = args.heads / args.kv_heads;
  if (index < 0 || j >= rows * heads_per_key) return -1;
  return (index * rows + j / heads_per_key) * args.heads + head * heads_per_key + j % heads_per_key;
}

// The accumulators of a part for one slot and head: `numbers` numbers.
template <class A>
__device__ __forceinline__ A* part_row(const CrossAttentionArgs& args, int64_t part, int64_t slot_and_head,
                                       int64_t heads, int64_t numbers) {
  return static_cast<A*>(args.parts) + (part * args.slots * heads + slot_and_head) * numbers;
}
// The accumulators of a part for one query of a patch: its sums, and two more numbers.
template <class A>
__device__ __forceinline__ A* query_part(const CrossAttentionArgs& args, int64_t part, int64_t patch, int64_t query) {
  return part_row<A>(args, part, query - patch * args.slots * args.heads, args.heads, args.width + 2);
}

}  // namespace blt::cuda
