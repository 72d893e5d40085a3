// Rows of 64 elements of 16 bits, the usual size of a head. Eight lanes hold a row together, eight elements each, so
// that a row is read and written in one access and the dot products of eight rows are summed by transposed_sum.cuh.
#pragma once

#include "cuda/cross_attention.h"
#include "cuda/transposed_sum.cuh"

namespace blt::cuda {

constexpr int kRowWidth = 64;
constexpr int kRowLanes = kDots;
constexpr int kRowElements = kRowWidth / kRowLanes;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Whether heads and slots are such that the kernels for these rows serve them; they also need a window of 1 and aligned
// rows of 16-bit elements.
inline bool has_row64_shape(const CrossAttentionArgs& args) {
  return args.width == kRowWidth && args.heads == args.kv_heads && args.slots <= 4;
}

// ---- a lane's eight elements: packed in four words, or widened to fp32 ----------------------------------------------

struct WideRow {
  float x[kRowElements];
};

__device__ __forceinline__ WideRow zero_row() {
  WideRow row;
#pragma unroll
  for (int e = 0; e < kRowElements; ++e) row.x[e] = 0;
  return row;
}

template <class T>
__device__ __forceinline__ WideRow widen_row(const uint4& words) {
  const uint32_t pairs[] = {words.x, words.y, words.z, words.w};
  WideRow row;
#pragma unroll
  for (int p = 0; p < kRowElements / 2; ++p) {
    row.x[2 * p] = low_of<T>(pairs[p]), row.x[2 * p + 1] = high_of<T>(pairs[p]);
  }
  return row;
}

template <class T>
__device__ __forceinline__ uint4 narrow_row(const WideRow& row) {
  return {pair_of<T>(row.x[0], row.x[1]), pair_of<T>(row.x[2], row.x[3]), pair_of<T>(row.x[4], row.x[5]),
          pair_of<T>(row.x[6], row.x[7])};
}

// This lane's share of the dot product of two rows.
__device__ __forceinline__ float row_dot(const WideRow& a, const WideRow& b) {
  float sum = a.x[0] * b.x[0];
#pragma unroll
  for (int e = 1; e < kRowElements; ++e) sum += a.x[e] * b.x[e];
  return sum;
}

// acc += factor * row
__device__ __forceinline__ void add_scaled(float factor, const WideRow& row, WideRow& acc) {
#pragma unroll
  for (int e = 0; e < kRowElements; ++e) acc.x[e] += factor * row.x[e];
}

// The compiler widens a packed row once for all its uses, and before a loop where it can, which takes the registers
// that a packed row is to save. Uses after this call widen it anew.
__device__ __forceinline__ void stay_packed(uint4& row) {
#if !defined(BLT_EMULATE_CUDA)
  asm volatile("" : "+r"(row.x), "+r"(row.y), "+r"(row.z), "+r"(row.w));
#endif
}

// A row that stays in registers: widened once, or packed where registers are scarce, and then widened at each use.
template <class T, bool kPacked>
struct HeldRow {
  WideRow row = zero_row();
  __device__ __forceinline__ void set(const uint4& words) { row = widen_row<T>(words); }
  __device__ __forceinline__ WideRow wide() const { return row; }
};
template <class T>
struct HeldRow<T, true> {
  uint4 words = {};
  __device__ __forceinline__ void set(const uint4& x) { words = x; }
  __device__ __forceinline__ WideRow wide() {
    stay_packed(words);
    return widen_row<T>(words);
  }
};

// ---- memory: `row` points to this lane's elements -------------------------------------------------------------------

template <class T>
__device__ __forceinline__ uint4 load_row(const T* row) {
  return __ldg(reinterpret_cast<const uint4*>(row));
}
// Loads and stores a row that is not used again.
template <class T>
__device__ __forceinline__ uint4 load_row_once(const T* row) {
  return __ldcs(reinterpret_cast<const uint4*>(row));
}
template <class T>
__device__ __forceinline__ void store_row_once(T* row, const WideRow& x) {
  __stcs(reinterpret_cast<uint4*>(row), narrow_row<T>(x));
}

// ---- tasks ----------------------------------------------------------------------------------------------------------

// Eight lanes do one head of an item. Those of a warp mostly do heads of the same item, which follow each other in
// memory. Items past the last one have a task too, because all lanes of a warp must take part in its shuffles.
struct HeadTask {
  unsigned item, head;
  int lane;  // 0 .. 7

  __device__ __forceinline__ explicit HeadTask(const CrossAttentionArgs& args) {
    const unsigned group = blockIdx.x * (blockDim.x / kRowLanes) + threadIdx.x / kRowLanes;
    item = group / unsigned(args.heads), head = group % unsigned(args.heads);
    lane = int(threadIdx.x) % kRowLanes;
  }
};

}  // namespace blt::cuda
