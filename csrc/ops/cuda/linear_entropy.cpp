// linear_entropy on CUDA. It takes a chunk of rows at a time: the matrix product is cuBLAS', and the kernels of entropy
// follow. The logits of a chunk stay in L2, so they never cross the memory bus, and memory does not grow with the rows.
#include <algorithm>
#include <array>

#include "cuda/entropy.h"
#include "ops/cuda/device.h"
#include "ops/linear_entropy.h"

namespace {

using blt::ScalarType;
using blt::Tensor;

constexpr const char* kOp = "linear_entropy";
constexpr int64_t kChunkLogits = 4 << 20;  // fp32: 16 MB, a third of an H200's L2

struct Problem {
  Tensor hidden, weight;       // [rows, D], [V, D], dense
  std::vector<int64_t> sizes;  // of the entropies
  ScalarType dtype;            // of the logits and entropies
  int64_t rows, vocab, width, chunk;
};

Problem parse(const Tensor& hidden, const Tensor& weight) {
  blt::dtype_of(kOp, "hidden", hidden);
  blt::dtype_of(kOp, "weight", weight);
  const std::vector<int64_t> sizes = blt::check_linear_entropy(kOp, hidden, weight);
  Problem p{hidden, blt::contiguous(weight), sizes,          blt::linear_entropy_dtype(hidden, weight),
            1,      weight.size(0),          weight.size(1), 0};
  for (const int64_t size : p.sizes) p.rows *= size;
  p.hidden = torch::stable::reshape(blt::contiguous(hidden), {p.rows, p.width});
  p.chunk = std::max<int64_t>(1, kChunkLogits / p.vocab);
  return p;
}

// a @ b with a result in `dtype`. 16-bit inputs are multiplied as they are and summed in fp32, without another
// rounding.
Tensor product(const Tensor& a, const Tensor& b, ScalarType dtype) {
#if !defined(BLT_EMULATE_CUDA)  // torch has no such product on the CPU
  const bool halves = a.scalar_type() == ScalarType::BFloat16 || a.scalar_type() == ScalarType::Half;
  if (halves && a.scalar_type() == b.scalar_type()) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                      torch::stable::detail::from(dtype)};
    blt::call_torch("aten::mm", "dtype", stack.data());
    return blt::touchable(torch::stable::detail::to<Tensor>(stack[0]));
  }
#endif
  return blt::touchable(torch::stable::matmul(torch::stable::to(a, dtype), torch::stable::to(b, dtype)));
}

blt::DType kernel_dtype(const Problem& p) { return p.dtype == ScalarType::Double ? blt::DType::f64 : blt::DType::f32; }

// Row r of a vector of the logits' dtype.
const void* at(const Tensor& t, int64_t r) {
  return static_cast<const char*>(t.const_data_ptr()) + r * int64_t(t.element_size());
}

Tensor linear_entropy_cuda(const Tensor& hidden, const Tensor& weight) {
  const Problem p = parse(hidden, weight);
  const blt::cuda::OnDevice device(blt::device_index(hidden));
  Tensor out = blt::empty_on(hidden, p.sizes, p.dtype);
  const Tensor head = torch::stable::transpose(p.weight, 0, 1);
  for (int64_t r = 0; r < p.rows; r += p.chunk) {
    const int64_t n = std::min(p.chunk, p.rows - r);
    Tensor h = p.hidden;
    const Tensor logits = product(torch::stable::narrow(h, 0, r, n), head, p.dtype);
    blt::cuda::entropy({kernel_dtype(p), n, p.vocab, logits.const_data_ptr(), const_cast<void*>(at(out, r))},
                       device.stream());
  }
  return out;
}

// A gradient that is not needed comes back with no elements.
std::tuple<Tensor, Tensor> linear_entropy_backward_cuda(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                                                        bool needs_hidden, bool needs_weight) {
  const Problem p = parse(hidden, weight);
  blt::check_sizes(kOp, "grad", grad, p.sizes);
  BLT_CHECK(grad.scalar_type() == p.dtype, kOp, ": grad: expected the dtype of the entropies");
  blt::check_same_device(kOp, "grad", grad, hidden);
  const blt::cuda::OnDevice device(blt::device_index(hidden));
  const Tensor grad_dense = blt::contiguous(grad);
  Tensor grad_hidden = blt::empty_on(
      hidden, needs_hidden ? std::vector<int64_t>{p.rows, p.width} : std::vector<int64_t>{0}, hidden.scalar_type());
  Tensor grad_weight = torch::stable::new_zeros(
      hidden, needs_weight ? std::vector<int64_t>{p.vocab, p.width} : std::vector<int64_t>{0}, p.dtype);
  const Tensor head = torch::stable::transpose(p.weight, 0, 1);
  for (int64_t r = 0; r < p.rows; r += p.chunk) {
    const int64_t n = std::min(p.chunk, p.rows - r);
    Tensor all = p.hidden;
    const Tensor h = torch::stable::narrow(all, 0, r, n);
    Tensor logits = product(h, head, p.dtype);
    blt::cuda::entropy_backward({kernel_dtype(p), n, p.vocab, at(grad_dense, r), logits.const_data_ptr(),
                                 logits.mutable_data_ptr()},  // in place, because a lane reads only what it writes
                                device.stream());
    if (needs_hidden) {
      Tensor part = torch::stable::narrow(grad_hidden, 0, r, n);
      torch::stable::copy_(part, product(logits, p.weight, p.dtype));
    }
    if (needs_weight) {
      const Tensor part = product(torch::stable::transpose(logits, 0, 1), h, p.dtype);
      grad_weight = torch::stable::subtract(grad_weight, part, -1.0);
    }
  }
  if (needs_hidden) {
    const auto sizes = hidden.sizes();
    grad_hidden = torch::stable::reshape(grad_hidden, {sizes.begin(), sizes.end()});
  }
  return {grad_hidden, torch::stable::to(grad_weight, weight.scalar_type())};
}

}  // namespace

BLT_CUDA_OPS(m) {
  m.impl("linear_entropy", TORCH_BOX(&linear_entropy_cuda));
  m.impl("linear_entropy_backward", TORCH_BOX(&linear_entropy_backward_cuda));
}
