// patch_pool on CUDA.
#include "ops/cuda/patch_pool.h"

#include "ops/reduce.h"

namespace {

using blt::Reduce;
using blt::ScalarType;
using blt::Segments;
using blt::Tensor;
using blt::cuda::PatchPoolArgs;

void check_offsets(const char* op, const Tensor& offsets, const Tensor& like) {
  blt::check_dim(op, "offsets", offsets, 2);
  blt::check_size(op, "offsets", offsets, 0, like.size(0));
  blt::check_dtype(op, "offsets", offsets, ScalarType::Int, "int32");
  blt::check_same_device(op, "offsets", offsets, like);
  BLT_CHECK(offsets.size(1) > 0, op, ": offsets: expected shape [B, C+1], got no columns");
}

// Memory for what the first launch finds in long patches. There is none where later launches do not ask for it or no
// patch can be long.
struct LongPatches {
  LongPatches(const Segments& s, int64_t width, const Tensor& like, bool is_needed) {
    if (is_needed && s.num_bytes > blt::cuda::kPoolTile) {
      const int64_t tiles = s.batch * blt::cuda::pool_tiles(s.num_bytes, s.capacity);
      const ScalarType dtype = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
      parts = blt::empty_on(like, {tiles, 2, width}, dtype);
      slots = blt::empty_on(like, {tiles, 2}, ScalarType::Int);
    }
  }

  std::optional<Tensor> parts, slots;
};

PatchPoolArgs arguments(const Segments& s, Reduce reduce, blt::DType dtype, int64_t width, const Tensor* x,
                        const Tensor* out, const LongPatches& long_patches) {
  return {s,
          dtype,
          reduce,
          width,
          x == nullptr ? nullptr : x->const_data_ptr(),
          out == nullptr ? nullptr : const_cast<void*>(out->const_data_ptr()),
          long_patches.parts ? long_patches.parts->mutable_data_ptr() : nullptr,
          long_patches.slots ? long_patches.slots->mutable_data_ptr<int32_t>() : nullptr};
}

Tensor patch_pool_cuda(const Tensor& x, const Tensor& offsets, const std::string& reduce) {
  constexpr const char* op = "patch_pool";
  blt::check_dim(op, "x", x, 3);
  const blt::DType dtype = blt::dtype_of(op, "x", x);
  check_offsets(op, offsets, x);
  const Reduce kind = blt::parse_reduce(op, reduce);
  const blt::cuda::OnDevice device(blt::device_index(x));
  const Tensor x_dense = blt::contiguous(x), offsets_dense = blt::contiguous(offsets);
  Tensor out = blt::empty_on(x, {x.size(0), offsets.size(1) - 1, x.size(2)}, x.scalar_type());
  if (out.numel() > 0) {
    const int32_t* begin = offsets_dense.const_data_ptr<int32_t>();
    blt::pool_on_cuda({x.size(0), x.size(1), out.size(1), begin, begin + 1, offsets.size(1)}, kind, dtype, x_dense, out,
                      device);
  }
  return out;
}

Tensor patch_pool_backward_cuda(const Tensor& grad, const Tensor& offsets, const std::optional<Tensor>& x,
                                const std::optional<Tensor>& out, int64_t num_bytes, const std::string& reduce) {
  constexpr const char* op = "patch_pool_backward";
  blt::check_dim(op, "grad", grad, 3);
  const blt::DType dtype = blt::dtype_of(op, "grad", grad);
  BLT_CHECK(num_bytes >= 0, op, ": num_bytes: expected at least 0, got ", num_bytes);
  const int64_t batch = grad.size(0), capacity = grad.size(1), width = grad.size(2);
  check_offsets(op, offsets, grad);
  blt::check_size(op, "offsets", offsets, 1, capacity + 1);
  const Reduce kind = blt::parse_reduce(op, reduce);
  const blt::cuda::OnDevice device(blt::device_index(grad));
  const Tensor grad_dense = blt::contiguous(grad), offsets_dense = blt::contiguous(offsets);
  std::optional<Tensor> x_dense, out_dense;
  if (kind == Reduce::max || kind == Reduce::min) {
    BLT_CHECK(x.has_value() && out.has_value(), op, ": x, out: expected tensors for reduce = ", reduce);
    x_dense = blt::dense_like_grad(op, "x", *x, grad, {batch, num_bytes, width});
    out_dense = blt::dense_like_grad(op, "out", *out, grad, {batch, capacity, width});
  }
  Tensor grad_x = blt::empty_on(grad, {batch, num_bytes, width}, grad.scalar_type());
  if (grad_x.numel() > 0) {
    const int32_t* begin = offsets_dense.const_data_ptr<int32_t>();
    const Segments segments{batch, num_bytes, capacity, begin, begin + 1, capacity + 1};
    const LongPatches long_patches(segments, width, grad, /*is_needed=*/x_dense.has_value());
    blt::cuda::patch_pool_backward({arguments(segments, kind, dtype, width, x_dense ? &*x_dense : nullptr,
                                              out_dense ? &*out_dense : nullptr, long_patches),
                                    grad_dense.const_data_ptr(), grad_x.mutable_data_ptr()},
                                   device.stream());
  }
  return grad_x;
}

}  // namespace

namespace blt {

void pool_on_cuda(const Segments& segments, Reduce reduce, DType dtype, const Tensor& x, const Tensor& out,
                  const cuda::OnDevice& device) {
  const LongPatches long_patches(segments, x.size(2), x, /*is_needed=*/true);
  cuda::patch_pool(arguments(segments, reduce, dtype, x.size(2), &x, &out, long_patches), device.stream());
}

}  // namespace blt

BLT_CUDA_OPS(m) {
  m.impl("patch_pool", TORCH_BOX(&patch_pool_cuda));
  m.impl("patch_pool_backward", TORCH_BOX(&patch_pool_backward_cuda));
}
