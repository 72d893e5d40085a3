// The fast path of decoder_cross_attention with window 1: rows of 64 elements of 16 bits, as many key heads as heads,
// K = 1 .. 4 slots.
//
// A multiprocessor issues few instructions for each byte that moves, so instructions are what these kernels save. The
// dot products of several bytes with all slots of their patches are summed together, eight at a time, so that lane l of
// the eight lanes that hold a row ends up with dot product l. It computes the softmax of that one alone and hands the
// weight out to the other lanes.
#pragma once

#include "cuda/attention_row64.cuh"
#include "cuda/cross_attention_work.cuh"

namespace blt::cuda {

constexpr int kRow64Threads = 128;

// How many bytes a step of the forward works on, whose q rows are loaded while the step before it is still computing.
constexpr int kStep = 4;
// The items of the forward are tiles of kRow64Tile consecutive bytes, counted over all batch rows.
constexpr int kRow64Tile = kRowLanes;

// K rounded up to a power of two: how many lanes have the dot products of a byte with its K slots. Dot products of
// slots that are not there count as scores of -inf.
template <int K>
constexpr int kLanesOfSlots = K <= 2 ? 2 : 4;

// The sum and the largest of x over P neighbouring lanes.
template <int P>
__device__ __forceinline__ float sum_over_slots(float x) {
#pragma unroll
  for (int distance = 1; distance < P; distance *= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}
template <int P>
__device__ __forceinline__ float max_over_slots(float x) {
#pragma unroll
  for (int distance = 1; distance < P; distance *= 2) x = max_or_nan(x, __shfl_xor_sync(kFullWarp, x, distance));
  return x;
}

// Reads the slots of a patch, unless they are held already. Without a patch (-1) the held rows are zeros, so that a
// weight of 0 gives 0 also after a patch with infinities or NaN.
template <class T, int K, class Held>
__device__ __forceinline__ void hold_slots(const T* rows, int patch, int row, int& held, Held (&into)[K]) {
  if (patch != held) {
    held = patch;
    const T* const first = rows + int64_t(patch) * (K * row);
#pragma unroll
    for (int s = 0; s < K; ++s) into[s].set(patch < 0 ? uint4{} : load_row(first + s * row));
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kRow64Threads, K <= 2 ? 6 : 5)
    decoder_row64_kernel(CrossAttentionArgs args, float scale) {
  constexpr int P = kLanesOfSlots<K>;
  constexpr int kSums = kStep * P / kDots;  // eight dot products each
  using Held = HeldRow<T, (K > 2)>;
  const HeadTask task(args);
  const int lane = task.lane, heads = int(args.heads), row = heads * kRowWidth;
  const int64_t begin = int64_t(task.item) * kRow64Tile;
  const int count = int(min_of(args.batch * args.num_bytes - begin, int64_t(kRow64Tile)));  // 0 or less: no such tile
  const int column = int(task.head) * kRowWidth + lane * kRowElements;
  const T* const queries = static_cast<const T*>(args.q) + begin * row + column;
  T* const out = static_cast<T*>(args.out) + begin * row + column;
  const T* const keys = static_cast<const T*>(args.k) + column;
  const T* const values = static_cast<const T*>(args.v) + column;

  uint4 q[kStep];  // loaded first, because they depend on nothing
  const auto load_queries = [&](int first) {
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      q[u] = {};
      if (first + u < count) q[u] = load_row_once(queries + (first + u) * row);
    }
  };
  load_queries(0);

  // Lane l has the patch that byte l of the tile sees, counted over all batch rows; -1 if it sees none.
  int patch_of_lane = -1;
  if (lane < count) {
    const unsigned byte = unsigned(begin) + unsigned(lane);
    const int capacity = int(args.capacity), id = min_of(__ldg(args.ids + byte), capacity - 1);
    patch_of_lane = id < 0 ? -1 : int(byte / unsigned(args.num_bytes)) * capacity + id;
  }

  Held k[K], v[K];
  int held_keys = -1, held_values = -1;  // the patches whose rows k and v hold
#pragma unroll 1
  for (int i = 0; i < kRow64Tile; i += kStep) {
    int patch[kStep];
#pragma unroll
    for (int u = 0; u < kStep; ++u) patch[u] = __shfl_sync(kFullWarp, patch_of_lane, i + u, kRowLanes);

    float weight[kSums];  // of dot product `lane` of each sum
#pragma unroll
    for (int n = 0; n < kSums; ++n) {
      float dots[kDots] = {};
#pragma unroll
      for (int u = 0; u < kDots / P; ++u) {
        hold_slots(keys, patch[n * kDots / P + u], row, held_keys, k);
        const WideRow query = widen_row<T>(q[n * kDots / P + u]);
#pragma unroll
        for (int s = 0; s < K; ++s) dots[u * P + s] = row_dot(query, k[s].wide());
      }
      if (n + 1 == kSums && i + kStep < kRow64Tile) load_queries(i + kStep);

      const int byte = i + (n * kDots + lane) / P;
      const bool sees = __shfl_sync(kFullWarp, patch_of_lane, byte, kRowLanes) >= 0;
      const float dot = transposed_sum(dots), score = lane % P < K ? dot * scale : minus_infinity<float>();
      const float top = max_over_slots<P>(score), power = exp2_approx((score - top) * kLog2E);
      const float sum = sum_over_slots<P>(power);
      weight[n] = sees ? power * reciprocal_approx(sum) : 0.f;
      if (lane % P == 0 && byte < count) {
        const float lse = sees ? top + log2_approx(sum) * kLn2 : minus_infinity<float>();
        static_cast<float*>(args.lse)[(begin + byte) * heads + task.head] = lse;
      }
    }

#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      hold_slots(values, patch[u], row, held_values, v);
      WideRow sum = zero_row();
#pragma unroll
      for (int s = 0; s < K; ++s) {
        const int d = u * P + s;
        add_scaled(__shfl_sync(kFullWarp, weight[d / kDots], d % kDots, kRowLanes), v[s].wide(), sum);
      }
      if (i + u < count) store_row_once(out + (i + u) * row, sum);
    }
  }
}

// The items are the parts of long patches and then the patches. A walk over the bytes of an item gives all gradients:
// those of the bytes are final at once, those of the slots are summed in registers. The rows of the first kAhead bytes,
// which are all bytes of most patches, are asked for together with those of the slots.
template <class T, int K>
__global__ void __launch_bounds__(kRow64Threads, 3)
    decoder_backward_row64_kernel(CrossAttentionArgs args, float scale, int64_t parts) {
  constexpr int P = kLanesOfSlots<K>;
  constexpr int kBytes = kDots / (2 * P);            // bytes of a step: each has P scores, then P dp
  constexpr int kAhead = K > 3 ? 1 : K > 2 ? 2 : 4;  // bytes whose rows are held or under way: what registers allow
  const HeadTask task(args);
  const int lane = task.lane, heads = int(args.heads), row = heads * kRowWidth;
  const bool active = task.item < parts + args.batch * args.capacity;
  const AttentionItem item = active ? Layout{args}.bytes_of(task.item, parts) : AttentionItem{};
  const int count = item.count();
  int steps = count;  // as many for all lanes of the warp
#pragma unroll
  for (int distance = kRowLanes; distance < kWarp; distance *= 2) {
    steps = max_of(steps, __shfl_xor_sync(kFullWarp, steps, distance));
  }
  const int column = int(task.head) * kRowWidth + lane * kRowElements;
  const int64_t first_slot = item.index * (K * row) + column;

  // The first query row of the next round of the loop, and what its bytes need.
  unsigned query = unsigned(item.begin) * unsigned(heads) + task.head;
  uint4 q[kAhead], g[kAhead];
  const auto load_byte = [&](int byte, int u, unsigned of_round) {
    q[u] = g[u] = {};
    if (byte < count) {
      const int64_t at = int64_t(of_round + unsigned(u * heads)) * kRowWidth + lane * kRowElements;
      q[u] = load_row_once(static_cast<const T*>(args.q) + at);
      g[u] = load_row_once(static_cast<const T*>(args.grad) + at);
    }
  };
  uint4 key[K], v[K];
#pragma unroll
  for (int s = 0; s < K; ++s) {
    key[s] = v[s] = {};
    if (item.index >= 0) {
      key[s] = load_row_once(static_cast<const T*>(args.k) + first_slot + s * row);
      v[s] = load_row_once(static_cast<const T*>(args.v) + first_slot + s * row);
    }
  }
#pragma unroll
  for (int u = 0; u < kAhead; ++u) load_byte(u, u, query);

  WideRow k[K], grad_k[K], grad_v[K];
#pragma unroll
  for (int s = 0; s < K; ++s) {
    k[s] = widen_row<T>(key[s]);
    grad_k[s] = grad_v[s] = zero_row();
  }
#pragma unroll 1
  for (int round = 0; round < steps; round += kAhead, query += unsigned(kAhead * heads)) {
#pragma unroll
    for (int first = 0; first < kAhead; first += kBytes) {
      const int i = round + first;
      if (i >= steps) {
        break;
      }
      const int byte = first + lane / (2 * P);  // of the round: the byte of this lane's dot product
      const bool known = round + byte < count, valid = known && lane % P < K, has_dp = (lane & P) != 0;
      const float lse = known ? __ldg(static_cast<const float*>(args.lse) + (query + unsigned(byte * heads))) : 0.f;
      float dots[kDots] = {};
#pragma unroll
      for (int s = 0; s < K; ++s) stay_packed(v[s]);
#pragma unroll
      for (int u = 0; u < kBytes; ++u) {
        stay_packed(q[first + u]), stay_packed(g[first + u]);
        const WideRow wide_q = widen_row<T>(q[first + u]), wide_g = widen_row<T>(g[first + u]);
#pragma unroll
        for (int s = 0; s < K; ++s) {
          dots[2 * P * u + s] = row_dot(wide_q, k[s]);
          dots[2 * P * u + P + s] = row_dot(wide_g, widen_row<T>(v[s]));
        }
      }
      const float mine = transposed_sum(dots), other = __shfl_xor_sync(kFullWarp, mine, P);
      const float score = has_dp ? other : mine, dp = has_dp ? mine : other;
      const float power = valid ? exp2_approx((score * scale - lse) * kLog2E) : 0.f;
      const float p = power * reciprocal_approx(sum_over_slots<P>(power));
      const float delta = sum_over_slots<P>(p * dp), dscore = scale * p * (dp - delta);
      const float factor = valid ? (has_dp ? dscore : p) : 0.f;
#pragma unroll
      for (int u = 0; u < kBytes; ++u) {
        stay_packed(q[first + u]), stay_packed(g[first + u]);
        const WideRow wide_q = widen_row<T>(q[first + u]), wide_g = widen_row<T>(g[first + u]);
        WideRow sum = zero_row();
#pragma unroll
        for (int s = 0; s < K; ++s) {
          const float p_of_slot = __shfl_sync(kFullWarp, factor, 2 * P * u + s, kRowLanes);
          const float dscore_of_slot = __shfl_sync(kFullWarp, factor, 2 * P * u + P + s, kRowLanes);
          add_scaled(dscore_of_slot, k[s], sum);
          add_scaled(dscore_of_slot, wide_q, grad_k[s]);
          add_scaled(p_of_slot, wide_g, grad_v[s]);
        }
        if (i + u < count && args.grad_q != nullptr) {
          const int64_t at = int64_t(query + unsigned((first + u) * heads)) * kRowWidth + lane * kRowElements;
          store_row_once(static_cast<T*>(args.grad_q) + at, sum);
        }
        load_byte(i + u + kAhead, first + u, query + unsigned(kAhead * heads));
      }
    }
  }
  if (item.index < 0) {
    return;
  }
#pragma unroll
  for (int s = 0; s < K; ++s) {
    if (item.part >= 0) {
      float* const part = part_row<float>(args, item.part, s * heads + int(task.head), heads, 2 * kRowWidth);
#pragma unroll
      for (int e = 0; e < kRowElements; ++e) {
        part[lane * kRowElements + e] = grad_k[s].x[e];
        part[kRowWidth + lane * kRowElements + e] = grad_v[s].x[e];
      }
    } else {
      if (args.grad_k != nullptr) store_row_once(static_cast<T*>(args.grad_k) + first_slot + s * row, grad_k[s]);
      if (args.grad_v != nullptr) store_row_once(static_cast<T*>(args.grad_v) + first_slot + s * row, grad_v[s]);
    }
  }
}

}  // namespace blt::cuda
