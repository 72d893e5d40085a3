// segment_logits on CUDA runs the kernel of entropy and then those of segment. Its backward is that of entropy.
#include "ops/cuda/entropy.h"
#include "ops/cuda/segment.h"

namespace {

using blt::Tensor;

constexpr const char* kOp = "segment_logits";

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs segment_logits_cuda(const Tensor& logits, double threshold, const std::string& rule,
                            std::optional<double> delta, std::optional<int64_t> max_patch_length,
                            const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens,
                            bool bos_patch, std::optional<int64_t> capacity) {
  blt::check_dim(kOp, "logits", logits, 3);
  const blt::cuda::OnDevice device(blt::device_index(logits));
  const Tensor entropies = blt::entropy_cuda(kOp, logits);
  return std::tuple_cat(
      std::make_tuple(entropies),
      blt::segment_entropies_cuda(kOp, blt::touchable(torch::stable::to(entropies, blt::ScalarType::Float)), threshold,
                                  rule, delta, {max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity}));
}

}  // namespace

BLT_CUDA_OPS(m) { m.impl("segment_logits", TORCH_BOX(&segment_logits_cuda)); }
