// Kernels that are broken on purpose, one fault each, to show that the interpreter of PTX refuses them
// (tests/cuda/test_ptx_refusals.py). kBroken = false is the same kernel without its fault. Blocks have 64 threads, and
// x has an element for each thread of the grid.
#include <stdint.h>

namespace {

constexpr int kThreads = 64;

__device__ float* own(float* x) { return x + blockIdx.x * kThreads + threadIdx.x; }

}  // namespace

template <bool kBroken>
__global__ void misaligned(float* x) {
  if (threadIdx.x < kThreads / 4) {
    *reinterpret_cast<float2*>(x + 2 * threadIdx.x + (kBroken ? 1 : 0)) = make_float2(1, 2);
  }
}

template <bool kBroken>
__global__ void outside(float* x) {
  x[threadIdx.x + (kBroken ? 1 : 0)] = 1;
}

template <bool kBroken>
__global__ void beyond_shared(float* x) {  // launched with room for an element of each thread
  extern __shared__ float values[];
  values[threadIdx.x + (kBroken ? 1 : 0)] = *own(x);
}

template <bool kBroken>
__global__ void unwritten(float* x) {
  __shared__ float values[kThreads];
  if (!kBroken || threadIdx.x > 0) {
    values[threadIdx.x] = 1;
  }
  __syncthreads();
  *own(x) = values[kThreads - 1 - threadIdx.x];
}

template <bool kBroken>
__global__ void race_of_warps(float* x) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = *own(x);
  if (!kBroken) {
    __syncthreads();
  }
  *own(x) = values[kThreads - 1 - threadIdx.x];
}

template <bool kBroken>
__global__ void race_of_lanes(float* x) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = *own(x);
  if (!kBroken) {
    __syncwarp();
  }
  *own(x) = values[threadIdx.x ^ 1];
}

template <bool kBroken>
__global__ void race_of_blocks(float* x) {
  if (kBroken) {
    x[threadIdx.x] += 1;
  } else {
    atomicAdd(x + threadIdx.x, 1.0f);
  }
}

template <bool kBroken>
__global__ void barrier_of_some_lanes(float* x) {
  *own(x) += 1;
  if (!kBroken || threadIdx.x < 40) {
    __syncthreads();
  }
  *own(x) += 1;
}

template <bool kBroken>
__global__ void barrier_of_one_warp(float* x) {
  *own(x) += 1;
  if (!kBroken || threadIdx.x < 32) {
    __syncthreads();
  }
  *own(x) += 1;
}

template <bool kBroken>
__global__ void barrier_after_return(float* x) {
  if (kBroken) {  // in assembler, because nvcc makes of a return a branch around the barrier
    asm volatile("{ .reg .pred late; setp.ge.u32 late, %0, 40; @late exit; }" ::"r"(threadIdx.x));
  }
  *own(x) += 1;
  __syncthreads();
  *own(x) += 1;
}

template <bool kBroken>
__global__ void inactive_lane(float* x) {
  float value = *own(x);
  if (threadIdx.x % 32 < 20) {
    value = __shfl_sync((1u << 20) - 1, value, kBroken ? 25 : 15);
  }
  *own(x) = value;
}

template <bool kBroken>
__global__ void missing_lanes(float* x) {
  float value = *own(x);
  if (threadIdx.x % 32 < 20) {
    value = __shfl_sync(kBroken ? 0xffffffffu : (1u << 20) - 1, value, 15);
  }
  *own(x) = value;
}

template <bool kBroken>
__global__ void local_memory(float* x) {
  float values[kThreads];
  for (int i = 0; i < kThreads; ++i) values[i] = x[i];
  *own(x) = values[kBroken ? int(values[threadIdx.x]) % kThreads : 0];
}

template <bool kBroken>
__global__ void unknown_opcode(float* x) {
  *own(x) = kBroken ? float(__dp4a(int(threadIdx.x), 0x01010101, 0)) : 0.0f;
}

#define BLT_INSTANTIATE(kernel)                   \
  template __global__ void kernel<false>(float*); \
  template __global__ void kernel<true>(float*)
BLT_INSTANTIATE(misaligned);
BLT_INSTANTIATE(outside);
BLT_INSTANTIATE(beyond_shared);
BLT_INSTANTIATE(unwritten);
BLT_INSTANTIATE(race_of_warps);
BLT_INSTANTIATE(race_of_lanes);
BLT_INSTANTIATE(race_of_blocks);
BLT_INSTANTIATE(barrier_of_some_lanes);
BLT_INSTANTIATE(barrier_of_one_warp);
BLT_INSTANTIATE(barrier_after_return);
BLT_INSTANTIATE(inactive_lane);
BLT_INSTANTIATE(missing_lanes);
BLT_INSTANTIATE(local_memory);
BLT_INSTANTIATE(unknown_opcode);
