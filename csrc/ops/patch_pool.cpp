// patch_pool: bytes -> patches, the reduction of each patch's bytes.
#include "ops/patch_pool.h"

#include <algorithm>
#include <cstring>

namespace {

using blt::Tensor;
using blt::cpu::PatchPoolArgs;
using blt::cpu::Reduce;

Reduce parse_reduce(const char* op, const std::string& reduce) {
  if (reduce == "max") return Reduce::max;
  if (reduce == "mean") return Reduce::mean;
  if (reduce == "min") return Reduce::min;
  if (reduce == "sum") return Reduce::sum;
  blt::fail(op, ": reduce: expected max, mean, min or sum, got ", reduce);
}

void check_offsets(const char* op, const Tensor& offsets, int64_t batch, int64_t num_bytes) {
  blt::check_dim(op, "offsets", offsets, 2);
  blt::check_size(op, "offsets", offsets, 0, batch);
  blt::check_dtype(op, "offsets", offsets, blt::ScalarType::Int, "int32");
  blt::check_cpu(op, "offsets", offsets);
  const int64_t entries = offsets.size(1);
  BLT_CHECK(entries > 0, op, ": offsets: expected shape [B, C+1], got no columns");
  const int32_t* row = offsets.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < batch; ++b, row += entries) {
    int32_t previous = 0;
    for (int64_t c = 0; c < entries; ++c) {
      BLT_CHECK(row[c] >= previous && row[c] <= num_bytes, op, ": offsets: expected values that never decrease, from 0 to ",
                num_bytes, ", got ", row[c], " after ", previous, " in row ", b);
      previous = row[c];
    }
  }
}

// Calls body(first patch, end, first column, end) in parallel, with about equal numbers of bytes and slots in each call.
// Where one patch is too large a part of the whole, threads share the columns instead. work_before[b] counts the bytes
// and slots of the rows before b.
template <class Body>
void parallel_patches(const PatchPoolArgs& args, const std::vector<int64_t>& work_before, const Body& body) {
  const int64_t batch = int64_t(work_before.size()) - 1, patches = batch * args.capacity, total = work_before[batch];
  // Each slot counts one more than its bytes, so that positions increase strictly.
  const auto position = [&](int64_t i) {
    const int64_t b = i / args.capacity, c = i % args.capacity;
    return work_before[b] + args.begin[b * args.stride + c] - args.begin[b * args.stride] + c;
  };
  const auto first_patch_at = [&](int64_t work) {
    int64_t low = 0, high = patches;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (position(middle) < work) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };

  int64_t largest = 0;
  for (int64_t i = 0; i < patches; ++i) {
    const int64_t entry = i / args.capacity * args.stride + i % args.capacity;
    largest = std::max<int64_t>(largest, args.end[entry] - args.begin[entry]);
  }
  constexpr int64_t kColumns = 64;  // the least that a thread takes of a row: whole cache lines
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = 2 * largest * threads > total ? std::min(threads, (args.width + kColumns - 1) / kColumns) : 1;
  const int64_t part_width = (args.width + parts * kColumns - 1) / (parts * kColumns) * kColumns;

  blt::parallel_for(parts * total, blt::grain(args.width / parts), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin / total; part * total < end; ++part) {
      const int64_t first = first_patch_at(begin - part * total), last = first_patch_at(end - part * total);
      body(first, last, std::min(args.width, part * part_width), std::min(args.width, (part + 1) * part_width));
    }
  });
}

// `t`, contiguous, after a check that it has these sizes and the dtype of `grad`.
Tensor dense_like(const char* op, const char* argument, const Tensor& t, const Tensor& grad, std::vector<int64_t> sizes) {
  blt::check_dim(op, argument, t, int64_t(sizes.size()));
  for (size_t d = 0; d < sizes.size(); ++d) {
    blt::check_size(op, argument, t, int64_t(d), sizes[d]);
  }
  BLT_CHECK(t.scalar_type() == grad.scalar_type(), op, ": ", argument, ": expected the dtype of grad");
  blt::check_cpu(op, argument, t);
  return blt::contiguous(t);
}

