// The fields of a PatchLayout from patch starts (a mask, or a rule that is evaluated here) or from patch lengths.
//
// layout_from_starts must move at least these bytes: the values that decide once (1, 4 or 8 bytes for a byte of text),
// patch_ids and visible_ids once (8 bytes for a byte of text), and offsets once (4 bytes for a slot). It takes two
// launches, whatever B and N are. A row is cut into tiles, and each tile has a block. The first launch counts the
// starts of each tile, and fills offsets with the end of the row, which slots without bytes keep. In the second launch
// each block adds up the counts of the tiles before its own, scans its tile and writes. The counts come from L2,
// 16 bytes for each tile before: for a row of 16k bytes these are 1 % of the bytes that must move, for a row of 2M
// bytes as much as these. No block waits for another one of its launch.
//
// Where rows are whole, the kernels are those of layout_whole_rows.cuh. Here are those for packed sequences and for
// max_patch_length. They read the values in both launches, and in the second one blocks share `overflow`, a sum of
// integers.
//
// layout_from_lengths must move lengths, offsets, patch_ids and visible_ids once. It takes two launches, too: in the
// first a block for each row sums the lengths to offsets, and in the second each byte finds its slot there by
// bisection.
#pragma once

#include "common/search.h"
#include "cuda/layout_parts.cuh"

namespace blt::cuda {

constexpr int kLayoutThreads = 256;
constexpr int kLayoutWarps = kLayoutThreads / kWarp;
constexpr int kLayoutItems = 4;  // consecutive bytes of a thread: it writes 16 bytes of each [B, N] output at once
static_assert(kLayoutTile == kLayoutThreads * kLayoutItems);

// ---- scans ----------------------------------------------------------------------------------------------------------
//
// They are our own, because cub does not compile for the host threads of the tests (csrc/testing), and needs of it are
// few: one scan of a block, with an operation that does not commute.

template <class T>
__device__ __forceinline__ T shuffle(const T& x, int lane) {
  static_assert(sizeof(T) % 8 == 0);
  uint64_t words[sizeof(T) / 8];
  memcpy(words, &x, sizeof(T));
#pragma unroll
  for (uint64_t& word : words) word = __shfl_sync(kFullWarp, word, lane);
  T y;
  memcpy(&y, words, sizeof(T));
  return y;
}

// Combines x of all lanes up to this one, in order, so that `op` need not commute.
template <class T, class Op>
__device__ __forceinline__ T warp_scan(T x, Op op) {
  const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const T before = shuffle(x, max_of(lane - d, 0));
    if (lane >= d) x = op(before, x);
  }
  return x;
}

template <class T>
struct Scan {
  T before, total;  // x of the threads before this one combined, and x of all threads combined
};

// Op::none() is the neutral element. All threads of the block must take part.
template <class T, class Op>
__device__ __forceinline__ Scan<T> block_scan(T x, Op op) {
  __shared__ T warps[kLayoutWarps];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const T upto = warp_scan(x, op);
  __syncthreads();  // every thread has read what the last scan left in `warps`
  if (lane == kWarp - 1) warps[warp] = upto;
  __syncthreads();
  const T sums = warp_scan(lane < kLayoutWarps ? warps[lane] : Op::none(), op);
  const T warps_before = shuffle(sums, max_of(warp - 1, 0)), lanes_before = shuffle(upto, max_of(lane - 1, 0));
  const T before = warp == 0 ? Op::none() : warps_before;
  return {lane == 0 ? before : op(before, lanes_before), shuffle(sums, kWarp - 1)};
}

struct Sum {
  static __device__ int64_t none() { return 0; }
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};
struct Max {
  static __device__ int64_t none() { return 0; }
  __device__ int64_t operator()(int64_t a, int64_t b) const { return max_of(a, b); }
};

// ---- sequences ------------------------------------------------------------------------------------------------------

// Bytes begin .. end - 1 of a row are those of sequence s of the row. With s = in_row they come after the last
// sequence.
struct Span {
  int32_t s, begin, end;
};

