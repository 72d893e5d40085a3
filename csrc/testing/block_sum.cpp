// A kernel that tests the sanitizer run itself: without its barrier it has a race, which the thread sanitizer must
// find.
#include "cuda/launch.h"
#include "ops/tensor.h"

namespace {

constexpr int kThreads = 64;

template <bool kBarrier>
__global__ void block_sum_kernel(const float* x, float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = x[blockIdx.x * kThreads + threadIdx.x];
  if (kBarrier) {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += values[i];
    out[blockIdx.x] = sum;
  }
  __syncthreads();
}

// x [blocks, 64] -> [blocks]
blt::Tensor block_sum(const blt::Tensor& x, bool barrier) {
  const blt::Tensor out = blt::empty({x.size(0)}, blt::ScalarType::Float);
  blt::cuda::launch("block_sum", barrier ? block_sum_kernel<true> : block_sum_kernel<false>, x.size(0), kThreads, 0,
                    nullptr, x.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels_emulated, m) { m.def("block_sum(Tensor x, bool barrier) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(blt_kernels_emulated, CPU, m) { m.impl("block_sum", TORCH_BOX(&block_sum)); }
