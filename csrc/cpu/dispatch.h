// Run-time choice among the CPU kernels compiled for several instruction sets.
//
//   BLT_CPU_KERNEL(patch_pool, const PatchPoolArgs& args, int64_t begin, int64_t end)
//
// declares the kernel in every capability's namespace (csrc/cpu/<op>.cpp defines it, compiled once for each) and,
// outside the kernels, `patch_pool_cpu()`: the version for this processor.
#pragma once

#include <stdint.h>

namespace blt::cpu {

enum class Capability : int32_t { baseline, avx2, avx512 };

// The best of what was built and what this processor has; BLT_KERNELS_CPU_CAPABILITY=default|avx2|avx512 forces one.
// Read once a process. Throws std::runtime_error when the forced one cannot run here.
Capability capability();
const char* capability_name(Capability capability);

}  // namespace blt::cpu

#if defined(BLT_CPU_CAPABILITY)  // inside a kernel: the definitions only
#define BLT_CPU_KERNEL(name, ...)       \
  namespace BLT_CPU_CAPABILITY {        \
  void name(__VA_ARGS__);               \
  }
#elif defined(BLT_HAS_X86_CAPABILITIES)
#define BLT_CPU_KERNEL(name, ...)                  \
  namespace cpu_default {                          \
  void name(__VA_ARGS__);                          \
  }                                                \
  namespace cpu_avx2 {                             \
  void name(__VA_ARGS__);                          \
  }                                                \
  namespace cpu_avx512 {                           \
  void name(__VA_ARGS__);                          \
  }                                                \
  inline decltype(&cpu_default::name) name##_cpu() { \
    switch (capability()) {                        \
      case Capability::avx512:                     \
        return &cpu_avx512::name;                  \
      case Capability::avx2:                       \
        return &cpu_avx2::name;                    \
      default:                                     \
        return &cpu_default::name;                 \
    }                                              \
  }
#else
#define BLT_CPU_KERNEL(name, ...)       \
  namespace cpu_default {               \
  void name(__VA_ARGS__);               \
  }                                     \
  inline decltype(&cpu_default::name) name##_cpu() { return &cpu_default::name; }
#endif
