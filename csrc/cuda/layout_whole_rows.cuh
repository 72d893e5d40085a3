// The fields of a PatchLayout from patch starts where each row is one sequence, and patches may be of any length. Then
// the number of a byte's patch is the count of starts up to the byte less 1, so that sums of single bits are enough.
//
// The two launches are those of layout.cuh, but the values are read in the first one only. It leaves the decisions of
// 8 bytes of text in 2 bytes, and a count of starts for each warp. The second launch reads these, and a warp whose
// bytes all lie past the row leaves early. The last block of the second launch adds up the counts of all rows.
#pragma once

#include "cuda/divisor.h"
#include "cuda/layout_parts.cuh"

namespace blt::cuda {

constexpr int kWholeItems = 8;  // consecutive bytes of a thread
constexpr int kWholeThreads = kLayoutTile / kWholeItems;
constexpr int kWholeWarps = kWholeThreads / kWarp;
static_assert(kWholeWarps == int(sizeof(StartCounts) / sizeof(int32_t)));

// Where a thread works. `left` is how many bytes there are from byte `first` to the end of the row's sequence; behind
// it `left` is negative.
struct WholeRow {
  int64_t row;
  int32_t tile, first, end, left;

  __device__ __forceinline__ WholeRow(const SequenceArgs& sequences, Divisor tiles) {
    row = tiles.quotient(blockIdx.x);
    tile = int32_t(tiles.remainder(blockIdx.x));
    first = tile * kLayoutTile + int32_t(threadIdx.x) * kWholeItems;
    end = sequences.num_bytes;
    if (sequences.ends != nullptr && row < sequences.batch) {
      const int64_t given = sequences.ends_are_int64 ? static_cast<const int64_t*>(sequences.ends)[row]
                                                     : static_cast<const int32_t*>(sequences.ends)[row];
      end = int32_t(min_of(max_of(given, int64_t(0)), int64_t(end)));
    }
    left = end - first;
  }

