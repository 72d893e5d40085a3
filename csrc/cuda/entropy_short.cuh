// entropy and its gradient of short rows. They follow each other in memory, so a warp copies its rows into shared
// memory in words of 16 bytes, wherever the rows begin in them, and in backward the gradient out of it. There each row
// has 8 lanes, which read 4 logits at a time. Rows that are not aligned are copied logit by logit; the rest is the
// same.
#pragma once

#include "cuda/entropy.h"
#include "cuda/entropy_sums.cuh"

namespace blt::cuda {

constexpr int kRowsOfTurn = 4;                                     // that a warp works on at the same time
constexpr int kEntropyLanes = kWarp / kRowsOfTurn;                 // of a row
constexpr int kEntropyStep = kEntropyLanes * kEntropyQuad;         // logits that the lanes of a row read at once
constexpr int kEntropyShared = 40 * 1024;                          // bytes of shared memory for the rows of a block
constexpr int kEntropyShort = kEntropyShared / (4 * kRowsOfTurn);  // bytes of the longest short row: 4 warps a block

struct ShortRowsShape {
  int vocab;
  int pitch;    // distance between rows in shared memory, in logits
  int rows;     // of a block
  bool packed;  // the rows lie one after the other there as they do in global memory, and are aligned in both
};

// The rows that a warp has: those of one turn, or of two where rows are so short that a turn has little to do.
template <int Quads>
constexpr int kEntropyTurns = Quads == 8 ? 2 : 1;
template <int Quads>
constexpr int kRowsOfWarp = kRowsOfTurn * kEntropyTurns<Quads>;

// A warp's rows, in shared memory. Quads: how often the lanes of a row read a quad, or 0 where that is known at run
// time only.
template <class T, int Quads>
class ShortRows {
 public:
  static constexpr int kRows = kRowsOfWarp<Quads>;

  const ShortRowsShape shape;
  const int64_t first;  // of all rows
  const int count;      // 0 or less where the block has no rows left for the warp
  T* const shared;

  __device__ __forceinline__ ShortRows(const ShortRowsShape& shape, int64_t rows, T* shared_of_block)
      : shape(shape),
        first(int64_t(blockIdx.x) * shape.rows + first_in_block()),
        count(min_of(kRows,
                     int(min_of<int64_t>(shape.rows, rows - int64_t(blockIdx.x) * shape.rows)) - first_in_block())),
        shared(shared_of_block + first_in_block() * shape.pitch) {}

  __device__ __forceinline__ void read(const T* logits) const {
    const T* rows = logits + first * shape.vocab;
    if (count < kRows) {
      fill_missing_rows();
    }
    if (shape.packed) {
      read_words(rows);
    } else {
      copy_logits(rows, shape.vocab, shared, shape.pitch);
    }
  }

  __device__ __forceinline__ void write(T* out) const {
    T* rows = out + first * shape.vocab;
    if (shape.packed) {
      write_words(rows);
    } else {
      copy_logits(shared, shape.pitch, rows, shape.vocab);
    }
  }

 private:
  static constexpr int kRounds =
      kEntropyTurns<Quads> * Quads * int(sizeof(T)) / 4;                       // words of a lane, for most lengths
  static constexpr int kBatch = kRounds == 0 ? 4 : kRounds < 8 ? kRounds : 8;  // words in flight
  static_assert(kRounds % kBatch == 0);

  static __device__ __forceinline__ int first_in_block() { return int(threadIdx.x / kWarp) * kRows; }
  static __device__ __forceinline__ int lane() { return int(threadIdx.x % kWarp); }

  // Their lanes take part in whatever the warp does together.
  __device__ __forceinline__ void fill_missing_rows() const {
    for (int i = count * shape.pitch + lane(); i < kRows * shape.pitch; i += kWarp) shared[i] = T();
  }

  __device__ __forceinline__ void copy_logits(const T* from, int from_pitch, T* to, int to_pitch) const {
#pragma unroll 1
    for (int r = 0; r < count; ++r) {
#pragma unroll 4
      for (int i = lane(); i < shape.vocab; i += kWarp) to[r * to_pitch + i] = from[r * from_pitch + i];
    }
  }

  // Words of 16 bytes. All rows of a warp are whole words. If rows are missing, logits may be left over.
  __device__ __forceinline__ unsigned num_words() const {
    return unsigned(count * shape.vocab) * unsigned(sizeof(T)) / 16;
  }
  __device__ __forceinline__ void copy_left_over(const T* from, T* to) const {
    if (const int i = int(num_words() * 16 / unsigned(sizeof(T))) + lane(); i < count * shape.vocab) to[i] = from[i];
  }

