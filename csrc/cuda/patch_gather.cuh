// patch_gather copies rows, whatever their element type.
// At least these bytes must move: ids once, every row of y that a byte sees once, and out once. Bytes that see the same
// patch follow each other, so that all but the first of them find its row in L1 or L2.
#pragma once

#include "cuda/device.h"
#include "cuda/patch_gather.h"

namespace blt::cuda {

constexpr int kGatherThreads = 256;
constexpr int kGatherRows = 4;  // rows of a lane, which loads from all of them before its first store

// How many lanes copy a row together: a power of two, and a whole warp for rows of 512 bytes or more.
inline int gather_lanes(int64_t accesses) {
  int lanes = 1;
  while (lanes < kWarp && lanes < accesses) lanes *= 2;
  return lanes;
}

template <class Access>
__global__ void __launch_bounds__(kGatherThreads)
    patch_gather_kernel(PatchGatherArgs args, int64_t accesses, int lanes) {
  const int64_t thread = int64_t(blockIdx.x) * kGatherThreads + threadIdx.x;
  const int64_t first = thread / lanes * kGatherRows;
  const auto* const y = static_cast<const Access*>(args.y);
  auto* const out = static_cast<Access*>(args.out);
  const Access* from[kGatherRows];
  for (int r = 0; r < kGatherRows; ++r) {
    const int64_t row = first + r;
    from[r] = nullptr;
    if (row < args.rows) {
      const int64_t id = min_of(int64_t(args.ids[row]), args.capacity - 1);
      from[r] = id < 0 ? nullptr : y + (row / args.num_bytes * args.capacity + id) * accesses;
    }
  }
  for (int64_t j = thread % lanes; j < accesses; j += lanes) {
    Access v[kGatherRows];
    for (int r = 0; r < kGatherRows; ++r) {
      v[r] = from[r] == nullptr ? Access{} : __ldg(from[r] + j);
    }
    for (int r = 0; r < kGatherRows; ++r) {
      if (first + r < args.rows) {
        __stcs(out + (first + r) * accesses + j, v[r]);
      }
    }
  }
}

// Sets begin = end = N, which stays in the slots after the last one that has bytes.
__global__ void __launch_bounds__(kGatherThreads) segments_init_kernel(SegmentsArgs args, int64_t slots) {
  const int64_t c = int64_t(blockIdx.x) * kGatherThreads + threadIdx.x;
  if (c < slots) {
    args.begin[c] = args.end[c] = int32_t(args.num_bytes);
  }
}

// Each byte has a thread, which writes if a run of equal ids starts or ends there. Slots that the run skips are empty,
// and lie at its start.
__global__ void __launch_bounds__(kGatherThreads) segments_kernel(SegmentsArgs args) {
  const int64_t row = int64_t(blockIdx.x) * kGatherThreads + threadIdx.x;
  if (row >= args.rows) {
    return;
  }
  const int64_t b = row / args.num_bytes, i = row % args.num_bytes;
  const int32_t* ids = args.ids + b * args.num_bytes;
  const int32_t limit = int32_t(args.capacity - 1);
  const auto id_at = [&](int64_t j) { return min_of(ids[j], limit); };
  const int32_t id = id_at(i);
  if (id < 0) {
    return;
  }
  int32_t *const begin = args.begin + b * args.capacity, *const end = args.end + b * args.capacity;
  if (i == 0 || id_at(i - 1) != id) {
    int64_t before = i - 1;
    while (before >= 0 && ids[before] < 0) --before;
    for (int32_t c = before < 0 ? 0 : id_at(before) + 1; c < id; ++c) {
      begin[c] = end[c] = int32_t(i);
    }
    begin[id] = int32_t(i);
  }
  if (i + 1 == args.num_bytes || id_at(i + 1) != id) {
    end[id] = int32_t(i + 1);
  }
}

}  // namespace blt::cuda
