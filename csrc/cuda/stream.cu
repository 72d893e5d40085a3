#include "cuda/stream.h"

#include "cuda/launch.h"

#if !defined(BLT_EMULATE_CUDA)
// A function of torch's C interface, in libtorch_cuda. It is weak, because a torch without CUDA does not have it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace blt::cuda {

#if defined(BLT_EMULATE_CUDA)
OnDevice::OnDevice(int) {}
OnDevice::~OnDevice() {}
#else
OnDevice::OnDevice(int device) {
  BLT_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
            "blt_kernels: this torch was built without CUDA, and gives no CUDA stream");
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current != device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    previous_ = current;
  }
  BLT_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_) == 0,
            "blt_kernels: torch gives no current stream of CUDA device ", device);
}

OnDevice::~OnDevice() {
  if (previous_ >= 0) {
    cudaSetDevice(previous_);
  }
}
#endif

}  // namespace blt::cuda
