// layout_from_lengths, layout_from_starts on CUDA.
#include "ops/cuda/layout.h"

namespace blt {

namespace {

bool is_int64(const char* op, const char* argument, const Tensor& t) {
  if (t.scalar_type() == ScalarType::Int) {
    return false;
  }
  check_dtype(op, argument, t, ScalarType::Long, "int32 or int64");
  return true;
}

LayoutFields empty_fields(const Tensor& like, const DeviceSequences& sequences, int64_t capacity) {
  const int64_t batch = sequences.args.batch, num_bytes = sequences.args.num_bytes;
  BLT_CHECK(capacity <= INT32_MAX, "PatchLayout: a row holds at most 2^31 - 1 bytes");
  const auto int32 = [&](std::vector<int64_t> sizes) { return empty_on(like, std::move(sizes), ScalarType::Int); };
  return {int32({batch, capacity + 1}),   int32({batch, num_bytes}),
          int32({batch, num_bytes}),      int32({batch}),
          int32({sequences.count() + 1}), int32({batch})};
}

cuda::LayoutOut layout_out(const LayoutFields& fields) {
  const auto data = [](const Tensor& t) { return t.mutable_data_ptr<int32_t>(); };
  return {int32_t(std::get<0>(fields).size(1) - 1),
          data(std::get<0>(fields)),
          data(std::get<1>(fields)),
          data(std::get<2>(fields)),
          data(std::get<3>(fields)),
          data(std::get<4>(fields)),
          data(std::get<5>(fields))};
}

void set_next_is_start(const char* op, const Tensor& like, const std::optional<Tensor>& next_is_start,
                       DeviceSequences& sequences) {
  if (next_is_start) {
    check_dtype(op, "next_is_start", *next_is_start, ScalarType::Bool, "bool");
    check_dim(op, "next_is_start", *next_is_start, 1);
    check_size(op, "next_is_start", *next_is_start, 0, sequences.count());
    check_same_device(op, "next_is_start", *next_is_start, like);
    sequences.owned.push_back(blt::contiguous(*next_is_start));
    sequences.args.next_is_start = static_cast<const uint8_t*>(sequences.owned.back().const_data_ptr());
  }
}

LayoutFields layout_from_starts_cuda(const Tensor& mask, const std::optional<Tensor>& seq_lens,
                                     const std::optional<Tensor>& cu_seqlens,
                                     const std::optional<Tensor>& next_is_start, std::optional<int64_t> capacity) {
  constexpr const char* op = "PatchLayout.from_starts";
  check_dim(op, "mask", mask, 2);
  check_dtype(op, "mask", mask, ScalarType::Bool, "bool");
  const cuda::OnDevice device(device_index(mask));
  DeviceSequences sequences = device_sequences(op, mask, mask.size(0), mask.size(1), seq_lens, cu_seqlens);
  set_next_is_start(op, mask, next_is_start, sequences);
  const Tensor dense = blt::contiguous(mask);
  cuda::StartsArgs args{};
  args.rule = Rule::mask;
  args.values = dense.const_data_ptr();
  args.max_patch_length = INT32_MAX;
  return layout_of_starts(op, mask, args, sequences, capacity, device);
}

LayoutFields layout_from_lengths_cuda(const Tensor& lengths, int64_t num_bytes, const std::optional<Tensor>& seq_lens,
                                      const std::optional<Tensor>& cu_seqlens,
                                      const std::optional<Tensor>& next_is_start) {
  constexpr const char* op = "PatchLayout.from_lengths";
  check_dim(op, "lengths", lengths, 2);
  const bool wide = is_int64(op, "lengths", lengths);
  BLT_CHECK(num_bytes >= 0, op, ": num_bytes: expected at least 0, got ", num_bytes);
  const cuda::OnDevice device(device_index(lengths));
  DeviceSequences sequences = device_sequences(op, lengths, lengths.size(0), num_bytes, seq_lens, cu_seqlens);
  set_next_is_start(op, lengths, next_is_start, sequences);
  const LayoutFields fields = empty_fields(lengths, sequences, lengths.size(1));
  const Tensor dense = blt::contiguous(lengths);
  const Tensor closes = empty_on(lengths, {lengths.size(0)}, ScalarType::Int);
  cuda::layout_from_lengths(
      {sequences.args, layout_out(fields), dense.const_data_ptr(), wide, closes.mutable_data_ptr<int32_t>()},
      device.stream());
  return fields;
}

}  // namespace

DeviceSequences device_sequences(const char* op, const Tensor& like, int64_t batch, int64_t num_bytes,
                                 const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens) {
  BLT_CHECK(num_bytes <= INT32_MAX, "PatchLayout: a row holds at most 2^31 - 1 bytes");
  DeviceSequences out{{}, {}};
  out.args.batch = batch;
  out.args.num_bytes = int32_t(num_bytes);
  out.args.packed = cu_seqlens.has_value();
  out.args.in_row = 1;
  if (cu_seqlens) {
    BLT_CHECK(!seq_lens, op, ": cu_seqlens: expected either seq_lens or cu_seqlens, got both");
    BLT_CHECK(batch == 1, op, ": cu_seqlens: expected one row (B = 1) with cu_seqlens, got ", batch);
    check_same_device(op, "cu_seqlens", *cu_seqlens, like);
    check_dim(op, "cu_seqlens", *cu_seqlens, 1);
    out.args.ends_are_int64 = is_int64(op, "cu_seqlens", *cu_seqlens);
    const int64_t count = cu_seqlens->size(0) - 1;
    BLT_CHECK(count >= 0, op, ": cu_seqlens: expected 0 as the first value");
    BLT_CHECK(count < INT32_MAX, op, ": cu_seqlens: expected at most 2^31 - 1 values, got ", count + 1);
    out.args.in_row = int32_t(count);
    out.owned.push_back(blt::contiguous(*cu_seqlens));
    out.args.ends = static_cast<const char*>(out.owned.back().const_data_ptr()) + cu_seqlens->element_size();
  } else if (seq_lens) {
    check_same_device(op, "seq_lens", *seq_lens, like);
    check_dim(op, "seq_lens", *seq_lens, 1);
    out.args.ends_are_int64 = is_int64(op, "seq_lens", *seq_lens);
    check_size(op, "seq_lens", *seq_lens, 0, batch);
    out.owned.push_back(blt::contiguous(*seq_lens));
    out.args.ends = out.owned.back().const_data_ptr();
  }
  return out;
}

LayoutFields layout_of_starts(const char* op, const Tensor& like, cuda::StartsArgs args,
                              const DeviceSequences& sequences, std::optional<int64_t> capacity,
                              const cuda::OnDevice& device) {
  const int64_t in_row = sequences.args.in_row, num_bytes = sequences.args.num_bytes;
  BLT_CHECK(!capacity || *capacity >= in_row, op, ": capacity: expected at least ", in_row,
            ", one slot for each sequence in a row, got ", capacity.value_or(0));
  const LayoutFields fields = empty_fields(like, sequences, capacity.value_or(num_bytes));
  const int64_t tiles = sequences.args.batch * cuda::layout_tiles(num_bytes);
  args.sequences = sequences.args;
  args.out = layout_out(fields);
  args.merge = capacity.has_value();
  static_assert(sizeof(cuda::StartCounts) == sizeof(cuda::Starts));
  const Tensor of_tiles = empty_on(like, {tiles * int64_t(sizeof(cuda::Starts))}, ScalarType::Byte);
  const int64_t decided = cuda::whole_rows(args) ? tiles * cuda::kLayoutTile / 8 : 0;
  const Tensor decisions = empty_on(like, {decided * int64_t(sizeof(uint16_t))}, ScalarType::Byte);
  args.tiles = static_cast<cuda::Starts*>(of_tiles.mutable_data_ptr());
  args.counts = static_cast<cuda::StartCounts*>(of_tiles.mutable_data_ptr());
  args.decisions = static_cast<uint16_t*>(decisions.mutable_data_ptr());
  cuda::layout_from_starts(args, device.stream());
  return fields;
}

}  // namespace blt

BLT_CUDA_OPS(m) {
  m.impl("layout_from_lengths", TORCH_BOX(&blt::layout_from_lengths_cuda));
  m.impl("layout_from_starts", TORCH_BOX(&blt::layout_from_starts_cuda));
}