  __device__ __forceinline__ int lane() const { return int(threadIdx.x) % kWarp; }
  __device__ __forceinline__ int warp() const { return int(threadIdx.x) / kWarp; }
};

constexpr int kStartBits = kWholeItems + 1;  // for the bytes of a thread and the one after them

// Bit k says whether the mask has a start at byte first + k. Past the sequence next_is_start knows it.
__device__ __forceinline__ uint32_t starts_of_mask(const StartsArgs& args, const WholeRow& at, bool aligned) {
  const int32_t num_bytes = args.sequences.num_bytes;
  uint8_t mask[kStartBits];
  load_values<kWholeItems, kStartBits, 0>(static_cast<const uint8_t*>(args.values) + at.row * num_bytes, num_bytes,
                                          at.first, aligned, mask);
  uint32_t starts = 0;
#pragma unroll
  for (int k = 0; k < kStartBits; ++k) starts |= uint32_t(mask[k] != 0) << k;
  if (at.left < kStartBits) {
    const uint8_t* const next_is_start = args.sequences.next_is_start;
    const bool next = next_is_start != nullptr && next_is_start[at.row] != 0;
    starts = (starts & ~(1u << at.left)) | uint32_t(next) << at.left;
  }
  return starts;
}

// Bit k says whether a rule starts a patch at byte first + k.
template <Rule R>
__device__ __forceinline__ uint32_t starts_of_rule(const StartsArgs& args, const WholeRow& at, bool aligned) {
  const int32_t num_bytes = args.sequences.num_bytes;
  const int64_t base = at.row * num_bytes;
  uint32_t starts = 0;
  // Byte first - 1 + k decides about bit k. At the start of the row it has no neighbour before it: `alone` is its
  // decision then.
  uint32_t alone = 0;
  if constexpr (R == Rule::fixed) {
    const uint32_t size = uint32_t(args.patch_size);
    const uint32_t phase = (uint32_t(at.first) + (args.bos_patch ? 0 : 1)) % size;
    uint32_t since = phase == 0 ? size - 1 : phase - 1;
#pragma unroll
    for (int k = 0; k < kStartBits; ++k) {
      starts |= uint32_t(since == 0) << k;
      since = since + 1 == size ? 0 : since + 1;
    }
    alone = starts;
  } else if constexpr (R == Rule::spaces) {
    int64_t tokens[kStartBits + 1];
    load_values<kWholeItems, kStartBits + 1, 2>(static_cast<const int64_t*>(args.values) + base, num_bytes, at.first,
                                                aligned, tokens);
    bool space_before = false;
#pragma unroll
    for (int k = -1; k < kStartBits; ++k) {
      const int64_t byte = byte_of(tokens[k + 1], args.byte_offset);
      const bool space = is_spacelike(byte);
      if (k >= 0) starts |= uint32_t((byte < 0) | (space & !space_before)) << k;
      if (k == 1) alone = uint32_t(byte < 0) << k;
      space_before = space;
    }
  } else {
    float e[kStartBits + 1];
    load_values<kWholeItems, kStartBits + 1, 2>(static_cast<const float*>(args.values) + base, num_bytes, at.first,
                                                aligned, e);
#pragma unroll
    for (int k = 0; k < kStartBits; ++k) {
      starts |= uint32_t(entropy_starts<R>(e[k], e[k + 1], args.threshold, args.delta)) << k;
    }
    alone = R == Rule::threshold ? starts : 0;
  }
  if (at.first == 0) {
    starts = (starts & ~2u) | (alone & 2u) | 1u;  // the first byte always starts a patch
    if (args.bos_patch) starts |= (4u << kLastForced<R>)-1;
  }
  return starts;
}

template <Rule R>
__global__ void __launch_bounds__(kWholeThreads)
    layout_decisions_kernel(StartsArgs args, Divisor tiles, uint32_t threads_of_row, bool aligned) {
  const WholeRow at(args.sequences, tiles);
  uint32_t starts = 0;
  if (at.left > 0) {
    if constexpr (R == Rule::mask) {
      starts = starts_of_mask(args, at, aligned);
    } else {
      starts = starts_of_rule<R>(args, at, aligned);
    }
    starts &= (2u << min_of(at.left, kWholeItems)) - 1;
    args.decisions[int64_t(blockIdx.x) * kWholeThreads + threadIdx.x] = uint16_t(starts);
    starts &= (1u << min_of(at.left, kWholeItems)) - 1;
  }
  const int32_t count = warp_sum(__popc(starts));
  if (at.lane() == 0) args.counts[blockIdx.x].of_warp[at.warp()] = count;
  const uint32_t slots = uint32_t(args.out.capacity) + 1;
  int32_t* const offsets = args.out.offsets + at.row * slots;
  for (int64_t c = at.tile * kWholeThreads + int(threadIdx.x); c < slots; c += threads_of_row) {
    offsets[c] = at.end;
  }
}

// Adds up `x` of the lanes up to this one.
__device__ __forceinline__ uint32_t sum_of_lanes_upto(uint32_t x) {
  const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, x, unsigned(d));
    if (lane >= d) x += before;
  }
  return x;
}

// Adds up the counts of tiles from, from + step, ... below `end`.
__device__ __forceinline__ int32_t sum_of_counts(const StartCounts* tiles, int32_t from, int32_t end, int32_t step) {
  int32_t sum = 0;
  for (int32_t t = from; t < end; t += step) {
    const Pack<int32_t, kWholeWarps> counts = load<kWholeWarps>(tiles[t].of_warp);
#pragma unroll
    for (int w = 0; w < kWholeWarps; ++w) sum += counts.data[w];
  }
  return sum;
}

