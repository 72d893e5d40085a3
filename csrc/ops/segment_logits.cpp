// segment_logits computes entropies and the layout of the patches that they cut. Its backward is that of entropy.
#include "ops/entropy.h"
#include "ops/segment.h"

namespace {

using blt::Tensor;

constexpr const char* kOp = "segment_logits";

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs segment_logits(const Tensor& logits, double threshold, const std::string& rule, std::optional<double> delta,
                       std::optional<int64_t> max_patch_length, const std::optional<Tensor>& seq_lens,
                       const std::optional<Tensor>& cu_seqlens, bool bos_patch, std::optional<int64_t> capacity) {
  blt::check_dim(kOp, "logits", logits, 3);
  const Tensor entropies = blt::entropy(kOp, logits);
  return std::tuple_cat(
      std::make_tuple(entropies),
      blt::segment_entropies(kOp, torch::stable::to(entropies, blt::ScalarType::Float), threshold, rule, delta,
                             {max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity}));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def(
      "segment_logits(Tensor logits, float threshold, str rule, float? delta, int? max_patch_length, Tensor? seq_lens, "
      "Tensor? cu_seqlens, bool bos_patch, SymInt? capacity) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) { m.impl("segment_logits", TORCH_BOX(&segment_logits)); }
