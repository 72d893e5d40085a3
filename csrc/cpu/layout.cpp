// The fields of a PatchLayout on the CPU. Each row is one walk over its bytes, from the first to the last.
#include "cpu/layout.h"

#include "cpu/vec.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

namespace {

struct Row {
  int64_t byte_base;           // the first byte of the row in [B * N]
  int64_t seq_begin, seq_end;  // its sequences are seq_begin .. seq_end - 1
  int32_t *offsets, *patch_ids, *visible_ids;
};

Row row_of(const LayoutArgs& args, int64_t b) {
  const int64_t base = b * args.num_bytes;
  return Row{base,
             args.packed ? 0 : b,
             args.packed ? args.num_sequences : b + 1,
             args.offsets + b * (args.capacity + 1),
             args.patch_ids + base,
             args.visible_ids + base};
}

void fill_none(int32_t* ids, int64_t begin, int64_t end) {
  memset(ids + begin, 0xff, size_t(end - begin) * sizeof(int32_t));  // all bits set: -1
}

// Writes everything that follows from the offsets and from the ids of the bytes between the first and the last offset.
void finish_row(const LayoutArgs& args, int64_t b, const Row& row) {
  int32_t *ids = row.patch_ids, *visible = row.visible_ids;
  const int64_t begin = row.offsets[0], end = row.offsets[args.capacity];
  fill_none(ids, 0, begin);
  fill_none(ids, end, args.num_bytes);
  fill_none(visible, 0, begin);
  fill_none(visible, end, args.num_bytes);
  const int32_t num_patches = begin < end ? ids[end - 1] + 1 : 0;
  args.num_patches[b] = num_patches;
  for (int64_t s = row.seq_begin; s < row.seq_end; ++s) {
    const int64_t from = args.seq_begin[s] - row.byte_base;
    int32_t first = 0;
    if (args.packed) {  // a sequence without bytes begins where the next one does
      first = from == 0 ? 0 : from < end ? ids[from] : num_patches;
      args.cu_patches[s] = first;
    }
    const int64_t lo = max_of(from, begin), hi = min_of(args.seq_end[s] - row.byte_base, end);
    if (lo >= hi) {
      continue;
    }
    for (int64_t i = lo; i < hi - 1; ++i) {  // a byte sees the patch before that of the next byte
      const int32_t id = ids[i + 1] - 1;
      visible[i] = id < first ? -1 : id;
    }
    const int32_t id = ids[hi - 1] - 1 + args.next_is_start[s];
    visible[hi - 1] = id < first ? -1 : id;
  }
  if (args.packed) {
    args.cu_patches[args.num_sequences] = num_patches;
  }
}

}  // namespace

void layout_from_starts(const LayoutArgs& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const Row row = row_of(args, b);
    const uint8_t* starts = args.starts + row.byte_base;
    int32_t *offsets = row.offsets, *ids = row.patch_ids;
    offsets[0] = 0;
    // Start number j of the row lies in `slot`. Each byte writes the end of its slot, so the last byte of a slot wins.
    int32_t j = -1, slot = -1, skipped = 0;
    for (int64_t s = row.seq_begin; s < row.seq_end; ++s) {
      int64_t i = args.seq_begin[s] - row.byte_base;
      const int64_t hi = args.seq_end[s] - row.byte_base;
      if (i >= hi) {
        continue;
      }
      // Every later sequence of the row keeps at least one slot.
      const int32_t limit = args.merge ? int32_t(args.capacity - (row.seq_end - s)) : INT32_MAX;
      if (args.packed) {
        ++j;
        const int32_t next = j < limit ? j : limit;
        skipped += next - slot - 1;
        while (slot < next) {
          offsets[++slot] = int32_t(i);
        }
        ids[i] = slot;
        offsets[slot + 1] = int32_t(++i);
      }
      for (; i < hi; ++i) {
        j += starts[i] != 0;
        slot = j < limit ? j : limit;
        ids[i] = slot;
        offsets[slot + 1] = int32_t(i + 1);
      }
    }
    for (int64_t c = slot + 2; c <= args.capacity; ++c) {
      offsets[c] = offsets[slot + 1];
    }
    args.overflow[b] = j - (slot - skipped);
    finish_row(args, b, row);
  }
}

void layout_from_lengths(const LayoutArgs& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const Row row = row_of(args, b);
    for (int64_t c = 0; c < args.capacity; ++c) {
      for (int64_t i = row.offsets[c]; i < row.offsets[c + 1]; ++i) {
        row.patch_ids[i] = int32_t(c);
      }
    }
    finish_row(args, b, row);
  }
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
