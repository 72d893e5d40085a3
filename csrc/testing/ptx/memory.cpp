#include "testing/ptx/memory.h"

#include <algorithm>

namespace blt::ptx {

namespace {

constexpr uint64_t kPage = 4096;
// A page of the log takes 48 KB. Beyond this number the pages of earlier launches are dropped.
constexpr size_t kMostPages = 8192;

}  // namespace

void GlobalMemory::allow(const void* begin, int64_t bytes) {
  if (bytes > 0) {
    const uint64_t address = reinterpret_cast<uint64_t>(begin);
    allowed_.push_back({address, address + uint64_t(bytes)});
  }
}

void GlobalMemory::begin_launch(uint32_t blocks) {
  if (pages_.size() > kMostPages || phase_.next() > UINT32_MAX - blocks - 1) {
    pages_.clear();
    last_page_ = nullptr;
    phase_ = {};
  }
  phase_ = {phase_.next(), blocks};
}

AccessLog& GlobalMemory::page(uint64_t number) {
  if (last_page_ == nullptr || number != last_number_) {
    std::unique_ptr<AccessLog>& log = pages_[number];
    if (log == nullptr) log = std::make_unique<AccessLog>(kPage);
    last_number_ = number, last_page_ = log.get();
  }
  return *last_page_;
}

void GlobalMemory::check(uint64_t begin, int64_t bytes, uint32_t block, Access access) {
  const uint64_t end = begin + uint64_t(bytes);
  const bool inside = std::any_of(allowed_.begin(), allowed_.end(),
                                  [&](const Range& range) { return begin >= range.begin && end <= range.end; });
  BLT_CHECK(inside, "outside the tensors of the call: ", bytes, " bytes at address ", begin);
  if (!checks_blocks_) return;
  for (uint64_t at = begin; at < end;) {
    const uint64_t stop = std::min(end, (at / kPage + 1) * kPage);
    BLT_CHECK(page(at / kPage).note(int64_t(at % kPage), int64_t(stop - at), phase_, block, access),
              "two blocks touch a byte of global memory, and one of them writes without an atomic");
    at = stop;
  }
}

SharedMemory::SharedMemory(int64_t bytes, uint32_t warps)
    : data_(size_t(bytes)), written_(size_t(bytes)), warp_log_(bytes), lane_log_(bytes), warps_{1, warps} {}

void SharedMemory::begin_block() {
  constexpr unsigned char kPoison = 0xcd;
  std::fill(data_.begin(), data_.end(), kPoison);
  std::fill(written_.begin(), written_.end(), 0);
  begin_phase();
}

void SharedMemory::check(uint64_t at, int64_t bytes, uint32_t warp, const Phase& lanes, uint32_t lane, Access access) {
  BLT_CHECK(at + uint64_t(bytes) <= data_.size(), "beyond the ", data_.size(), " bytes of shared memory: ", bytes,
            " bytes at ", at);
  const auto written = written_.begin() + int64_t(at);
  if (access == Access::write) {
    std::fill(written, written + bytes, 1);
  } else {
    BLT_CHECK(std::find(written, written + bytes, 0) == written + bytes,
              "reads shared memory that was never written: ", bytes, " bytes at ", at);
  }
  BLT_CHECK(warp_log_.note(int64_t(at), bytes, warps_, warp, access),
            "two warps touch a byte of shared memory between barriers, and one of them writes");
  BLT_CHECK(lane_log_.note(int64_t(at), bytes, lanes, lane, access),
            "two lanes of a warp touch a byte of shared memory without bar.warp.sync between, and one of them writes");
}

}  // namespace blt::ptx