  // Copies words of a lane, all of which are in flight together.
  template <int Words>
  static __device__ __forceinline__ void copy_words(const uint4* from, uint4* to) {
    uint4 x[Words];
#pragma unroll
    for (int w = 0; w < Words; ++w) x[w] = __ldcs(from + w * kWarp);
#pragma unroll
    for (int w = 0; w < Words; ++w) to[w * kWarp] = x[w];
  }

  __device__ __forceinline__ void read_words(const T* rows) const {
    const uint4* from = reinterpret_cast<const uint4*>(rows) + lane();
    uint4* to = reinterpret_cast<uint4*>(shared) + lane();
    const unsigned words = num_words(), whole = words / kWarp * kWarp;  // whole: those of which every lane has as many
    const bool has_rest = unsigned(lane()) < words % kWarp;
    uint4 rest;
    if (has_rest) rest = __ldcs(from + whole);  // in flight together with the others
    if (kRounds > 0 && whole == unsigned(kRounds) * kWarp) {
#pragma unroll
      for (int round = 0; round < kRounds; round += kBatch) {
        copy_words<kBatch>(from + round * kWarp, to + round * kWarp);
      }
    } else {
      unsigned i = 0;
#pragma unroll 1
      for (; i + 4 * kWarp <= whole; i += 4 * kWarp) copy_words<4>(from + i, to + i);
#pragma unroll 1
      for (; i < whole; i += kWarp) copy_words<1>(from + i, to + i);
    }
    if (has_rest) to[whole] = rest;
    if (count < kRows) {
      copy_left_over(rows, shared);
    }
  }

  __device__ __forceinline__ void write_words(T* rows) const {
    const uint4* from = reinterpret_cast<const uint4*>(shared);
    uint4* to = reinterpret_cast<uint4*>(rows);
    const unsigned words = num_words();
#pragma unroll 4
    for (unsigned i = unsigned(lane()); i < words; i += kWarp) __stcs(to + i, from[i]);
    if (count < kRows) {
      copy_left_over(shared, rows);
    }
  }
};

// A lane's share of a row in shared memory. Few quads whose number is known stay in registers.
template <class T, int Quads>
struct ShareOfRow {
  using A = Acc<T>;
  static constexpr bool kKept = Quads > 0 && Quads * sizeof(T) <= 16;
  static constexpr int kUnrollShared =
      Quads > 0 ? 8 : 4;  // loops over quads in shared memory: more would take registers
  static constexpr int kUnroll = kKept ? Quads : kUnrollShared;
  Quad<T>* quads;              // the first; the next ones lie kEntropyLanes further each
  int num_quads, num_singles;  // singles: the logits beyond all lanes' quads, of which each lane takes one at a time
  Quad<T> kept[kKept ? Quads : 1];
  T first_single;

  __device__ __forceinline__ ShareOfRow(T* row, int vocab) {
    const int lane = int(threadIdx.x % kEntropyLanes);
    num_quads = Quads > 0 ? Quads : int(unsigned(vocab) / kEntropyStep);
    num_singles = vocab - num_quads * kEntropyStep;
    quads = reinterpret_cast<Quad<T>*>(row) + lane;
    if constexpr (kKept) {
#pragma unroll
      for (int i = 0; i < Quads; ++i) kept[i] = quads[i * kEntropyLanes];
    }
    first_single = has_single(0) ? single(0) : narrow<T>(minus_infinity<A>());
  }

  __device__ __forceinline__ Quad<T> quad(int i) const {
    if constexpr (kKept) {
      return kept[i];
    } else {
      return quads[i * kEntropyLanes];
    }
  }

  __device__ __forceinline__ bool has_single(int i) const { return int(threadIdx.x % kEntropyLanes) < num_singles - i; }
  __device__ __forceinline__ T& single(int i) const {  // counted from the first quad, whose address is at hand
    const int lane = int(threadIdx.x % kEntropyLanes);
    return reinterpret_cast<T*>(quads)[num_quads * kEntropyStep + lane - lane * kEntropyQuad + i];
  }

  __device__ __forceinline__ A max() const {
    Largest<T> largest;
#pragma unroll kUnroll
    for (int i = 0; i < num_quads; ++i) largest.add(quad(i));
    largest.add(first_single);
#pragma unroll 1
    for (int i = kEntropyLanes; i < num_singles; i += kEntropyLanes) {
      if (has_single(i)) largest.add(single(i));
    }
    return largest.template over_lanes<kEntropyLanes>();
  }