// Writes num_patches and overflow, with a warp for each row, and then the running sums of num_patches.
__device__ __forceinline__ void finish_whole_rows(const StartsArgs& args, int32_t tiles) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const LayoutOut& out = args.out;
  const int64_t batch = args.sequences.batch;
  for (int64_t row = warp; row < batch; row += kWholeWarps) {
    const int32_t starts = warp_sum(sum_of_counts(args.counts + row * tiles, lane, tiles, kWarp));
    if (lane == 0) {
      out.num_patches[row] = min_of(starts, out.capacity);
      out.overflow[row] = max_of(starts - out.capacity, 0);
    }
  }
  __syncthreads();
  if (warp > 0) return;
  uint32_t sum = 0;
  if (lane == 0) out.cu_patches[0] = 0;
  for (int64_t begin = 0; begin < batch; begin += kWarp) {
    const int64_t row = begin + lane;
    const uint32_t upto = sum + sum_of_lanes_upto(row < batch ? uint32_t(out.num_patches[row]) : 0);
    if (row < batch) out.cu_patches[row + 1] = int32_t(upto);
    sum = __shfl_sync(kFullWarp, upto, kWarp - 1);
  }
}

// Each block has a tile, except the last one, which finishes the rows.
__global__ void __launch_bounds__(kWholeThreads)
    layout_ids_kernel(StartsArgs args, Divisor tiles, int32_t tiles_of_row, bool aligned) {
  __shared__ int32_t sums[kWholeWarps];
  const LayoutOut& out = args.out;
  const WholeRow at(args.sequences, tiles);
  if (at.row == args.sequences.batch) {
    finish_whole_rows(args, tiles_of_row);
    return;
  }
  uint32_t starts = 0;
  if (at.left > 0) starts = args.decisions[int64_t(blockIdx.x) * kWholeThreads + threadIdx.x];
  const StartCounts* const counts = args.counts + at.row * tiles_of_row;
  int32_t number = -1;  // of the last start before this thread's bytes
  if (at.tile > 0) {
    const int32_t sum = warp_sum(sum_of_counts(counts, int32_t(threadIdx.x), at.tile, kWholeThreads));
    if (at.lane() == 0) sums[at.warp()] = sum;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWholeWarps; ++w) number += sums[w];
  }
  const int32_t num_bytes = args.sequences.num_bytes;
  if (num_bytes <= at.first - at.lane() * kWholeItems) return;  // the same for all lanes
  const Pack<int32_t, kWholeWarps> own_tile = load<kWholeWarps>(counts[at.tile].of_warp);
#pragma unroll
  for (int w = 0; w < kWholeWarps - 1; ++w) number += w < at.warp() ? own_tile.data[w] : 0;
  const int own_count = __popc(starts & ((1u << max_of(0, min_of(at.left, kWholeItems))) - 1));
  number += int32_t(sum_of_lanes_upto(uint32_t(own_count))) - own_count;

  const int32_t last_slot = out.capacity - 1;
  int32_t* const offsets = out.offsets + at.row * (int64_t(out.capacity) + 1);
  int32_t own[kWholeItems], visible[kWholeItems];
#pragma unroll
  for (int k = 0; k < kWholeItems; ++k) {
    own[k] = visible[k] = -1;
    if (k < at.left) {
      const bool here = ((starts >> k) & 1) != 0;
      number += here;
      own[k] = min_of(number, last_slot);
      if (here && number <= last_slot) offsets[number] = at.first + k;
      const int32_t next = int32_t((starts >> (k + 1)) & 1);
      // The next byte of the sequence has a slot. A start after the last byte would have a slot of its own.
      visible[k] = max_of((k + 1 < at.left ? min_of(number + next, last_slot) : own[k] + next) - 1, -1);
    }
  }
  const int64_t base = at.row * num_bytes;
  store_ids(out.patch_ids + base, num_bytes, at.first, aligned, own);
  store_ids(out.visible_ids + base, num_bytes, at.first, aligned, visible);
}

}  // namespace blt::cuda
