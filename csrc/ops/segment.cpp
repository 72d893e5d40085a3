// segment, segment_spaces and segment_fixed find where patches start, and make the layout that follows.
#include "ops/segment.h"

#include "cpu/segment.h"
#include "ops/rule.h"

namespace blt {

namespace {

constexpr int64_t kGrainBytes = 65536;

// `args` holds what the rule needs, and `per_byte` is the [B, N] tensor that it looks at.
LayoutFields segment_by(const char* op, cpu::SegmentArgs args, const Tensor& per_byte, const SegmentOptions& options) {
  const int64_t max_patch_length = options.max_patch_length.value_or(0);
  BLT_CHECK(!options.max_patch_length || max_patch_length > 0, op, ": max_patch_length: expected at least 1, got ",
            max_patch_length);
  const int64_t batch = per_byte.size(0), num_bytes = per_byte.size(1);
  const Sequences sequences = parse_sequences(op, batch, num_bytes, options.seq_lens, options.cu_seqlens);
  const Tensor starts = empty({batch, num_bytes}, ScalarType::Byte);
  std::vector<uint8_t> next_is_start(size_t(sequences.count()));
  args.bos_patch = options.bos_patch;
  args.max_patch_length = max_patch_length;
  args.seq_begin = sequences.begin.data();
  args.seq_end = sequences.end.data();
  args.starts = starts.mutable_data_ptr<uint8_t>();
  args.next_is_start = next_is_start.data();
  const int64_t mean_bytes = batch * num_bytes / (sequences.count() + 1) + 1;
  parallel_for(sequences.count(), kGrainBytes / mean_bytes,
               [&, kernel = cpu::segment_cpu()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return layout_of_starts(op, args.starts, sequences, args.next_is_start, options.capacity);
}

LayoutFields segment_op(const Tensor& entropies, double threshold, const std::string& rule, std::optional<double> delta,
                        std::optional<int64_t> max_patch_length, const std::optional<Tensor>& seq_lens,
                        const std::optional<Tensor>& cu_seqlens, bool bos_patch, std::optional<int64_t> capacity) {
  return segment_entropies("segment", entropies, threshold, rule, delta,
                           {max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity});
}

LayoutFields segment_spaces_op(const Tensor& tokens, int64_t byte_offset, std::optional<int64_t> max_patch_length,
                               const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens,
                               bool bos_patch, std::optional<int64_t> capacity) {
  constexpr const char* op = "segment_spaces";
  check_dim(op, "tokens", tokens, 2);
  check_dtype(op, "tokens", tokens, ScalarType::Long, "int64");
  const Tensor dense = blt::contiguous(tokens);
  cpu::SegmentArgs args{};
  args.rule = Rule::spaces;
  args.byte_offset = byte_offset;
  args.tokens = dense.const_data_ptr<int64_t>();
  return segment_by(op, args, dense, {max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity});
}

LayoutFields segment_fixed_op(const Tensor& tokens, int64_t patch_size, std::optional<int64_t> max_patch_length,
                              const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens,
                              bool bos_patch, std::optional<int64_t> capacity) {
  constexpr const char* op = "segment_fixed";
  check_dim(op, "tokens", tokens, 2);
  BLT_CHECK(patch_size > 0, op, ": patch_size: expected at least 1, got ", patch_size);
  cpu::SegmentArgs args{};
  args.rule = Rule::fixed;
  args.patch_size = patch_size;
  return segment_by(op, args, tokens, {max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity});
}

}  // namespace

LayoutFields segment_entropies(const char* op, const Tensor& entropies, double threshold, const std::string& rule,
                               std::optional<double> delta, const SegmentOptions& options) {
  check_dim(op, "entropies", entropies, 2);
  check_dtype(op, "entropies", entropies, ScalarType::Float, "float32");
  const Tensor dense = blt::contiguous(entropies);
  cpu::SegmentArgs args{};
  args.rule = parse_rule(op, rule, delta);
  args.threshold = float(threshold);
  args.delta = float(delta.value_or(0));
  args.entropies = dense.const_data_ptr<float>();
  return segment_by(op, args, dense, options);
}

}  // namespace blt

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def(
      "segment(Tensor entropies, float threshold, str rule, float? delta, int? max_patch_length, Tensor? seq_lens, "
      "Tensor? cu_seqlens, bool bos_patch, SymInt? capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "segment_spaces(Tensor tokens, int byte_offset, int? max_patch_length, Tensor? seq_lens, Tensor? cu_seqlens, "
      "bool bos_patch, SymInt? capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "segment_fixed(Tensor tokens, int patch_size, int? max_patch_length, Tensor? seq_lens, Tensor? cu_seqlens, "
      "bool bos_patch, SymInt? capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("segment", TORCH_BOX(&blt::segment_op));
  m.impl("segment_spaces", TORCH_BOX(&blt::segment_spaces_op));
  m.impl("segment_fixed", TORCH_BOX(&blt::segment_fixed_op));
}
