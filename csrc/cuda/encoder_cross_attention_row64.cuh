// The fast path of encoder_cross_attention: window 1, elements of 16 bits, heads of 64 elements, as many key heads as
// heads, and at most 4 slots. A kernel for K slots also serves K - 1.
//
// Eight lanes do a unit: one head of a patch, or of a part of a long patch. Each lane holds 16 bytes of every row, and
// a warp has 4 units. A step takes kDots / K bytes of the patch, so that there are 8 dot products with the K slots, and
// transposed_sum gives each lane one of them: byte lane / K in slot lane % K. So the softmax and its gradient are
// computed once for each byte and slot, and return to the other lanes as factors of rows.
//
// Backward walks twice over the bytes, because it must know the sum of p dp first. The first steps keep their dot
// products in shared memory, so that the second walk reads no values, and finds the keys in L1.
//
// These kernels are bound by the instructions that they issue. So rows are counted in 32 bits: the launcher refuses
// tensors for which that is not enough, which are larger than the memory of a device.
#pragma once

#include "cuda/attention_row64.cuh"
#include "cuda/cross_attention_work.cuh"
#include "cuda/divisor.h"

namespace blt::cuda {

// ---- units ----------------------------------------------------------------------------------------------------------

// What the launcher computes once for all units.
struct EncoderShape {
  int units;  // all heads of the items; these are the parts of long patches, and then the patches
  int parts, heads, slots, capacity, num_bytes;
  Divisor by_heads, by_capacity, by_tiles;
  float scale;
};

// The unit of a lane. A row of a tensor is a head of a byte or of a slot.
struct EncoderUnit {
  int count = -1;  // how many bytes there are; -1: there is nothing to do
  int part = -1;   // -1: the patch is not long
  int query = 0;   // the first slot's row of q
  int key = 0;     // the first byte's row of k and v
};

template <int kThreads>
__device__ __forceinline__ EncoderUnit encoder_unit(const CrossAttentionArgs& args, const EncoderShape& shape) {
  EncoderUnit unit;
  const unsigned number = blockIdx.x * unsigned(kThreads / kRowLanes) + threadIdx.x / kRowLanes;
  if (number >= unsigned(shape.units)) {
    return unit;
  }
  const int item = int(shape.by_heads.quotient(number)), head = int(number) - item * shape.heads;
  int b, c = item - shape.parts, low = 0, high = shape.num_bytes;
  int most = shape.parts == 0 ? high : int(kAttentionTile);  // a patch of more bytes is left to its parts
  if (c < 0) {
    c = args.long_patches[item];
    if (c < 0) {
      return unit;
    }
    unit.part = item;
    b = int(shape.by_tiles.quotient(unsigned(item) / 2));
    low = int(shape.by_tiles.remainder(unsigned(item) / 2)) * int(kAttentionTile);
    high = min_of(low + int(kAttentionTile), high);
  } else {
    b = int(shape.by_capacity.quotient(unsigned(c)));
    c -= b * shape.capacity;
  }
  const int32_t* offsets = args.begin + b * (shape.capacity + 1) + c;
  const int begin = min_of(max_of(offsets[0], low), high), end = min_of(max_of(offsets[1], low), high);
  if (end - begin <= most) {
    unit.count = max_of(end - begin, 0);
    unit.query = (b * shape.capacity + c) * shape.slots * shape.heads + head;
    unit.key = (b * shape.num_bytes + begin) * shape.heads + head;
  }
  return unit;
}

// The largest of the units' numbers; the lanes of a unit have the same one.
__device__ __forceinline__ int max_of_units(int x) {
#pragma unroll
  for (int distance = kRowLanes; distance < kWarp; distance *= 2)
    x = max_of(x, __shfl_xor_sync(kFullWarp, x, distance));
  return x;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// This lane's elements of the rows of a tensor. The compiler would compute the whole address anew for each row, so the
// assembly hides from it that the lane's place in a row is part of the address.
template <class T>
struct LaneRows {
  char* first;
  __device__ __forceinline__ explicit LaneRows(const void* tensor)
      : first(static_cast<char*>(const_cast<void*>(tensor)) + threadIdx.x % kRowLanes * sizeof(uint4)) {
#if !defined(BLT_EMULATE_CUDA)
    asm("" : "+l"(first));
#endif
  }
  __device__ __forceinline__ T* operator[](int row) const {
    return reinterpret_cast<T*>(first + int64_t(row) * int64_t(kRowWidth * sizeof(T)));
  }
};

// The accumulators of a part for one slot of a unit: a row, and two more numbers.
__device__ __forceinline__ float* part_of_slot(const CrossAttentionArgs& args, const EncoderShape& shape,
                                               const EncoderUnit& unit, int64_t part, int slot) {
  const int head = int(shape.by_heads.remainder(unsigned(unit.query)));
  return part_row<float>(args, part, slot * shape.heads + head, shape.heads, kRowWidth + 2);
}
__device__ __forceinline__ void store_part(float* part, const WideRow& row) {
#pragma unroll
  for (int e = 0; e < kRowElements; ++e) part[threadIdx.x % kRowLanes * kRowElements + e] = row.x[e];
}

__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * kLog2E); }