// The sequence of byte i. The bounds of the span come from the comparisons of the search. So for any values, even for
// decreasing ones, the spans of all bytes cut the row into sequences in order.
__device__ __forceinline__ Span span_at(const SequenceArgs& args, int64_t row, int32_t i) {
  Span span{0, 0, args.num_bytes};
  const int64_t base = args.packed ? 0 : row;
  int32_t stop = args.in_row;
  while (span.s < stop) {  // not partition_point: it would take more registers to keep the bounds as well
    const int32_t middle = span.s + (stop - span.s) / 2;
    int64_t end = args.num_bytes;
    if (args.ends != nullptr) {
      end = args.ends_are_int64 ? static_cast<const int64_t*>(args.ends)[base + middle]
                                : static_cast<const int32_t*>(args.ends)[base + middle];
    }
    if (end <= i) {
      span.s = middle + 1;
      span.begin = max_of(span.begin, int32_t(max_of(end, int64_t(0))));
    } else {
      stop = middle;
      span.end = int32_t(min_of(int64_t(span.end), end));
    }
  }
  return span;
}

// The last sequence of a row that has bytes, or s = -1 and end = 0 where there is none.
__device__ __forceinline__ Span last_span(const SequenceArgs& args, int64_t row) {
  const Span span = args.num_bytes == 0 ? Span{0, 0, 0} : span_at(args, row, args.num_bytes - 1);
  if (span.s < args.in_row && span.end > 0) return span;
  return span.begin == 0 ? Span{-1, 0, 0} : span_at(args, row, span.begin - 1);
}

// The spans of the byte before a thread's first one, and of the thread's bytes. There is no span before byte 0.
struct Spans {
  Span at[kLayoutItems + 1];

  __device__ __forceinline__ Spans(const SequenceArgs& args, int64_t row, int64_t first) {
    at[0] = Span{-1, -1, 0};
    if (0 < first && first <= args.num_bytes) at[0] = span_at(args, row, int32_t(first - 1));
#pragma unroll
    for (int k = 0; k < kLayoutItems; ++k) {
      const int64_t i = first + k;
      at[k + 1] = at[k];
      if (i >= args.num_bytes) {
        at[k + 1] = Span{args.in_row, 0, args.num_bytes};
      } else if (i >= at[k].end) {
        at[k + 1] = span_at(args, row, int32_t(i));
      }
    }
  }
};

// ---- where patches start --------------------------------------------------------------------------------------------

// The summary of a run of bytes says where the mask or rule has its `first` and `last` start (-1: nowhere). `count` is
// the number of starts from the first to the last of these, including those that max_patch_length adds between them.
// `begin` says how many of them come before the last start that begins a sequence (-1: none begins one). With
// max_patch_length every sequence begins with a start of the rule, so that no distance between two starts reaches
// across sequences.
struct JoinStarts {
  int32_t max_patch_length;

  static __device__ Starts none() { return Starts{-1, -1, 0, -1}; }

  __device__ int32_t cuts(int32_t bytes) const { return bytes < max_patch_length ? 0 : bytes / max_patch_length; }

  __device__ Starts operator()(const Starts& a, const Starts& b) const {
    if (b.first < 0) return a;
    if (a.first < 0) return b;
    const int32_t count = a.count + cuts(b.first - a.last - 1);
    return Starts{a.first, b.last, count + b.count, b.begin < 0 ? a.begin : count + b.begin};
  }
};

// The decisions about a thread's bytes, a bit for each. `natural` says that the mask or rule has a start at the byte;
// `after` says that it has one at the next byte, or would have one if that belonged to the sequence. The bits of bytes
// outside of sequences are 0.
template <Rule R>
struct Decisions {
  uint32_t natural = 0, after = 0;

