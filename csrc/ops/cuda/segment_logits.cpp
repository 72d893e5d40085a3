// segment_logits on CUDA: the kernel of entropy, then those of segment. The backward is that of entropy.
#include "cuda/entropy.h"

#include "ops/cuda/segment.h"

namespace {

using blt::ScalarType;
using blt::Tensor;

constexpr const char* kOp = "segment_logits";

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs segment_logits_cuda(const Tensor& logits, double threshold, const std::string& rule,
                            std::optional<double> delta, std::optional<int64_t> max_patch_length,
                            const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens,
                            bool bos_patch, std::optional<int64_t> capacity) {
  blt::check_dim(kOp, "logits", logits, 3);
  const blt::DType dtype = blt::dtype_of(kOp, "logits", logits);
  const int64_t batch = logits.size(0), num_bytes = logits.size(1), vocab = logits.size(2);
  BLT_CHECK(vocab >= 1, kOp, ": logits: expected shape [..., V] with V >= 1");
  const blt::cuda::OnDevice device(blt::device_index(logits));
  const Tensor dense = blt::contiguous(logits);
  const Tensor entropies = blt::empty_on(logits, {batch, num_bytes},
                                         dtype == blt::DType::f64 ? ScalarType::Double : ScalarType::Float);
  if (entropies.numel() > 0) {
    blt::cuda::entropy({dtype, entropies.numel(), vocab, dense.const_data_ptr(), entropies.mutable_data_ptr()},
                       device.stream());
  }
  return std::tuple_cat(
      std::make_tuple(entropies),
      blt::segment_entropies_cuda(kOp, torch::stable::to(entropies, ScalarType::Float), threshold, rule, delta,
                                  {max_patch_length, seq_lens, cu_seqlens, bos_patch, capacity}));
}

}  // namespace

BLT_CUDA_OPS(m) { m.impl("segment_logits", TORCH_BOX(&segment_logits_cuda)); }
