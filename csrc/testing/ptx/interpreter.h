// The loaded kernels, and how they run.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "testing/ptx/launch.h"
#include "testing/ptx/memory.h"

namespace blt::ptx {

class Interpreter {
 public:
  static Interpreter& instance();

  // Kernels of a file replace those of the same name.
  void load(const std::string& path);
  // Whether launches of the library come here, and whether the last block and warp run first.
  void set_mode(bool on, bool reversed);
  bool is_on() const { return on_; }

  void launch(const std::string& name, const Grid& grid, const std::vector<Argument>& arguments);

  GlobalMemory& memory() { return memory_; }
  const std::map<std::string, std::unique_ptr<Kernel>>& kernels() const { return kernels_; }
  Kernel& kernel(const std::string& name);

 private:
  Interpreter() = default;

  std::map<std::string, std::unique_ptr<Kernel>> kernels_;
  GlobalMemory memory_;
  std::mutex running_;
  bool on_ = false, reversed_ = false;
};

}  // namespace blt::ptx
