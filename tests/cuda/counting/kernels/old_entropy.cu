// The entropy kernel of commit b8e7d37 for bfloat16, whose instructions were counted by hand: 472 a row of 260 logits.
// The counter is checked against that figure, so this file stays as it is when the library's kernel changes.
#include <cuda_bf16.h>
#include <stdint.h>

constexpr int kWarp = 32, kWarps = 8, kPack = 4, kPacks = 4, kChunk = kWarp * kPack * kPacks;

__device__ float below_max(float x, float max) {
  const float d = x - max;
  return d < -150.0f ? -150.0f : d;
}

__device__ float widen(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

__device__ void load_chunk(const uint16_t* row, int64_t begin, int64_t vocab, int width, float (&x)[kPacks][kPack]) {
  const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t i = begin + (p * kWarp + lane) * kPack;
    if (width == kPack && i + kPack <= vocab) {
      const uint2 pack = __ldcs(reinterpret_cast<const uint2*>(row + i));
      x[p][0] = widen(uint16_t(pack.x)), x[p][1] = widen(uint16_t(pack.x >> 16));
      x[p][2] = widen(uint16_t(pack.y)), x[p][3] = widen(uint16_t(pack.y >> 16));
    } else {
#pragma unroll
      for (int e = 0; e < kPack; ++e) x[p][e] = i + e < vocab ? widen(row[i + e]) : -INFINITY;
    }
  }
}

__device__ float warp_max(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, lanes);
    x = other > x || other != other ? other : x;
  }
  return x;
}

__device__ float warp_sum(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

struct EntropySums {
  float max = -INFINITY, sum = 0, dot = 0;

  __device__ void add(const float (&x)[kPacks][kPack]) {
    float top = x[0][0];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) top = x[p][e] > top || x[p][e] != x[p][e] ? x[p][e] : top;
    }
    top = warp_max(top);
    if (top == -INFINITY) return;
    const float raised = max > top || max != max ? max : top;
    if (sum != 0) {
      const float shift = below_max(max, raised), factor = __expf(shift);
      dot = factor * (dot + shift * sum);
      sum *= factor;
    }
    max = raised;
    float s = 0, w = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      float pack_s = 0, pack_w = 0;
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const float d = below_max(x[p][e], max), power = __expf(d);
        pack_s += power;
        pack_w += power * d;
      }
      s += pack_s;
      w += pack_w;
    }
    sum += warp_sum(s);
    dot += warp_sum(w);
  }
};

// sizes: rows, logits of a row, logits that can be read at once.
extern "C" __global__ void __launch_bounds__(kWarps* kWarp)
    old_entropy(const uint16_t* logits, float* out, const int64_t* sizes) {
  const int64_t rows = sizes[0], vocab = sizes[1];
  const int width = int(sizes[2]);
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (r >= rows) return;
  EntropySums sums;
  float x[kPacks][kPack];
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    load_chunk(logits + r * vocab, begin, vocab, width, x);
    sums.add(x);
  }
  if (threadIdx.x % kWarp == 0) out[r] = logf(sums.sum) - sums.dot / sums.sum;
}