  __device__ __forceinline__ Decisions(const StartsArgs& args, const Spans& spans, int64_t row, int64_t first,
                                       bool aligned) {
    const SequenceArgs& sequences = args.sequences;
    const int64_t base = row * sequences.num_bytes;
    // What byte first - 1 + k decides about the next one: `inner` inside of its sequence, and `alone` at its start.
    uint32_t inner = 0, alone = 0;
    if constexpr (R == Rule::mask) {
      uint8_t mask[kLayoutItems + 1];
      load_values<kLayoutItems, kLayoutItems + 1, 0>(static_cast<const uint8_t*>(args.values) + base,
                                                     sequences.num_bytes, int32_t(first), aligned, mask);
#pragma unroll
      for (int k = 0; k <= kLayoutItems; ++k) inner |= uint32_t(mask[k] != 0) << k;
    } else if constexpr (R == Rule::spaces) {
      int64_t tokens[kLayoutItems + 2];
      load_values<kLayoutItems, kLayoutItems + 2, 2>(static_cast<const int64_t*>(args.values) + base,
                                                     sequences.num_bytes, int32_t(first), aligned, tokens);
      bool space_before = false;
#pragma unroll
      for (int k = 0; k < kLayoutItems + 2; ++k) {
        const int64_t byte = byte_of(tokens[k], args.byte_offset);
        const bool space = is_spacelike(byte);
        if (k > 0) {
          alone |= uint32_t(byte < 0) << (k - 1);
          inner |= uint32_t((byte < 0) | (space & !space_before)) << (k - 1);
        }
        space_before = space;
      }
    } else if constexpr (R != Rule::fixed) {
      float e[kLayoutItems + 2];
      load_values<kLayoutItems, kLayoutItems + 2, 2>(static_cast<const float*>(args.values) + base, sequences.num_bytes,
                                                     int32_t(first), aligned, e);
#pragma unroll
      for (int k = 0; k <= kLayoutItems; ++k) {
        inner |= uint32_t(entropy_starts<R>(e[k], e[k + 1], args.threshold, args.delta)) << k;
      }
      alone = R == Rule::threshold ? inner : 0;
    }
    const auto decides = [&](int k, int32_t t) {  // for byte first - 1 + k, which has position t in its sequence
      if constexpr (R == Rule::fixed) {
        const int32_t past = t - (args.bos_patch ? 0 : args.patch_size - 1);
        return past >= 0 && past % args.patch_size == 0;
      }
      return (args.bos_patch && t <= kLastForced<R>) || (((t > 0 ? inner : alone) >> k) & 1) != 0;
    };
#pragma unroll
    for (int k = 0; k < kLayoutItems; ++k) {
      const Span& span = spans.at[k + 1];
      if (span.s < sequences.in_row) {
        const int32_t i = int32_t(first) + k;
        const bool begins = i == span.begin;
        bool here, next;
        if constexpr (R == Rule::mask) {
          here = (begins && sequences.packed) || ((inner >> k) & 1) != 0;
          const int64_t s = sequences.packed ? span.s : row;
          next = i + 1 < span.end ? ((inner >> (k + 1)) & 1) != 0
                                  : sequences.next_is_start != nullptr && sequences.next_is_start[s] != 0;
        } else {
          here = begins || decides(k, i - 1 - span.begin);
          next = decides(k + 1, i - span.begin);
        }
        natural |= uint32_t(here) << k;
        after |= uint32_t(next) << k;
      }
    }
  }

  __device__ __forceinline__ Starts starts(const Spans& spans, int64_t first, JoinStarts join) const {
    Starts all = JoinStarts::none();
#pragma unroll
    for (int k = 0; k < kLayoutItems; ++k) {
      const int32_t i = int32_t(first) + k;
      if ((natural >> k) & 1) all = join(all, Starts{i, i, 1, i == spans.at[k + 1].begin ? 0 : -1});
    }
    return all;
  }
};

// The last slot that a sequence may use, because every later sequence of the row keeps at least one slot.
__device__ __forceinline__ int32_t last_slot(const StartsArgs& args, int32_t s) {
  return args.merge ? args.out.capacity - args.sequences.in_row + s : INT32_MAX;
}

