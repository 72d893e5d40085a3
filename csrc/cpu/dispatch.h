// The choice, at run time, among the CPU kernels that are compiled for several instruction sets.
//
//   BLT_CPU_KERNEL(patch_pool, const PatchPoolArgs& args, int64_t begin, int64_t end)
//
// declares the kernel in the namespace of every capability; csrc/cpu/<op>.cpp defines it, and is compiled once for
// each. Outside the kernels it also defines `patch_pool_cpu()`, which returns the version for this processor.
#pragma once

#include <stdint.h>

namespace blt::cpu {

enum class Capability : int32_t { baseline, avx2, avx512 };

// The best capability that was built and that this processor has. BLT_KERNELS_CPU_CAPABILITY=default|avx2|avx512 forces
// one; the variable is read once a process. Throws std::runtime_error when the forced one cannot run here.
Capability capability();
const char* capability_name(Capability capability);

}  // namespace blt::cpu

#if defined(BLT_CPU_CAPABILITY)  // a kernel declares itself only
#define BLT_CPU_KERNEL(name, ...) \
  namespace BLT_CPU_CAPABILITY {  \
  void name(__VA_ARGS__);         \
  }
#elif defined(BLT_HAS_X86_CAPABILITIES)
#define BLT_CPU_KERNEL(name, ...)                    \
  namespace cpu_default {                            \
  void name(__VA_ARGS__);                            \
  }                                                  \
  namespace cpu_avx2 {                               \
  void name(__VA_ARGS__);                            \
  }                                                  \
  namespace cpu_avx512 {                             \
  void name(__VA_ARGS__);                            \
  }                                                  \
  inline decltype(&cpu_default::name) name##_cpu() { \
    switch (capability()) {                          \
      case Capability::avx512:                       \
        return &cpu_avx512::name;                    \
      case Capability::avx2:                         \
        return &cpu_avx2::name;                      \
      default:                                       \
        return &cpu_default::name;                   \
    }                                                \
  }
#else
#define BLT_CPU_KERNEL(name, ...) \
  namespace cpu_default {         \
  void name(__VA_ARGS__);         \
  }                               \
  inline decltype(&cpu_default::name) name##_cpu() { return &cpu_default::name; }
#endif
