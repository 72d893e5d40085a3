// Where launchers run. Free of CUDA headers: the ops include it.
#pragma once

namespace blt::cuda {

using Stream = void*;  // a cudaStream_t

// Makes a device current while it lives, and knows torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  Stream stream() const { return stream_; }

 private:
  Stream stream_ = nullptr;
  int previous_ = -1;  // the device to go back to; -1: it is the same
};

}  // namespace blt::cuda