template <Rule R>
__global__ void __launch_bounds__(kLayoutThreads) layout_tiles_kernel(StartsArgs args, unsigned tiles, bool aligned) {
  const int64_t row = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t first = tile * kLayoutTile + threadIdx.x * kLayoutItems;
  const JoinStarts join{args.max_patch_length};
  const Spans spans(args.sequences, row, first);
  const Decisions<R> decisions(args, spans, row, first, aligned);
  const Starts all = block_scan(decisions.starts(spans, first, join), join).total;
  if (threadIdx.x == 0) {
    args.tiles[blockIdx.x] = all;
    if (tile == 0) args.out.overflow[row] = 0;
  }
  const int32_t end = last_span(args.sequences, row).end;
  int32_t* const offsets = args.out.offsets + row * (int64_t(args.out.capacity) + 1);
  for (int64_t c = tile * kLayoutThreads + threadIdx.x; c <= args.out.capacity; c += int64_t(tiles) * kLayoutThreads) {
    offsets[c] = end;
  }
}

// One block writes cu_patches from num_patches. In a packed row the sequences that have bytes wrote theirs before, and
// the sequences after the last of them begin where it ends.
__device__ __forceinline__ void finish_rows(const SequenceArgs& sequences, const LayoutOut& out) {
  if (sequences.packed) {
    const int32_t last = last_span(sequences, 0).s, num_patches = out.num_patches[0];
    for (int64_t s = int64_t(last) + 1 + threadIdx.x; s <= sequences.in_row; s += kLayoutThreads) {
      out.cu_patches[s] = num_patches;
    }
    return;
  }
  int64_t sum = 0;
  if (threadIdx.x == 0) out.cu_patches[0] = 0;
  for (int64_t begin = 0; begin < sequences.batch; begin += kLayoutThreads) {
    const int64_t b = begin + threadIdx.x, own = b < sequences.batch ? out.num_patches[b] : 0;
    const Scan<int64_t> scan = block_scan(own, Sum{});
    if (b < sequences.batch) out.cu_patches[b + 1] = int32_t(sum + scan.before + own);
    sum += scan.total;
  }
}

// Writes num_patches of all rows, with a warp for each row.
__device__ __forceinline__ void count_patches(const StartsArgs& args, int64_t tiles) {
  const JoinStarts join{args.max_patch_length};
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t per_lane = (tiles + kWarp - 1) / kWarp;
  for (int64_t row = threadIdx.x / kWarp; row < args.sequences.batch; row += kLayoutWarps) {
    Starts all = JoinStarts::none();
    for (int64_t t = lane * per_lane; t < min_of((lane + 1) * per_lane, tiles); ++t) {
      all = join(all, args.tiles[row * tiles + t]);
    }
    all = warp_scan(all, join);
    if (lane == kWarp - 1) {
      const Span span = last_span(args.sequences, row);
      const int32_t starts = all.last < 0 ? 0 : all.count + join.cuts(span.end - 1 - all.last);
      args.out.num_patches[row] = starts == 0 ? 0 : min_of(starts - 1, last_slot(args, span.s)) + 1;
    }
  }
}

