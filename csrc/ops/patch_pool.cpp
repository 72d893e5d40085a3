// patch_pool: bytes -> patches, the reduction of each patch's bytes.
#include "common/tensor.h"
#include "cpu/patch_pool.h"

namespace {

using blt::Tensor;
using blt::cpu::Reduce;

constexpr const char* kOp = "patch_pool";

Reduce parse_reduce(const std::string& reduce) {
  if (reduce == "max") return Reduce::max;
  if (reduce == "mean") return Reduce::mean;
  if (reduce == "min") return Reduce::min;
  if (reduce == "sum") return Reduce::sum;
  blt::fail(kOp, ": reduce: expected max, mean, min or sum, got ", reduce);
}

Tensor patch_pool_cpu(const Tensor& x, const Tensor& offsets, const std::string& reduce) {
  blt::check_dim(kOp, "x", x, 3);
  blt::check_dim(kOp, "offsets", offsets, 2);
  blt::check_size(kOp, "offsets", offsets, 0, x.size(0));
  blt::check_dtype(kOp, "offsets", offsets, blt::ScalarType::Int, "int32");
  blt::check_cpu(kOp, "offsets", offsets);
  const Tensor x_dense = blt::contiguous(x), offsets_dense = blt::contiguous(offsets);
  const int64_t batch = x.size(0), capacity = offsets.size(1) - 1, width = x.size(2);
  Tensor out = blt::empty({batch, capacity, width}, x.scalar_type());
  const blt::cpu::PatchPoolArgs args{blt::dtype_of(kOp, "x", x), parse_reduce(reduce), x.size(1), capacity, width,
                                     offsets_dense.const_data_ptr<int32_t>(), x_dense.const_data_ptr(),
                                     out.mutable_data_ptr()};
  const auto kernel = blt::cpu::patch_pool_cpu();
  blt::parallel_for(batch * capacity, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def("patch_pool(Tensor x, Tensor offsets, str reduce) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) { m.impl("patch_pool", TORCH_BOX(&patch_pool_cpu)); }
