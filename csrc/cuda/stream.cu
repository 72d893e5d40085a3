#include "cuda/stream.h"

#include "cuda/launch.h"

#if !defined(BLT_EMULATE_CUDA)
// Functions of torch's C interface. The stream is in libtorch_cuda, and weak because a torch without CUDA does not have
// it; the guard is in libtorch_cpu, which every torch >= 2.9 has. torch's C++ wrapper of the guard
// (torch/csrc/stable/accelerator.h) is not used, because this file is free of torch's headers.
extern "C" {
__attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
int32_t aoti_torch_create_device_guard(int32_t device, blt::cuda::DeviceGuardHandle* guard);
int32_t aoti_torch_delete_device_guard(blt::cuda::DeviceGuardHandle guard);
}
#endif

namespace blt::cuda {

#if defined(BLT_EMULATE_CUDA)
OnDevice::OnDevice(int) {}
OnDevice::~OnDevice() {}
#else
OnDevice::OnDevice(int device) {
  BLT_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
            "blt_kernels: this torch was built without CUDA, and gives no CUDA stream");
  BLT_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_) == 0,
            "blt_kernels: torch gives no current stream of CUDA device ", device);
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current != device) {
    BLT_CHECK(aoti_torch_create_device_guard(device, &guard_) == 0, "blt_kernels: torch cannot make CUDA device ",
              device, " current");
  }
}

OnDevice::~OnDevice() {
  if (guard_ != nullptr) {
    aoti_torch_delete_device_guard(guard_);
  }
}
#endif

}  // namespace blt::cuda
