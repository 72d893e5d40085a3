// The memories that a kernel sees, and what it may do with them.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "testing/ptx/access_log.h"
#include "testing/ptx/kernel.h"

namespace blt::ptx {

// The process's own memory, as far as it was allowed.
class GlobalMemory {
 public:
  void allow(const void* begin, int64_t bytes);
  void forbid_all() { allowed_.clear(); }

  // The blocks of a launch may not touch what another of them writes.
  void begin_launch(uint32_t blocks);
  void check_blocks(bool on) { checks_blocks_ = on; }

  // Throws unless the block may access these bytes.
  void check(uint64_t begin, int64_t bytes, uint32_t block, Access access);

 private:
  struct Range {
    uint64_t begin, end;
  };
  AccessLog& page(uint64_t number);

  std::vector<Range> allowed_;
  std::unordered_map<uint64_t, std::unique_ptr<AccessLog>> pages_;
  uint64_t last_number_ = 0;
  AccessLog* last_page_ = nullptr;
  Phase phase_;
  bool checks_blocks_ = true;
};

// The shared memory of the block that runs.
class SharedMemory {
 public:
  SharedMemory(int64_t bytes, uint32_t warps);

  void begin_block();
  // From here on warps see what others wrote before.
  void begin_phase() { warps_ = {warps_.next(), warps_.members}; }
  // The same for the lanes of a warp.
  Phase new_lane_phase() { return lanes_ = {lanes_.next(), kLanes}; }

  // Throws unless this lane may access these bytes, which it then does through data().
  void check(uint64_t at, int64_t bytes, uint32_t warp, const Phase& lanes, uint32_t lane, Access access);
  unsigned char* data(uint64_t at) { return data_.data() + at; }

 private:
  std::vector<unsigned char> data_, written_;
  AccessLog warp_log_, lane_log_;
  Phase warps_, lanes_;
};

}  // namespace blt::ptx
