// segment, segment_spaces, segment_fixed on CUDA.
#include "ops/cuda/segment.h"

#include "ops/rule.h"

namespace blt {

namespace {

// One length that no row reaches is as good as any other.
int32_t clamp_length(int64_t length) { return int32_t(length < INT32_MAX ? length : INT32_MAX); }

// `args` holds what the rule needs, and `per_byte` is the [B, N] tensor that it looks at.
LayoutFields segment_by(const char* op, cuda::StartsArgs args, const Tensor& per_byte, const SegmentOptions& options) {
  const int64_t max_patch_length = options.max_patch_length.value_or(INT32_MAX);
  BLT_CHECK(max_patch_length > 0, op, ": max_patch_length: expected at least 1, got ", max_patch_length);
  const cuda::OnDevice device(device_index(per_byte));
  const DeviceSequences sequences =
      device_sequences(op, per_byte, per_byte.size(0), per_byte.size(1), options.seq_lens, options.cu_seqlens);
  args.bos_patch = options.bos_patch;
  args.max_patch_length = clamp_length(max_patch_length);
  return layout_of_starts(op, per_byte, args, sequences, options.capacity, device);
}

LayoutFields segment_cuda(const Tensor& entropies, double threshold, const std::string& rule,
                          std::optional<double> delta, std::optional<int64_t> max_patch_length,
                          const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens,
                          bool bos_patch, std::optional<int64_t> capacity) {
  return segment_entropies_cuda("segment", entropies, threshold, rule, delta,
                                {max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity});
}

LayoutFields segment_spaces_cuda(const Tensor& tokens, int64_t byte_offset, std::optional<int64_t> max_patch_length,
                                 const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens,
                                 bool bos_patch, std::optional<int64_t> capacity) {
  constexpr const char* op = "segment_spaces";
  check_dim(op, "tokens", tokens, 2);
  check_dtype(op, "tokens", tokens, ScalarType::Long, "int64");
  const cuda::OnDevice device(device_index(tokens));
  const Tensor dense = blt::contiguous(tokens);
  cuda::StartsArgs args{};
  args.rule = Rule::spaces;
  args.byte_offset = byte_offset;
  args.values = dense.const_data_ptr();
  return segment_by(op, args, dense, {max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity});
}

LayoutFields segment_fixed_cuda(const Tensor& tokens, int64_t patch_size, std::optional<int64_t> max_patch_length,
                                const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens,
                                bool bos_patch, std::optional<int64_t> capacity) {
  constexpr const char* op = "segment_fixed";
  check_dim(op, "tokens", tokens, 2);
  BLT_CHECK(patch_size > 0, op, ": patch_size: expected at least 1, got ", patch_size);
  cuda::StartsArgs args{};
  args.rule = Rule::fixed;
  args.patch_size = clamp_length(patch_size);
  return segment_by(op, args, tokens, {max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity});
}

}  // namespace

LayoutFields segment_entropies_cuda(const char* op, const Tensor& entropies, double threshold, const std::string& rule,
                                    std::optional<double> delta, const SegmentOptions& options) {
  check_dim(op, "entropies", entropies, 2);
  check_dtype(op, "entropies", entropies, ScalarType::Float, "float32");
  cuda::StartsArgs args{};
  args.rule = parse_rule(op, rule, delta);
  const cuda::OnDevice device(device_index(entropies));
  const Tensor dense = blt::contiguous(entropies);
  args.threshold = float(threshold);
  args.delta = float(delta.value_or(0));
  args.values = dense.const_data_ptr();
  return segment_by(op, args, dense, options);
}

}  // namespace blt

BLT_CUDA_OPS(m) {
  m.impl("segment", TORCH_BOX(&blt::segment_cuda));
  m.impl("segment_spaces", TORCH_BOX(&blt::segment_spaces_cuda));
  m.impl("segment_fixed", TORCH_BOX(&blt::segment_fixed_cuda));
}