// The dot product of row lane / K of a step with the row of slot lane % K, which stays packed.
template <class T, int K>
__device__ __forceinline__ float dots_of_rows(const uint4 (&rows)[kDots / K], uint4 (&slots)[K]) {
  float dots[kDots];
#pragma unroll
  for (int t = 0; t < K; ++t) stay_packed(slots[t]);
#pragma unroll
  for (int u = 0; u < kDots / K; ++u) {
    const WideRow row = widen_row<T>(rows[u]);
#pragma unroll
    for (int t = 0; t < K; ++t) dots[u * K + t] = row_dot(row, widen_row<T>(slots[t]));
  }
  return transposed_sum(dots);
}

// How many steps ask for their rows together. A step of 4 slots has few bytes, whose rows alone would leave memory
// idle.
template <int K>
constexpr int kStepsOfLoad = K > 2 ? 2 : 1;

// ---- forward --------------------------------------------------------------------------------------------------------

constexpr int forward_blocks(int slots) { return slots > 2 ? 2 : 3; }

__device__ __forceinline__ void scale_row(float factor, WideRow& row) {
#pragma unroll
  for (int e = 0; e < kRowElements; ++e) row.x[e] *= factor;
}

template <class T, int K>
__global__ void __launch_bounds__(kAttentionThreads, forward_blocks(K))
    encoder_row64_kernel(CrossAttentionArgs args, EncoderShape shape) {
  constexpr int U = kDots / K, S = kStepsOfLoad<K>;
  const EncoderUnit unit = encoder_unit<kAttentionThreads>(args, shape);
  const int steps = max_of_units(unit.count);
  if (steps < 0) {
    return;
  }
  const int lane = int(threadIdx.x % kRowLanes), slots = unit.count >= 0 ? shape.slots : 0;
  const LaneRows<T> queries(args.q), keys(args.k), values(args.v);
  uint4 q[K];
  WideRow acc[K];
#pragma unroll
  for (int t = 0; t < K; ++t) {
    q[t] = t < slots ? load_row_once(queries[unit.query + t * shape.heads]) : uint4{};
    acc[t] = zero_row();
  }
  float top = minus_infinity<float>(), sum = 0;  // of slot lane % K; the sum is that of the bytes that this lane has
  const auto load = [&](const LaneRows<T>& rows, int i, uint4(&x)[U]) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      x[u] = i + u < unit.count ? load_row_once(rows[unit.key + (i + u) * shape.heads]) : uint4{};
    }
  };
  for (int first = 0; first < steps; first += S * U) {
    uint4 k[S][U], v[U];  // There are no registers for the values of more than one step.
#pragma unroll
    for (int s = 0; s < S; ++s) load(keys, first + s * U, k[s]);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      const int i = first + s * U;
      if (s > 0 && i >= steps) {
        break;
      }
      load(values, i, v);
      const float dot = dots_of_rows<T, K>(k[s], q);
      const float score = i + lane / K < unit.count ? dot * shape.scale : minus_infinity<float>();
      float largest = score;
#pragma unroll
      for (int d = K; d < kDots; d *= 2) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, d));
      largest = fmaxf(largest, top);
      // Relative to a base of -inf the weight of a score of -inf would be NaN.
      const float base = largest == minus_infinity<float>() ? 0 : largest;
      const float factor = exp_approx(top - base), weight = exp_approx(score - base);
      top = largest;
      sum = sum * factor + weight;
      if (i > 0) {
#pragma unroll
        for (int t = 0; t < K; ++t) {
          scale_row(__shfl_sync(kFullWarp, factor, t, kDots), acc[t]);
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const WideRow row = widen_row<T>(v[u]);
#pragma unroll
        for (int t = 0; t < K; ++t) add_scaled(__shfl_sync(kFullWarp, weight, u * K + t, kDots), row, acc[t]);
      }
    }
  }
