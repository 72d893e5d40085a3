#include "cuda/layout.cuh"

#include "cuda/launch.h"
#include "cuda/layout_whole_rows.cuh"

namespace blt::cuda {

namespace {

template <Rule R>
void run(const StartsArgs& args, size_t value_bytes, Stream stream) {
  const int64_t num_bytes = args.sequences.num_bytes, tiles = layout_tiles(num_bytes);
  const int64_t blocks = args.sequences.batch * tiles;
  // A thread loads up to 16 bytes at once.
  const auto aligned = [&](int items) {
    const int access = value_bytes == 0 ? items : int(min_of(size_t(items), 16 / value_bytes));
    return access_width(num_bytes, value_bytes == 0 ? 1 : value_bytes, access, args.values) == access;
  };
  const bool aligned_ids =
      access_width(num_bytes, sizeof(int32_t), kIdsAccess, args.out.patch_ids, args.out.visible_ids) == kIdsAccess;
  if (whole_rows(args)) {
    const Divisor divisor{int(tiles)};
    launch("layout_decisions", layout_decisions_kernel<R>, blocks, kWholeThreads, 0, stream, args, divisor,
           uint32_t(tiles * kWholeThreads), aligned(kWholeItems));
    launch("layout_ids", layout_ids_kernel, blocks + 1, kWholeThreads, 0, stream, args, divisor, int32_t(tiles),
           aligned_ids);
    return;
  }
  const bool both = aligned(kLayoutItems) && aligned_ids;
  launch("layout_tiles", layout_tiles_kernel<R>, blocks, kLayoutThreads, 0, stream, args, unsigned(tiles), both);
  launch("layout_from_starts", layout_from_starts_kernel<R>, blocks + 1, kLayoutThreads, 0, stream, args,
         unsigned(tiles), both);
}

}  // namespace

int64_t layout_tiles(int64_t num_bytes) { return max_of<int64_t>(1, ceil_div(num_bytes, kLayoutTile)); }

void layout_from_starts(const StartsArgs& args, Stream stream) {
  switch (args.rule) {
    case Rule::mask:
      return run<Rule::mask>(args, 1, stream);
    case Rule::threshold:
      return run<Rule::threshold>(args, 4, stream);
    case Rule::monotonic:
      return run<Rule::monotonic>(args, 4, stream);
    case Rule::combined:
      return run<Rule::combined>(args, 4, stream);
    case Rule::spaces:
      return run<Rule::spaces>(args, 8, stream);
    case Rule::fixed:
      return run<Rule::fixed>(args, 0, stream);
  }
}

void layout_from_lengths(const LengthsArgs& args, Stream stream) {
  const int64_t num_bytes = args.sequences.num_bytes, tiles = layout_tiles(num_bytes), batch = args.sequences.batch;
  const bool aligned =
      access_width(num_bytes, sizeof(int32_t), kIdsAccess, args.out.patch_ids, args.out.visible_ids) == kIdsAccess;
  launch("layout_offsets", layout_offsets_kernel, batch, kLayoutThreads, 0, stream, args);
  launch("layout_from_lengths", layout_from_lengths_kernel, batch * tiles + 1, kLayoutThreads, 0, stream, args,
         unsigned(tiles), aligned);
}

}  // namespace blt::cuda
