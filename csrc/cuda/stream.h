// The device and stream that launchers run on. The ops include this, so it is free of CUDA headers.
#pragma once

namespace blt::cuda {

using Stream = void*;  // a cudaStream_t

// Makes a device current during its own lifetime, and knows torch's current stream of that device.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  Stream stream() const { return stream_; }

 private:
  Stream stream_ = nullptr;
  int previous_ = -1;  // the device to go back to; -1: it is the same device
};

}  // namespace blt::cuda
