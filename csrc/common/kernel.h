// What a header needs whose functions the CPU kernels and the CUDA kernels share.
//
// A CPU kernel is compiled once for each instruction set, and these copies may share no symbol: the linker would keep
// one copy of an inline function, perhaps the one with AVX-512 instructions, for every processor. So a shared header
// opens BLT_KERNEL_NAMESPACE, which names the instruction set on the CPU, and marks its functions with BLT_INLINE. Like
// the kernels it includes neither torch nor the C++ standard library. tests/test_packaging.py audits the symbols.
#pragma once

#include <stdint.h>

#if defined(BLT_CPU_CAPABILITY)
#define BLT_KERNEL_NAMESPACE blt::cpu::BLT_CPU_CAPABILITY
#else
#define BLT_KERNEL_NAMESPACE blt::cuda
#endif

#if defined(__CUDACC__)
#define BLT_INLINE __device__ __forceinline__
#else
#define BLT_INLINE inline __attribute__((always_inline))
#endif
