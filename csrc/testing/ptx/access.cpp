#include "testing/ptx/access.h"

#include <algorithm>
#include <array>

namespace blt::ptx {

namespace {

using Addresses = std::array<uint64_t, kLanes>;

Addresses addresses_of(Warp& warp, const Instruction& instruction, const Operand& address, Mask lanes) {
  Addresses out;
  const uint64_t offset = uint64_t(instruction.offset);
  if (address.width == 8) {
    const uint64_t* base = column<uint64_t>(warp, address);
    for (size_t l = 0; l < kLanes; ++l) out[l] = base[l] + offset;
  } else {
    const uint32_t* base = column<uint32_t>(warp, address);
    for (size_t l = 0; l < kLanes; ++l) out[l] = uint32_t(base[l] + offset);
  }
  for_each_lane(lanes, [&](int l) {
    BLT_CHECK(out[size_t(l)] % uint64_t(instruction.access()) == 0, "misaligned: ", instruction.access(),
              " bytes at address ", out[size_t(l)]);
  });
  return out;
}

// The addresses of the lanes in ascending order, each once. Aligned accesses of one size do not overlap otherwise.
int distinct(const Addresses& addresses, Mask lanes, Addresses& out) {
  int count = 0;
  bool ascending = true;
  for_each_lane(lanes, [&](int l) {
    const uint64_t address = addresses[size_t(l)];
    if (count > 0 && address == out[size_t(count - 1)]) return;
    ascending &= count == 0 || address > out[size_t(count - 1)];
    out[size_t(count++)] = address;
  });
  if (ascending) return count;
  std::sort(out.begin(), out.begin() + count);
  return int(std::unique(out.begin(), out.begin() + count) - out.begin());
}

void check_global(Warp& warp, const Instruction& instruction, const Addresses& addresses, Mask lanes, Access access) {
  Addresses ordered;
  const int count = distinct(addresses, lanes, ordered);
  const uint64_t bytes = uint64_t(instruction.access());
  constexpr uint64_t kSector = 32;
  uint64_t sector = UINT64_MAX;
  for (int begin = 0, end; begin < count; begin = end) {  // whole stretches of bytes at once
    for (end = begin + 1; end < count && ordered[size_t(end)] == ordered[size_t(end - 1)] + bytes; ++end) {
    }
    warp.block->global->check(ordered[size_t(begin)], int64_t(bytes) * (end - begin), warp.block->index, access);
  }
  for (int i = 0; i < count; ++i) {
    const uint64_t next = ordered[size_t(i)] / kSector;
    instruction.counters.sectors += next != sector;
    sector = next;
  }
  instruction.counters.bytes += int64_t(bytes) * count;
}

// How often the banks must be asked: 32 banks give one 4-byte word each at a time. 8-byte accesses are done by half
// warps, 16-byte accesses by quarters.
int wavefronts(const Addresses& addresses, Mask lanes, int bytes) {
  constexpr int kBanks = 32, kWord = 4;
  const int group = bytes <= kWord ? kLanes : kLanes * kWord / bytes;
  int passes = 0;
  for (int begin = 0; begin < kLanes; begin += group) {
    std::array<uint64_t, kLanes> words;
    int count = 0;
    for (int l = begin; l < begin + group; ++l) {
      if (lanes >> l & 1) {
        for (int at = 0; at < bytes; at += kWord)
          words[size_t(count++)] = (addresses[size_t(l)] + uint64_t(at)) / kWord;
      }
    }
    std::sort(words.begin(), words.begin() + count);
    const auto end = std::unique(words.begin(), words.begin() + count);
    std::array<int, kBanks> load{};
    for (auto word = words.begin(); word != end; ++word) ++load[*word % kBanks];
    passes += *std::max_element(load.begin(), load.end());
  }
  return passes;
}

void check_shared(Warp& warp, const Instruction& instruction, const Addresses& addresses, Mask lanes, Access access) {
  for_each_lane(lanes, [&](int l) {
    warp.block->shared->check(addresses[size_t(l)], instruction.access(), warp.index, warp.lane_phase, uint32_t(l),
                              access);
  });
  instruction.counters.wavefronts += wavefronts(addresses, lanes, instruction.access());
}

template <class T>
void load_element(unsigned char* to, int width, const unsigned char* from) {
  T element;
  memcpy(&element, from, sizeof(T));
  const uint64_t extended = uint64_t(int64_t(element));  // by the sign if T has one
  memcpy(to, &extended, size_t(width));
}

using LoadElement = void (*)(unsigned char*, int, const unsigned char*);
LoadElement loader(const Instruction& instruction) {
  switch (instruction.width) {
    case 1:
      return instruction.is_signed ? load_element<int8_t> : load_element<uint8_t>;
    case 2:
      return instruction.is_signed ? load_element<int16_t> : load_element<uint16_t>;
    case 4:
      return instruction.is_signed ? load_element<int32_t> : load_element<uint32_t>;
    default:
      return load_element<uint64_t>;
  }
}

template <class T>
void copy_column(Warp& warp, const Operand& to, int element, const std::array<const unsigned char*, kLanes>& from,
                 Mask lanes) {
  T* out = column<T>(warp, to);
  for_each_lane(lanes, [&](int l) { memcpy(out + l, from[size_t(l)] + size_t(element) * sizeof(T), sizeof(T)); });
}

void load(Warp& warp, const Instruction& instruction, Mask lanes,
          const std::array<const unsigned char*, kLanes>& from) {
  for (int e = 0; e < instruction.elements; ++e) {
    const Operand& to = instruction.operands[size_t(e)];
    if (!to.exists()) continue;
    if (to.width == instruction.width && to.width == 4) {
      copy_column<uint32_t>(warp, to, e, from, lanes);
    } else if (to.width == instruction.width && to.width == 2) {
      copy_column<uint16_t>(warp, to, e, from, lanes);
    } else if (to.width == instruction.width && to.width == 8) {
      copy_column<uint64_t>(warp, to, e, from, lanes);
    } else {
      const LoadElement one = loader(instruction);
      for_each_lane(lanes, [&](int l) {
        one(warp.registers + to.at + l * to.width, to.width, from[size_t(l)] + e * instruction.width);
      });
    }
  }
}

void store(Warp& warp, const Instruction& instruction, Mask lanes, const std::array<unsigned char*, kLanes>& to) {
  for (int e = 0; e < instruction.elements; ++e) {
    const Operand& from = instruction.operands[size_t(e)];
    for_each_lane(lanes, [&](int l) {
      memcpy(to[size_t(l)] + e * instruction.width, warp.registers + from.at + l * from.width,
             size_t(instruction.width));
    });
  }
}

template <class Byte, class Place>
std::array<Byte*, kLanes> places(const Addresses& addresses, Mask lanes, const Place& place) {
  std::array<Byte*, kLanes> out{};
  for_each_lane(lanes, [&](int l) { out[size_t(l)] = place(addresses[size_t(l)]); });
  return out;
}

const Operand& address_operand(const Instruction& instruction) {
  return instruction.operands[size_t(instruction.elements)];
}

template <class F, class T, bool kShared>
void run_atomic(Warp& warp, const Instruction& instruction, Mask lanes) {
  const Addresses addresses = addresses_of(warp, instruction, instruction.operands[1], lanes);
  if (kShared) {
    check_shared(warp, instruction, addresses, lanes, Access::atomic);
  } else {
    check_global(warp, instruction, addresses, lanes, Access::atomic);
  }
  for_each_lane(lanes, [&](int l) {
    const uint64_t address = addresses[size_t(l)];
    unsigned char* place = kShared ? warp.block->shared->data(address) : reinterpret_cast<unsigned char*>(address);
    const T* sources[2] = {column<T>(warp, instruction.operands[2]),
                           column<T>(warp, instruction.operands[instruction.num_operands > 3 ? 3 : 2])};
    T old;
    memcpy(&old, place, sizeof(T));
    const T updated = F{}(old, sources[0][l], sources[1][l]);
    memcpy(place, &updated, sizeof(T));
    if (instruction.operands[0].exists()) column<T>(warp, instruction.operands[0])[l] = old;
  });
}

template <class T, class F>
void define_atomic(Opcodes& opcodes, const std::string& name, F) {
  const int width = int(sizeof(T));
  std::vector<int> widths{width, 8, width};
  if (name.starts_with("cas")) widths.push_back(width);
  opcodes["global." + name] = {run_atomic<F, T, false>, nullptr, widths};
  opcodes["shared." + name] = {run_atomic<F, T, true>, nullptr, widths};
}

}  // namespace

void load_global(Warp& warp, const Instruction& instruction, Mask lanes) {
  const Addresses addresses = addresses_of(warp, instruction, address_operand(instruction), lanes);
  check_global(warp, instruction, addresses, lanes, Access::read);
  const auto place = [](uint64_t address) { return reinterpret_cast<const unsigned char*>(address); };
  load(warp, instruction, lanes, places<const unsigned char>(addresses, lanes, place));
}

void store_global(Warp& warp, const Instruction& instruction, Mask lanes) {
  const Addresses addresses = addresses_of(warp, instruction, address_operand(instruction), lanes);
  check_global(warp, instruction, addresses, lanes, Access::write);
  const auto place = [](uint64_t address) { return reinterpret_cast<unsigned char*>(address); };
  store(warp, instruction, lanes, places<unsigned char>(addresses, lanes, place));
}

void load_shared(Warp& warp, const Instruction& instruction, Mask lanes) {
  const Addresses addresses = addresses_of(warp, instruction, address_operand(instruction), lanes);
  check_shared(warp, instruction, addresses, lanes, Access::read);
  const auto place = [&](uint64_t address) { return warp.block->shared->data(address); };
  load(warp, instruction, lanes, places<const unsigned char>(addresses, lanes, place));
}

void store_shared(Warp& warp, const Instruction& instruction, Mask lanes) {
  const Addresses addresses = addresses_of(warp, instruction, address_operand(instruction), lanes);
  check_shared(warp, instruction, addresses, lanes, Access::write);
  const auto place = [&](uint64_t address) { return warp.block->shared->data(address); };
  store(warp, instruction, lanes, places<unsigned char>(addresses, lanes, place));
}

void load_parameter(Warp& warp, const Instruction& instruction, Mask lanes) {
  const Addresses addresses = addresses_of(warp, instruction, address_operand(instruction), lanes);
  const auto place = [&](uint64_t address) {
    BLT_CHECK(address + uint64_t(instruction.access()) <= uint64_t(warp.block->parameter_bytes), "beyond the ",
              warp.block->parameter_bytes, " bytes of the arguments: ", instruction.access(), " bytes at ", address);
    return warp.block->parameters + address;
  };
  load(warp, instruction, lanes, places<const unsigned char>(addresses, lanes, place));
}

void define_atomics(Opcodes& opcodes) {
  const auto define_types = [&]<class T>(const std::string& type, T) {
    define_atomic<T>(opcodes, "add." + type, [](T old, T x, T) { return T(old + x); });
    if (type[0] == 'f') return;
    define_atomic<T>(opcodes, "min." + type, [](T old, T x, T) { return x < old ? x : old; });
    define_atomic<T>(opcodes, "max." + type, [](T old, T x, T) { return old < x ? x : old; });
  };
  define_types("u32", uint32_t()), define_types("s32", int32_t());
  define_types("u64", uint64_t()), define_types("s64", int64_t());
  define_types("f32", float()), define_types("f64", double());
  const auto define_bits = [&]<class T>(const std::string& type, T) {
    define_atomic<T>(opcodes, "and." + type, [](T old, T x, T) { return T(old & x); });
    define_atomic<T>(opcodes, "or." + type, [](T old, T x, T) { return T(old | x); });
    define_atomic<T>(opcodes, "xor." + type, [](T old, T x, T) { return T(old ^ x); });
    define_atomic<T>(opcodes, "exch." + type, [](T, T x, T) { return x; });
    define_atomic<T>(opcodes, "cas." + type, [](T old, T expected, T x) { return old == expected ? x : old; });
  };
  define_bits("b32", uint32_t()), define_bits("b64", uint64_t());
}

}  // namespace blt::ptx