#pragma unroll
  for (int d = K; d < kDots; d *= 2) sum += __shfl_xor_sync(kFullWarp, sum, d);
  if (unit.part >= 0) {
#pragma unroll
    for (int t = 0; t < K; ++t) {
      if (t < slots) {
        float* part = part_of_slot(args, shape, unit, unit.part, t);
        store_part(part, acc[t]);
        if (lane == t) part[kRowWidth] = top, part[kRowWidth + 1] = sum;
      }
    }
  }
  const float inverse = unit.count > 0 ? reciprocal_approx(sum) : 0;
  const int to_write = unit.part >= 0 ? 0 : slots;
  if (lane < to_write) {  // NaN if all scores are -inf, for then the sum is 0
    static_cast<float*>(args.lse)[unit.query + lane * shape.heads] = inverse * 0 + (top + kLn2 * log2_approx(sum));
  }
  const LaneRows<T> out(args.out);
#pragma unroll
  for (int t = 0; t < K; ++t) {
    scale_row(__shfl_sync(kFullWarp, inverse, t, kDots), acc[t]);
    if (t < to_write) store_row_once(out[unit.query + t * shape.heads], acc[t]);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// How many steps of a walk keep their dot products in shared memory.
constexpr int kHeldSteps = 8;

constexpr int backward_blocks(int slots) { return slots > 2 ? 3 : 4; }

// A step's dot products, one for each thread: the softmax except for a factor, and its gradient. Later these are the
// weight of a byte and the gradient of its score.
struct HeldDots {
  float softmax[kWalkThreads], gradient[kWalkThreads];
};

template <class T, int K>
__global__ void __launch_bounds__(kWalkThreads, backward_blocks(K))
    encoder_backward_row64_kernel(CrossAttentionArgs args, EncoderShape shape, bool only_sums) {
  constexpr int U = kDots / K, S = kStepsOfLoad<K>;
  alignas(16) __shared__ HeldDots held[kHeldSteps];
  const EncoderUnit unit = encoder_unit<kWalkThreads>(args, shape);
  const int steps = max_of_units(unit.count);
  if (steps < 0) {
    return;
  }
  const int thread = int(threadIdx.x), lane = thread % kRowLanes;
  const int slots = unit.count >= 0 ? shape.slots : 0, own_slot = lane % K;
  const bool sums_are_known = unit.part >= 0 && !only_sums;
  const LaneRows<T> queries(args.q), grads(args.grad), keys(args.k), values(args.v);
  uint4 q[K], g[K];
#pragma unroll
  for (int t = 0; t < K; ++t) {
    const int query = unit.query + t * shape.heads;
    q[t] = t < slots ? load_row_once(queries[query]) : uint4{};
    g[t] = t < slots ? load_row_once(grads[query]) : uint4{};
  }
  const float lse = own_slot < slots ? static_cast<const float*>(args.lse)[unit.query + own_slot * shape.heads] : 0.0f;
  const int own_count = own_slot < slots ? unit.count - lane / K : 0;  // bytes from the lane's first one on
  // What this lane has of a step: the softmax of its byte in its slot, except for a factor, and its gradient.
  const auto dots_of = [&](int i, const uint4(&k)[U], const uint4(&v)[U], float& softmax, float& gradient) {
    const float score = dots_of_rows<T, K>(k, q) * shape.scale;
    softmax = i < own_count ? exp_approx(score - lse) : 0.0f;
    gradient = dots_of_rows<T, K>(v, g);
  };
  const auto load = [&](const LaneRows<T>& rows, int i, uint4(&x)[U]) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      x[u] = i + u < unit.count ? load_row(rows[unit.key + (i + u) * shape.heads]) : uint4{};
    }
  };
  float sum = 0, delta = 0;
  const int summed = max_of_units(sums_are_known ? min_of(unit.count, kHeldSteps * U) : unit.count);
  for (int first = 0; first < summed; first += S * U) {
    uint4 k[S][U], v[S][U];
#pragma unroll
    for (int s = 0; s < S; ++s) {
      load(keys, first + s * U, k[s]);
      load(values, first + s * U, v[s]);
    }
#pragma unroll
    for (int s = 0; s < S; ++s) {
      const int i = first + s * U;
      if (s > 0 && i >= summed) {
        break;
      }
      float softmax, gradient;
      dots_of(i, k[s], v[s], softmax, gradient);
      sum += softmax;
      delta += softmax * gradient;
      if (i < kHeldSteps * U) held[i / U].softmax[thread] = softmax, held[i / U].gradient[thread] = gradient;
    }
  }
