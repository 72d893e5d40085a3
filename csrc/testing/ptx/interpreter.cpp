#include "testing/ptx/interpreter.h"

#include <algorithm>
#include <fstream>
#include <sstream>

#include "testing/ptx/lanes.h"
#include "testing/ptx/parser.h"

namespace blt::ptx {

namespace {

std::vector<unsigned char> pack_arguments(const Kernel& kernel, const std::vector<Argument>& arguments) {
  BLT_CHECK(arguments.size() == kernel.parameters.size(), "ptx: ", readable(kernel.name), ": expected ",
            kernel.parameters.size(), " arguments, got ", arguments.size());
  std::vector<unsigned char> out(size_t(kernel.parameter_bytes) + 1);
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Parameter& parameter = kernel.parameters[i];
    BLT_CHECK(arguments[i].bytes == parameter.bytes, "ptx: ", readable(kernel.name), ": argument ", i, ": expected ",
              parameter.bytes, " bytes, got ", arguments[i].bytes);
    memcpy(out.data() + parameter.at, arguments[i].data, size_t(parameter.bytes));
  }
  return out;
}

// The warps of a block. Their registers serve one block after the other.
class Team {
 public:
  Team(const Kernel& kernel, const Grid& grid, Block& block, bool reversed)
      : kernel_(kernel), grid_(grid), block_(block), warps_(size_t((grid.threads + kLanes - 1) / kLanes)) {
    constexpr size_t kAlign = 64;
    const size_t stride = size_t(kernel.register_bytes) + kAlign;
    registers_.resize(stride * warps_.size());
    for (size_t w = 0; w < warps_.size(); ++w) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(registers_.data() + w * stride);
      warps_[w].registers = reinterpret_cast<unsigned char*>((address + kAlign - 1) / kAlign * kAlign);
      warps_[w].index = uint32_t(w);
      warps_[w].block = &block;
      order_.push_back(&warps_[w]);
      set_constants(warps_[w]);
    }
    if (reversed) std::reverse(order_.begin(), order_.end());
  }

  // Runs one block, from barrier to barrier.
  void run_block() {
    block_.shared->begin_block();
    for (Warp& warp : warps_) start(warp);
    for (;;) {
      for (Warp* warp : order_) {
        if (warp->state == State::runs) run(kernel_, *warp);
      }
      const auto waiting =
          std::find_if(warps_.begin(), warps_.end(), [](const Warp& w) { return w.state == State::waits; });
      if (waiting == warps_.end()) return;
      for (const Warp& warp : warps_) {
        BLT_CHECK(warp.state == State::waits, "ptx: ", readable(kernel_.name), ": block ", block_.index, ": `",
                  kernel_.instructions[size_t(waiting->path.next) - 1].text, "`: a barrier that only a part of the ",
                  "block reaches: warp ", waiting->index, " waits at it, but warp ", warp.index, " has left");
      }
      block_.shared->begin_phase();
      for (Warp& warp : warps_) {
        warp.state = State::runs;
        warp.lane_phase = block_.shared->new_lane_phase();
      }
    }
  }

 private:
  template <class T>
  static void fill(Warp& warp, const Operand& place, T value) {
    std::fill_n(column<T>(warp, place), kLanes, value);
  }

  void set_constants(Warp& warp) const {
    for (const auto& [place, bits] : kernel_.constants) {
      switch (place.width) {
        case 0:
          predicate(warp, place) = Mask(bits);
          break;
        case 2:
          fill(warp, place, uint16_t(bits));
          break;
        case 4:
          fill(warp, place, uint32_t(bits));
          break;
        case 8:
          fill(warp, place, bits);
          break;
        default:
          fail("ptx: a constant of ", place.width, " bytes");
      }
    }
  }

  void start(Warp& warp) const {
    const int left = grid_.threads - int(warp.index) * kLanes;
    warp.started = warp.alive = left >= kLanes ? kAllLanes : (Mask(1) << left) - 1;
    warp.state = State::runs;
    warp.path = {0, int(kernel_.instructions.size()), warp.started};
    warp.others.clear();
    warp.lane_phase = block_.shared->new_lane_phase();
    if (kernel_.block.exists()) fill(warp, kernel_.block, block_.index);
    if (kernel_.blocks.exists()) fill(warp, kernel_.blocks, uint32_t(grid_.blocks));
    if (kernel_.threads.exists()) fill(warp, kernel_.threads, uint32_t(grid_.threads));
    for (uint32_t l = 0; l < kLanes; ++l) {
      if (kernel_.thread.exists()) column<uint32_t>(warp, kernel_.thread)[l] = warp.index * kLanes + l;
      if (kernel_.lane.exists()) column<uint32_t>(warp, kernel_.lane)[l] = l;
    }
  }

  const Kernel& kernel_;
  const Grid& grid_;
  Block& block_;
  std::vector<unsigned char> registers_;
  std::vector<Warp> warps_;
  std::vector<Warp*> order_;
};

}  // namespace

Interpreter& Interpreter::instance() {
  static Interpreter interpreter;
  return interpreter;
}

void Interpreter::load(const std::string& path) {
  std::ifstream file(path);
  BLT_CHECK(file.good(), "ptx: cannot read ", path);
  std::stringstream text;
  text << file.rdbuf();
  for (std::unique_ptr<Kernel>& kernel : parse(text.str())) {
    std::unique_ptr<Kernel>& place = kernels_[kernel->name];
    place = std::move(kernel);
  }
}

void Interpreter::set_mode(bool on, bool reversed) { on_ = on, reversed_ = reversed; }

Kernel& Interpreter::kernel(const std::string& name) {
  const auto found = kernels_.find(name);
  BLT_CHECK(found != kernels_.end(), "ptx: no kernel ", readable(name), " is loaded");
  return *found->second;
}

void Interpreter::launch(const std::string& name, const Grid& grid, const std::vector<Argument>& arguments) {
  constexpr int kMostThreads = 1024;
  const std::lock_guard<std::mutex> lock(running_);
  Kernel& kernel = this->kernel(name);
  BLT_CHECK(kernel.refusal.empty(), "ptx: ", readable(name), ": ", kernel.refusal);
  BLT_CHECK(grid.blocks > 0 && grid.blocks <= INT32_MAX && grid.threads > 0 && grid.threads <= kMostThreads,
            "ptx: ", readable(name), ": a grid of ", grid.blocks, " blocks of ", grid.threads, " threads");
  const std::vector<unsigned char> parameters = pack_arguments(kernel, arguments);
  kernel.launched = true;
  kernel.launched_threads = grid.threads;
  kernel.launched_shared = kernel.shared_bytes + grid.shared;
  memory_.begin_launch(uint32_t(grid.blocks));
  SharedMemory shared(kernel.shared_bytes + grid.shared, uint32_t((grid.threads + kLanes - 1) / kLanes));
  Block block{0, &shared, &memory_, parameters.data(), kernel.parameter_bytes};
  Team team(kernel, grid, block, reversed_);
  for (int64_t b = 0; b < grid.blocks; ++b) {
    block.index = uint32_t(reversed_ ? grid.blocks - 1 - b : b);
    team.run_block();
  }
}

bool is_on() { return Interpreter::instance().is_on(); }

void launch(const std::string& kernel, const Grid& grid, const std::vector<Argument>& arguments) {
  Interpreter::instance().launch(kernel, grid, arguments);
}

}  // namespace blt::ptx
