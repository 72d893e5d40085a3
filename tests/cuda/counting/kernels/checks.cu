// Kernels so small that a reader can say what must be counted; tests/cuda/test_counting.py does.
#include <stdint.h>

// A loop of *turns rounds, each of which adds its number to 32 words of its own.
extern "C" __global__ void __launch_bounds__(32) loop(int32_t* data, const int32_t* turns) {
  const int32_t rounds = *turns;
#pragma unroll 1
  for (int32_t i = 0; i < rounds; ++i) data[i * 32 + threadIdx.x] += i;
}

// Lanes below *boundary take one way, the others another one: 12 stores each.
extern "C" __global__ void __launch_bounds__(32) branch(int32_t* data, const int32_t* boundary) {
  if (int32_t(threadIdx.x) < *boundary) {
#pragma unroll
    for (int i = 0; i < 12; ++i) data[i * 32 + threadIdx.x] = i;
  } else {
#pragma unroll
    for (int i = 0; i < 12; ++i) data[i * 32 + threadIdx.x] = 7 * i;
  }
}

// Each lane stores a word to shared memory, *pitch words from its neighbour's, and loads another lane's.
extern "C" __global__ void __launch_bounds__(32) banks(int32_t* out, const int32_t* pitch) {
  __shared__ int32_t words[32 * 33];
  const int lane = int(threadIdx.x);
  words[lane * *pitch] = lane;
  __syncthreads();
  out[lane] = words[(31 - lane) * *pitch];
}

// Each lane copies a word, *pitch words from its neighbour's, to out, where the words follow each other.
extern "C" __global__ void __launch_bounds__(32) stride(int32_t* out, const int32_t* data, const int32_t* pitch) {
  out[threadIdx.x] = data[int(threadIdx.x) * *pitch];
}

// Each lane loads Loads words before it needs one of them.
template <int Loads>
__device__ void sum_of(float* out, const float* data, const int32_t* turns) {
  float sum = 0;
  const int32_t rounds = *turns;
#pragma unroll 1
  for (int32_t i = 0; i < rounds; ++i) {
    float x[Loads];
#pragma unroll
    for (int k = 0; k < Loads; ++k) x[k] = data[(i * Loads + k) * 32 + threadIdx.x];
#pragma unroll
    for (int k = 0; k < Loads; ++k) sum += x[k];
  }
  out[threadIdx.x] = sum;
}
extern "C" __global__ void __launch_bounds__(32) one_load(float* out, const float* data, const int32_t* turns) {
  sum_of<1>(out, data, turns);
}
extern "C" __global__ void __launch_bounds__(32) six_loads(float* out, const float* data, const int32_t* turns) {
  sum_of<6>(out, data, turns);
}