  template <bool Clamped>
  __device__ __forceinline__ void add_sums(A max, A& sum, A& dot) const {
    const auto below = [max](A x) { return Clamped ? below_max(x, max) : x - max; };
    EntropySums<A> sums;
#pragma unroll kUnroll
    for (int i = 0; i < num_quads; ++i) {
      A x[kEntropyQuad];
      widen_quad<T>(quad(i), x);
#pragma unroll
      for (int e = 0; e < kEntropyQuad; ++e) sums.add(e, below(x[e]));
    }
    sums.add(0, below_max(widen(first_single), max));
#pragma unroll 1
    for (int i = kEntropyLanes; i < num_singles; i += kEntropyLanes) {
      sums.add(0, has_single(i) ? below(widen(single(i))) : kExpFloor<A>);
    }
    sum = sum_over_lanes<kEntropyLanes>(sums.sum());
    dot = sum_over_lanes<kEntropyLanes>(sums.dot());
  }

  // A logit of -inf, or a distance that overflows, needs the clamp, and shows as NaN: its power 0 times its distance.
  // Such rows are summed again. Where no logit needs the clamp, both sums have the same bits.
  __device__ __forceinline__ void sums(A max, A& sum, A& dot) const {
    add_sums<false>(max, sum, dot);
    if (__ballot_sync(kFullWarp, dot != dot) != 0) {
      add_sums<true>(max, sum, dot);
    }
  }
};

template <class T, int Quads>
__global__ void __launch_bounds__(kEntropyThreads, 3) entropy_kernel(EntropyArgs args, ShortRowsShape shape) {
  using A = Acc<T>;
  alignas(32) __shared__ T shared[kEntropyShared / sizeof(T)];
  const ShortRows<T, Quads> rows(shape, args.rows, shared);
  if (rows.count <= 0) {
    return;
  }
  rows.read(static_cast<const T*>(args.logits));
  __syncwarp();
  const int lane = int(threadIdx.x % kWarp);
  A sum = 1, dot = 0;  // of the row whose entropy this lane stores
#pragma unroll 1
  for (int turn = 0; turn < kEntropyTurns<Quads>; ++turn) {
    const ShareOfRow<T, Quads> share(rows.shared + (turn * kRowsOfTurn + lane / kEntropyLanes) * shape.pitch,
                                     shape.vocab);
    A s, w;
    share.sums(share.max(), s, w);
    if (lane % kEntropyLanes == turn) sum = s, dot = w;
  }
  const int row = lane % kEntropyLanes * kRowsOfTurn + lane / kEntropyLanes;
  if (lane % kEntropyLanes < kEntropyTurns<Quads> && row < rows.count) {
    static_cast<A*>(args.out)[rows.first + row] = entropy_of(sum, dot);
  }
}

// The gradient replaces the logits in shared memory.
template <class T, int Quads>
__global__ void __launch_bounds__(kEntropyThreads, 3)
    entropy_backward_kernel(EntropyBackwardArgs args, ShortRowsShape shape) {
  using A = Acc<T>;
  alignas(32) __shared__ T shared[kEntropyShared / sizeof(T)];
  const ShortRows<T, Quads> rows(shape, args.rows, shared);
  if (rows.count <= 0) {
    return;
  }
  rows.read(static_cast<const T*>(args.logits));
  __syncwarp();
  const int lane = int(threadIdx.x % kWarp);
#pragma unroll 1
  for (int turn = 0; turn < kEntropyTurns<Quads>; ++turn) {
    const int row = turn * kRowsOfTurn + lane / kEntropyLanes;
    const ShareOfRow<T, Quads> share(rows.shared + row * shape.pitch, shape.vocab);
    const A grad = static_cast<const A*>(args.grad)[rows.first + min_of(row, rows.count - 1)];
    const A max = share.max();
    A sum, dot;
    share.sums(max, sum, dot);
    const EntropyGradient<T> gradient(max, sum, dot, grad);
#pragma unroll(share.kUnrollShared)
    for (int i = 0; i < share.num_quads; ++i) {
      Quad<T>& quad = share.quads[i * kEntropyLanes];
      quad = gradient.of(quad);
    }
#pragma unroll 1
    for (int i = 0; i < share.num_singles; i += kEntropyLanes) {
      if (share.has_single(i)) share.single(i) = narrow<T>(gradient.of(widen(share.single(i))));
    }
  }
  __syncwarp();
  rows.write(static_cast<T*>(args.out));
}

}  // namespace blt::cuda