Tensor patch_pool_cpu(const Tensor& x, const Tensor& offsets, const std::string& reduce) {
  constexpr const char* op = "patch_pool";
  blt::check_dim(op, "x", x, 3);
  const Tensor x_dense = blt::contiguous(x), offsets_dense = blt::contiguous(offsets);
  check_offsets(op, offsets_dense, x.size(0), x.size(1));
  const Reduce kind = parse_reduce(op, reduce);
  Tensor out = blt::empty({x.size(0), offsets.size(1) - 1, x.size(2)}, x.scalar_type());
  const int32_t* begin = offsets_dense.const_data_ptr<int32_t>();
  blt::pool_segments(x.size(0), {blt::dtype_of(op, "x", x), kind, x.size(1), out.size(1), x.size(2), begin, begin + 1,
                                 offsets.size(1), x_dense.const_data_ptr(), out.mutable_data_ptr()});
  return out;
}

Tensor patch_pool_backward_cpu(const Tensor& grad, const Tensor& offsets, const std::optional<Tensor>& x,
                               const std::optional<Tensor>& out, int64_t num_bytes, const std::string& reduce) {
  constexpr const char* op = "patch_pool_backward";
  blt::check_dim(op, "grad", grad, 3);
  BLT_CHECK(num_bytes >= 0, op, ": num_bytes: expected at least 0, got ", num_bytes);
  const int64_t batch = grad.size(0), capacity = grad.size(1), width = grad.size(2);
  const Tensor grad_dense = blt::contiguous(grad), offsets_dense = blt::contiguous(offsets);
  check_offsets(op, offsets_dense, batch, num_bytes);
  blt::check_size(op, "offsets", offsets, 1, capacity + 1);
  const Reduce kind = parse_reduce(op, reduce);
  // What max and min compare to find the ties again: x and the forward's result.
  std::optional<Tensor> x_dense, out_dense;
  if (kind == Reduce::max || kind == Reduce::min) {
    BLT_CHECK(x.has_value() && out.has_value(), op, ": x, out: expected tensors for reduce = ", reduce);
    x_dense = dense_like(op, "x", *x, grad, {batch, num_bytes, width});
    out_dense = dense_like(op, "out", *out, grad, {batch, capacity, width});
  }
  Tensor grad_x = blt::empty({batch, num_bytes, width}, grad.scalar_type());
  const size_t size = size_t(batch * num_bytes * width) * grad.element_size();
  if (size == 0) {
    return grad_x;
  }
  if (capacity == 0) {
    std::memset(grad_x.mutable_data_ptr(), 0, size);
    return grad_x;
  }
  const int32_t* begin = offsets_dense.const_data_ptr<int32_t>();
  const blt::cpu::PatchPoolBackwardArgs args{
      {blt::dtype_of(op, "grad", grad), kind, num_bytes, capacity, width, begin, begin + 1, capacity + 1,
       x_dense ? x_dense->const_data_ptr() : nullptr, out_dense ? const_cast<void*>(out_dense->const_data_ptr()) : nullptr},
      blt::wants_streaming(grad_x),
      grad_dense.const_data_ptr(),
      grad_x.mutable_data_ptr()};
  std::vector<int64_t> work_before;
  for (int64_t b = 0; b <= batch; ++b) {
    work_before.push_back(b * (num_bytes + capacity));  // bytes in no patch are written too
  }
  const auto kernel = blt::cpu::patch_pool_backward_cpu();
  parallel_patches(args.forward, work_before, [&](auto... range) { kernel(args, range...); });
  return grad_x;
}

}  // namespace

namespace blt {

void pool_segments(int64_t batch, const PatchPoolArgs& args) {
  if (batch * args.capacity * args.width == 0) {
    return;
  }
  std::vector<int64_t> work_before{0};
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t bytes = args.end[b * args.stride + args.capacity - 1] - args.begin[b * args.stride];
    work_before.push_back(work_before.back() + bytes + args.capacity);
  }
  const auto kernel = cpu::patch_pool_cpu();
  parallel_patches(args, work_before, [&](auto... range) { kernel(args, range...); });
}

}  // namespace blt

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def("patch_pool(Tensor x, Tensor offsets, str reduce) -> Tensor");
  // x and out: for max and min only. SymInt, so that compiled graphs keep the number of bytes symbolic.
  m.def(
      "patch_pool_backward(Tensor grad, Tensor offsets, Tensor? x, Tensor? out, SymInt num_bytes, str reduce) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("patch_pool", TORCH_BOX(&patch_pool_cpu));
  m.impl("patch_pool_backward", TORCH_BOX(&patch_pool_backward_cpu));
}