// Each block has a tile, except the last one, which writes num_patches and cu_patches.
template <Rule R>
__global__ void __launch_bounds__(kLayoutThreads, 4)
    layout_from_starts_kernel(StartsArgs args, unsigned tiles, bool aligned) {
  const SequenceArgs& sequences = args.sequences;
  const LayoutOut& out = args.out;
  const int64_t row = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  if (row == sequences.batch) {
    count_patches(args, tiles);
    __syncthreads();
    finish_rows(sequences, out);
    return;
  }
  const JoinStarts join{args.max_patch_length};
  Starts before = JoinStarts::none();
  const int64_t per_thread = (tile + kLayoutThreads - 1) / kLayoutThreads;
  for (int64_t t = threadIdx.x * per_thread; t < min_of((threadIdx.x + 1) * per_thread, tile); ++t) {
    before = join(before, args.tiles[row * tiles + t]);
  }
  if (tile > 0) before = block_scan(before, join).total;
  const int64_t first = tile * kLayoutTile + threadIdx.x * kLayoutItems;
  const Spans spans(sequences, row, first);
  const Decisions<R> decisions(args, spans, row, first, aligned);
  before = join(before, block_scan(decisions.starts(spans, first, join), join).before);

  // For byte first - 1: the number of the last start up to it, how many bytes lie between, and its slot.
  const bool some = before.last >= 0;
  const int32_t since = some ? int32_t(first) - 1 - before.last : 0, cuts = join.cuts(since);
  int32_t start = some ? before.count - 1 + cuts : -1;
  int32_t length = since - cuts * join.max_patch_length;
  int32_t slot = min_of(start, last_slot(args, spans.at[0].s));
  int32_t begin = before.begin;  // the number of the start that begins the sequence
  int32_t* const offsets = out.offsets + row * (int64_t(out.capacity) + 1);
  int32_t own[kLayoutItems], visible[kLayoutItems];
  int32_t merged = 0;
#pragma unroll
  for (int k = 0; k < kLayoutItems; ++k) {
    own[k] = visible[k] = -1;
    const Span& span = spans.at[k + 1];
    if (span.s < sequences.in_row) {
      const int32_t i = int32_t(first) + k, limit = last_slot(args, span.s);
      // From here on `length` belongs to the patch of byte i, and counts its bytes before byte i.
      const bool starts = ((decisions.natural >> k) & 1) != 0 || (start >= 0 && length + 1 == join.max_patch_length);
      length = starts ? 0 : length + 1;
      start += starts;
      const int32_t id = min_of(start, limit);
      merged += starts;
      if (id > slot) {
        --merged;
        for (int32_t c = slot + 1; c <= id; ++c) offsets[c] = i;  // slots that were skipped are empty
        slot = id;
      }
      if (i == span.begin && sequences.packed) {
        begin = start;
        for (int32_t s = spans.at[k].s + 1; s <= span.s; ++s) out.cu_patches[s] = id;
      }
      const int32_t next = start + (((decisions.after >> k) & 1) != 0 || length + 1 == join.max_patch_length);
      // The next byte of the sequence has a slot. A start after the last byte would have a slot of its own.
      const int32_t seen = (i + 1 < span.end ? min_of(next, limit) : id + next - start) - 1;
      own[k] = id;
      visible[k] = seen < (sequences.packed ? min_of(begin, limit) : 0) ? -1 : seen;
    }
  }
  const int64_t base = row * sequences.num_bytes;
  store_ids(out.patch_ids + base, sequences.num_bytes, int32_t(first), aligned, own);
  store_ids(out.visible_ids + base, sequences.num_bytes, int32_t(first), aligned, visible);
  merged = warp_sum(merged);
  if (threadIdx.x % kWarp == 0 && merged != 0) atomicAdd(out.overflow + row, merged);
}

// ---- from lengths ---------------------------------------------------------------------------------------------------

