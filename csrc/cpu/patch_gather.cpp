// patch_gather on the CPU. It copies rows, whatever their element type.
#include "cpu/patch_gather.h"

#include "cpu/vec.h"

namespace blt::cpu::BLT_CPU_CAPABILITY {

void patch_gather(const PatchGatherArgs& args, int64_t begin, int64_t end) {
  const char* y = static_cast<const char*>(args.y);
  for (int64_t i = begin; i < end; ++i) {
    char* out = static_cast<char*>(args.out) + i * args.row_bytes;
    const int64_t id = args.ids[i];
    const char* row = y + (i / args.num_bytes * args.capacity + id) * args.row_bytes;
    if (args.stream) {
      for (int64_t j = 0; j < args.row_bytes; j += kVecBytes) {
        const Vec<float> v = id < 0 ? Vec<float>{} : load(reinterpret_cast<const float*>(row + j));
        stream(reinterpret_cast<float*>(out + j), v);
      }
    } else if (id < 0) {
      memset(out, 0, size_t(args.row_bytes));
    } else {  // a loop, because libc's memcpy may choose an instruction that starts slowly for a few kilobytes
      int64_t j = 0;
      for (; j + kVecBytes <= args.row_bytes; j += kVecBytes) {
        store(reinterpret_cast<float*>(out + j), load(reinterpret_cast<const float*>(row + j)));
      }
      memcpy(out + j, row + j, size_t(args.row_bytes - j));
    }
  }
  if (args.stream) {
    stream_fence();
  }
}

}  // namespace blt::cpu::BLT_CPU_CAPABILITY
