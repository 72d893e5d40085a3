// The device and stream that launchers run on. The ops include this, so it is free of CUDA headers.
#pragma once

// torch's own name of the type, so that a declaration here and one in torch's headers are the same.
struct DeviceGuardOpaque;

namespace blt::cuda {

using Stream = void*;  // a cudaStream_t
using DeviceGuardHandle = DeviceGuardOpaque*;

// Makes a device current during its own lifetime, and knows torch's current stream of that device.
//
// Another device than the current one is entered and left by torch's own guard. Since CUDA 12 cudaSetDevice creates a
// context on a device that has none, which takes hundreds of megabytes there: going back to a device that this process
// never used would do that. torch's guard only remembers such a device, and makes it current once it has a context.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  Stream stream() const { return stream_; }

 private:
  Stream stream_ = nullptr;
  DeviceGuardHandle guard_ = nullptr;  // null: the device was current already
};

}  // namespace blt::cuda