// Sums the lengths of a row to offsets, with a block for each row.
__global__ void __launch_bounds__(kLayoutThreads) layout_offsets_kernel(LengthsArgs args) {
  const int64_t row = blockIdx.x, num_bytes = args.sequences.num_bytes, capacity = args.out.capacity;
  const int64_t real = last_span(args.sequences, row).end;
  int32_t* const offsets = args.out.offsets + row * (capacity + 1);
  if (threadIdx.x == 0) {
    offsets[0] = 0;
    args.closes[row] = 0;
    args.out.overflow[row] = 0;
  }
  __syncthreads();
  int64_t sum = 0, used = 0;  // the bytes so far, and the slots up to the last one that has bytes
  for (int64_t tile = 0; tile < capacity; tile += kLayoutTile) {
    const int64_t first = tile + threadIdx.x * kLayoutItems;
    int64_t lengths[kLayoutItems], own = 0;
#pragma unroll
    for (int k = 0; k < kLayoutItems; ++k) {
      int64_t length = 0;
      if (first + k < capacity) {
        const int64_t at = row * capacity + first + k;
        length = args.lengths_are_int64 ? __ldg(static_cast<const int64_t*>(args.lengths) + at)
                                        : __ldg(static_cast<const int32_t*>(args.lengths) + at);
      }
      lengths[k] = min_of(max_of(length, int64_t(0)), num_bytes + 1);
      own += lengths[k];
    }
    const Scan<int64_t> scan = block_scan(own, Sum{});
    int64_t total = sum + scan.before;
#pragma unroll
    for (int k = 0; k < kLayoutItems; ++k) {
      if (first + k < capacity) {
        if (lengths[k] > 0 && total < real) used = first + k + 1;
        if (lengths[k] > 0 && total == real) args.closes[row] = 1;
        total += lengths[k];
        offsets[first + k + 1] = int32_t(min_of(total, real));
      }
    }
    sum += scan.total;
  }
  used = block_scan(used, Max{}).total;
  if (threadIdx.x == 0) args.out.num_patches[row] = int32_t(used);
}

// The slot of byte i, where i < offsets[C].
__device__ __forceinline__ int32_t slot_at(const int32_t* offsets, int32_t capacity, int32_t i) {
  return partition_point(1, capacity, [&](int32_t slot) { return offsets[slot] <= i; }) - 1;
}

// Each thread has kLayoutItems bytes; the last block writes cu_patches.
__global__ void __launch_bounds__(kLayoutThreads)
    layout_from_lengths_kernel(LengthsArgs args, unsigned tiles, bool aligned) {
  const SequenceArgs& sequences = args.sequences;
  const LayoutOut& out = args.out;
  const int64_t row = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  if (row == sequences.batch) {
    finish_rows(sequences, out);
    return;
  }
  const int64_t first = tile * kLayoutTile + threadIdx.x * kLayoutItems;
  const int32_t* const offsets = out.offsets + row * (int64_t(out.capacity) + 1);
  const int32_t end = offsets[out.capacity], real = last_span(sequences, row).end;
  const Spans spans(sequences, row, first);
  int32_t own[kLayoutItems], visible[kLayoutItems];
  int32_t id = -1, next_id = -1, lowest = 0;  // the slots of bytes i and i + 1, and the first slot of the sequence
#pragma unroll
  for (int k = 0; k < kLayoutItems; ++k) {
    own[k] = visible[k] = -1;
    const Span& span = spans.at[k + 1];
    const int32_t i = int32_t(first) + k;
    if (span.s >= sequences.in_row) {
      continue;
    }
    if (sequences.packed && (k == 0 || i == span.begin)) {
      lowest = span.begin == 0 ? 0 : span.begin < end ? slot_at(offsets, out.capacity, span.begin) : out.num_patches[0];
    }
    if (sequences.packed && i == span.begin) {
      for (int32_t s = spans.at[k].s + 1; s <= span.s; ++s) out.cu_patches[s] = lowest;
    }
    if (i < end) {
      id = next_id >= 0 ? next_id : slot_at(offsets, out.capacity, i);
      next_id = i + 1 >= end ? -1 : i + 1 < offsets[id + 1] ? id : slot_at(offsets, out.capacity, i + 1);
      int32_t seen = next_id - 1;
      if (i + 1 >= min_of(span.end, end)) {  // the last byte of the sequence
        const int64_t s = sequences.packed ? span.s : row;
        const bool closed = sequences.next_is_start != nullptr ? sequences.next_is_start[s] != 0
                                                               : span.end == real && args.closes[row] != 0;
        seen = id - 1 + closed;
      }
      own[k] = id;
      visible[k] = seen < lowest ? -1 : seen;
    }
  }
  const int64_t base = row * sequences.num_bytes;
  store_ids(out.patch_ids + base, sequences.num_bytes, int32_t(first), aligned, own);
  store_ids(out.visible_ids + base, sequences.num_bytes, int32_t(first), aligned, visible);
}

}  // namespace blt::cuda
