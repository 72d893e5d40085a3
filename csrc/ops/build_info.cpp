// Chooses the instruction set that the CPU kernels use in this process, and tells it.
#include <cstdlib>
#include <cstring>

#include "cpu/dispatch.h"
#include "ops/tensor.h"

namespace blt::cpu {

const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    default:
      return "default";
  }
}

namespace {

Capability best() {
#if defined(BLT_HAS_X86_CAPABILITIES)
  // The features of the psABI levels x86-64-v4 and v3 that the kernels are compiled for.
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? Capability::avx512 : v3 ? Capability::avx2 : Capability::baseline;
#else
  return Capability::baseline;
#endif
}

Capability choose() {
  const char* wanted = std::getenv("BLT_KERNELS_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    return best();
  }
  for (const auto capability : {Capability::baseline, Capability::avx2, Capability::avx512}) {
    if (std::strcmp(wanted, capability_name(capability)) == 0) {
      BLT_CHECK(capability <= best(), "blt_kernels: BLT_KERNELS_CPU_CAPABILITY=", wanted,
                " cannot run here: this processor and build reach ", capability_name(best()));
      return capability;
    }
  }
  fail("blt_kernels: BLT_KERNELS_CPU_CAPABILITY: expected default, avx2 or avx512, got ", wanted);
}

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace blt::cpu

namespace {

std::string cpu_capability() { return blt::cpu::capability_name(blt::cpu::capability()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
