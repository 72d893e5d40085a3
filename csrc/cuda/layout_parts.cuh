// What the kernels that make a PatchLayout share.
#pragma once

#include "common/segment_rules.h"
#include "cuda/device.h"
#include "cuda/layout.h"

namespace blt::cuda {

// Loads `Count` values of a row from first - Before on, and 0 outside of the row. The thread's own `Items` values are
// loaded in as few accesses as possible.
template <int Items, int Count, int Before, class T>
__device__ __forceinline__ void load_values(const T* row, int32_t num_bytes, int32_t first, bool aligned,
                                            T (&values)[Count]) {
  constexpr int kWide = sizeof(T) * Items > 16 ? 16 / int(sizeof(T)) : Items;
  const int32_t left = num_bytes - first;
  const bool wide = aligned && left >= Items;
  if (wide) {
#pragma unroll
    for (int k = 0; k < Items; k += kWide) {
      const Pack<T, kWide> pack = load<kWide>(row + first + k);
#pragma unroll
      for (int e = 0; e < kWide; ++e) values[Before + k + e] = pack.data[e];
    }
  }
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    const int i = k - Before;
    const bool own = i >= 0 && i < Items;
    if (!(own && wide)) values[k] = i >= -first && i < left ? __ldg(row + first + i) : T(0);
  }
}

constexpr int kIdsAccess = 4;  // ids that are stored at once

// Stores what `ids` has for a thread's bytes in as few accesses as possible.
template <int Items>
__device__ __forceinline__ void store_ids(int32_t* row, int32_t num_bytes, int32_t first, bool aligned,
                                          const int32_t (&ids)[Items]) {
  const int32_t left = num_bytes - first;
  if (aligned && left >= Items) {
#pragma unroll
    for (int k = 0; k < Items; k += kIdsAccess) {
      Pack<int32_t, kIdsAccess> pack;
#pragma unroll
      for (int e = 0; e < kIdsAccess; ++e) pack.data[e] = ids[k + e];
      store_once(row + first + k, pack);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < Items; ++k) {
    if (k < left) row[first + k] = ids[k];
  }
}

}  // namespace blt::cuda
