#include "cuda/patch_gather.cuh"

#include "cuda/launch.h"

namespace blt::cuda {

namespace {

template <class Access>
void run(const PatchGatherArgs& args, Stream stream) {
  const int64_t accesses = args.row_bytes / int64_t(sizeof(Access));
  const int lanes = gather_lanes(accesses);
  const int64_t threads = ceil_div(args.rows, kGatherRows) * lanes;
  launch("patch_gather", patch_gather_kernel<Access>, ceil_div(threads, kGatherThreads), kGatherThreads, 0, stream,
         args, accesses, lanes);
}

}  // namespace

void patch_gather(const PatchGatherArgs& args, Stream stream) {
  switch (access_width(args.row_bytes, 1, 16, args.y, args.out)) {
    case 16:
      return run<uint4>(args, stream);
    case 8:
      return run<uint2>(args, stream);
    case 4:
      return run<uint32_t>(args, stream);
    default:
      return run<uint16_t>(args, stream);
  }
}

void segments_of_ids(const SegmentsArgs& args, int64_t batch, Stream stream) {
  const int64_t slots = batch * args.capacity;
  launch("segments_init", segments_init_kernel, ceil_div(slots, kGatherThreads), kGatherThreads, 0, stream, args,
         slots);
  launch("segments", segments_kernel, ceil_div(args.rows, kGatherThreads), kGatherThreads, 0, stream, args);
}

}  // namespace blt::cuda
