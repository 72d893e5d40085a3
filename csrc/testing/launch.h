// Launches of the emulated library: the kernel's host twin runs, or the PTX that nvcc made of the kernel.
#pragma once

#include <dlfcn.h>

#include <tuple>

#include "common/check.h"
#include "testing/emulator.h"
#include "testing/ptx/launch.h"

namespace blt::emulator {

// The twin's symbol is the name that nvcc gives the kernel.
inline void launch_ptx(const char* name, const void* twin, const ptx::Grid& grid,
                       const std::vector<ptx::Argument>& arguments) {
  Dl_info info;
  BLT_CHECK(dladdr(twin, &info) != 0 && info.dli_sname != nullptr && info.dli_saddr == twin, "blt_kernels: ", name,
            ": the kernel has no symbol");
  ptx::launch(info.dli_sname, grid, arguments);
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
            const Args&... args) {
  if (blocks == 0) {
    return;
  }
  if (ptx::is_on()) {
    const std::tuple<Params...> values(static_cast<Params>(args)...);
    const auto arguments = std::apply(
        [](const auto&... value) { return std::vector<ptx::Argument>{{&value, int64_t(sizeof(value))}...}; }, values);
    launch_ptx(name, reinterpret_cast<const void*>(kernel), {blocks, threads, int64_t(shared)}, arguments);
  } else {
    launch(dim3(unsigned(blocks)), dim3(unsigned(threads)), shared, [&] { kernel(args...); });
  }
}

}  // namespace blt::emulator