#pragma unroll
  for (int d = K; d < kDots; d *= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, d);
    delta += __shfl_xor_sync(kFullWarp, delta, d);
  }
  if (only_sums) {
    if (lane < slots) {
      float* part = part_of_slot(args, shape, unit, unit.part, lane);
      part[kRowWidth] = sum, part[kRowWidth + 1] = delta;
    }
    return;
  }
  if (sums_are_known) {
    sum = delta = 0;
    const AttentionItem all = Layout{args}.parts_of(unit.query / (shape.heads * shape.slots));
    for (int64_t tile = all.begin; own_slot < slots && tile < all.end; ++tile) {
      const float* part = part_of_slot(args, shape, unit, Layout::part_in(all, tile), own_slot);
      sum += part[kRowWidth], delta += part[kRowWidth + 1];
    }
  }
  const float inverse = own_slot < slots && unit.count > 0 ? reciprocal_approx(sum) : 0;
  delta *= inverse;
  const LaneRows<T> grad_keys(args.grad_k), grad_values(args.grad_v);
  const int keys_to_write = args.grad_k != nullptr ? unit.count : 0;
  const int values_to_write = args.grad_v != nullptr ? unit.count : 0;
  WideRow grad_q[K];
#pragma unroll
  for (int t = 0; t < K; ++t) grad_q[t] = zero_row();
  uint4 next[U];  // The keys of a step are asked for while the step before it computes.
  load(keys, 0, next);
  for (int i = 0; i < steps; i += U) {
    uint4 k[U];
#pragma unroll
    for (int u = 0; u < U; ++u) k[u] = next[u];
    load(keys, i + U, next);
    HeldDots& dots = held[i / U % kHeldSteps];
    float softmax, gradient;
    if (i < kHeldSteps * U) {
      softmax = dots.softmax[thread], gradient = dots.gradient[thread];
    } else {
      uint4 v[U];
      load(values, i, v);
      dots_of(i, k, v, softmax, gradient);
    }
    softmax *= inverse;
    // A NaN in the gradient of a slot must not reach rows beyond the patch.
    gradient = i < own_count ? shape.scale * softmax * (gradient - delta) : 0.0f;
    dots.softmax[thread] = softmax, dots.gradient[thread] = gradient;
    __syncwarp();
#pragma unroll
    for (int t = 0; t < K; ++t) stay_packed(q[t]), stay_packed(g[t]);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const WideRow key = widen_row<T>(k[u]);
      WideRow grad_k = zero_row();
#pragma unroll
      for (int t = 0; t < K; ++t) {
        const float of_score = dots.gradient[thread - lane + u * K + t];
        add_scaled(of_score, key, grad_q[t]);
        add_scaled(of_score, widen_row<T>(q[t]), grad_k);
      }
      if (i + u < keys_to_write) store_row_once(grad_keys[unit.key + (i + u) * shape.heads], grad_k);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      WideRow grad_v = zero_row();
#pragma unroll
      for (int t = 0; t < K; ++t) {
        add_scaled(dots.softmax[thread - lane + u * K + t], widen_row<T>(g[t]), grad_v);
      }
      if (i + u < values_to_write) store_row_once(grad_values[unit.key + (i + u) * shape.heads], grad_v);
    }
  }
  const LaneRows<T> grad_queries(args.grad_q);
#pragma unroll
  for (int t = 0; t < K; ++t) {
    if (t < slots) {
      if (unit.part >= 0) {
        store_part(part_of_slot(args, shape, unit, unit.part, t), grad_q[t]);
      } else if (args.grad_q != nullptr) {
        store_row_once(grad_queries[unit.query + t * shape.heads], grad_q[t]);
      }
    }
  }
}

}  // namespace blt::cuda
