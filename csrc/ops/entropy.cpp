// entropy computes the entropy of the softmax of each row of logits, in nats.
#include "ops/entropy.h"

#include "cpu/entropy.h"

namespace blt {

namespace {

Tensor entropy_op(const Tensor& logits) { return entropy("entropy", logits); }

Tensor entropy_backward_op(const Tensor& grad, const Tensor& logits) {
  constexpr const char* op = "entropy";
  const DType dtype = dtype_of(op, "logits", logits);
  check_cpu(op, "logits", logits);
  check_cpu(op, "grad", grad);
  check_entropy_grad(op, grad, logits);
  const Tensor grad_dense = blt::contiguous(grad), dense = blt::contiguous(logits);
  const auto full = logits.sizes();
  Tensor out = empty({full.begin(), full.end()}, logits.scalar_type());
  const cpu::EntropyBackwardArgs args{dtype, logits.size(-1), grad_dense.const_data_ptr(), dense.const_data_ptr(),
                                      out.mutable_data_ptr()};
  parallel_for(grad.numel(), grain(args.vocab),
               [&, kernel = cpu::entropy_backward_cpu()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace

Tensor entropy(const char* op, const Tensor& logits) {
  const DType dtype = dtype_of(op, "logits", logits);
  check_cpu(op, "logits", logits);
  Tensor out = empty(row_sizes(op, logits), entropy_dtype(logits));
  const Tensor dense = blt::contiguous(logits);
  const cpu::EntropyArgs args{dtype, logits.size(-1), dense.const_data_ptr(), out.mutable_data_ptr()};
  parallel_for(out.numel(), grain(args.vocab),
               [&, kernel = cpu::entropy_cpu()](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace blt

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def("entropy(Tensor logits) -> Tensor");
  m.def("entropy_backward(Tensor grad, Tensor logits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("entropy", TORCH_BOX(&blt::entropy_op));
  m.impl("entropy_backward", TORCH_BOX(&blt::entropy_backward_op));
}
