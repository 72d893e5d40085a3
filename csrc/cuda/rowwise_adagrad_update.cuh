// rowwise_adagrad_update: a warp for each row that the gradient lists.
// At least these bytes must move: the row numbers and the gradient once, the listed rows and their state read and
// written once. The gradient is read twice, the second time from L1.
#pragma once

#include "cuda/device.h"
#include "cuda/rowwise_adagrad_update.h"

namespace blt::cuda {

constexpr int kAdagradThreads = 256, kAdagradRows = kAdagradThreads / kWarp;  // rows of a thread block

// The numbers of a step in the type that the kernel computes in, converted once on the host.
template <class A>
struct AdagradStep {
  A lr, eps, kept;  // kept = 1 - lr * weight_decay
};

// N elements of a row are accessed at once.
template <class T, int N>
__global__ void __launch_bounds__(kAdagradThreads)
    rowwise_adagrad_update_kernel(RowwiseAdagradArgs args, AdagradStep<Acc<T>> step) {
  using A = Acc<T>;
  const int64_t entry = int64_t(blockIdx.x) * kAdagradRows + threadIdx.x / kWarp;
  const int64_t index = entry < args.count ? args.rows[entry] : -1;
  if (index < 0 || index >= args.table_rows) {
    return;  // the whole warp
  }
  const int lane = int(threadIdx.x) % kWarp;
  const T* const value = static_cast<const T*>(args.values) + entry * args.width;
  T* const row = static_cast<T*>(args.table) + index * args.width;
  A* const state = static_cast<A*>(args.state) + index;
  const A scale = args.scale == nullptr ? A(1) : *static_cast<const A*>(args.scale);
  A squares = 0;
#pragma unroll 4
  for (int64_t d = lane * N; d < args.width; d += kWarp * N) {
    const Pack<T, N> g = load<N>(value + d);
#pragma unroll
    for (int e = 0; e < N; ++e) squares += (widen(g.data[e]) * scale) * (widen(g.data[e]) * scale);
  }
  const A sum = *state + warp_sum(squares) / A(args.width);
  const A factor = scale * step.lr / (A(sqrt(sum)) + step.eps);
#pragma unroll 4
  for (int64_t d = lane * N; d < args.width; d += kWarp * N) {
    const Pack<T, N> g = load<N>(value + d);
    Pack<T, N> x = *reinterpret_cast<const Pack<T, N>*>(row + d);
#pragma unroll
    for (int e = 0; e < N; ++e) x.data[e] = narrow<T>(widen(x.data[e]) * step.kept - widen(g.data[e]) * factor);
    *reinterpret_cast<Pack<T, N>*>(row + d) = x;
  }
  __syncwarp();  // every lane has read the state
  if (lane == 0) {
    *state = sum;
  }
}

}  // namespace blt::cuda
