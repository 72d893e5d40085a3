// Who read and wrote each byte of a memory, to find two that must not have done so at the same time.
#pragma once

#include <stdint.h>

#include <vector>

namespace blt::ptx {

enum class Access : uint8_t { read, write, atomic };

// Those who access a memory between two points at which they wait for each other: the warps of a block, the lanes of a
// warp, the blocks of a grid. Each phase has numbers of its own, so that nothing need be erased when one begins.
struct Phase {
  uint32_t first = 1, members = 0;
  uint32_t several() const { return first + members; }
  uint32_t next() const { return several() + 1; }
};

class AccessLog {
 public:
  explicit AccessLog(int64_t bytes) : writer_(size_t(bytes)), reader_(size_t(bytes)), updater_(size_t(bytes)) {}

  // Notes an access by a member of a phase. False if it meets that of another member, and one of the two writes; atomic
  // accesses may meet each other.
  bool note(int64_t at, int64_t bytes, const Phase& phase, uint32_t member, Access access) {
    const uint32_t me = phase.first + member, several = phase.several();
    const auto current = [&](uint32_t id) { return id - phase.first <= phase.members; };
    const auto other = [&](uint32_t id) { return unsigned(current(id)) & unsigned(id != me); };
    uint32_t *writer = writer_.data() + at, *reader = reader_.data() + at, *updater = updater_.data() + at;
    unsigned conflict = 0;
    switch (access) {
      case Access::read:
        for (int64_t i = 0; i < bytes; ++i) {
          conflict |= other(writer[i]) | other(updater[i]);
          reader[i] = other(reader[i]) ? several : me;
        }
        break;
      case Access::write:
        for (int64_t i = 0; i < bytes; ++i) {
          conflict |= other(writer[i]) | other(updater[i]) | other(reader[i]);
          writer[i] = me;
        }
        break;
      case Access::atomic:
        for (int64_t i = 0; i < bytes; ++i) {
          conflict |= other(writer[i]) | other(reader[i]);
          updater[i] = other(updater[i]) ? several : me;
        }
        break;
    }
    return conflict == 0;
  }

 private:
  std::vector<uint32_t> writer_, reader_, updater_;
};

}  // namespace blt::ptx
