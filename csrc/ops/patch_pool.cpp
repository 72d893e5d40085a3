// patch_pool reduces the bytes of each patch.
#include "ops/patch_pool.h"

#include <algorithm>

#include "ops/reduce.h"

namespace {

using blt::Reduce;
using blt::ScalarType;
using blt::Segments;
using blt::Tensor;
using blt::cpu::kPartRows;
using blt::cpu::LongPatch;
using blt::cpu::PatchPoolArgs;
using blt::cpu::PoolItem;

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
      BLT_CHECK(row[c] >= previous && row[c] <= num_bytes, op,
                ": offsets: expected values that never decrease, from 0 to ", num_bytes, ", got ", row[c], " after ",
                previous, " in row ", b);
      previous = row[c];
    }
  }
}

// The items of work that a batch is cut into, dealt out to threads in about equal amounts.
class PoolItems {
 public:
  // With `gaps`, bytes that belong to no patch are items, too.
  PoolItems(const Segments& s, bool gaps) {
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t row = b * s.num_bytes;
      int64_t position = row;
      for (int64_t c = 0; c < s.capacity; ++c) {
        const int64_t entry = b * s.stride + c, begin = row + s.begin[entry], end = row + s.end[entry];
        if (gaps) {
          add(position, begin, -1);
        }
        add(begin, end, b * s.capacity + c);
        position = end;
      }
      if (gaps) {
        add(position, row + s.num_bytes, -1);
      }
    }
    work_before_.push_back(work_);
  }

  const PoolItem* items() const { return items_.data(); }
  const LongPatch* long_patches() const { return long_patches_.data(); }
  int64_t num_long() const { return int64_t(long_patches_.size()); }

  // Accumulators for the parts of long patches, in rows of whole cache lines.
  Tensor parts(int64_t width, ScalarType dtype) const {
    return blt::empty({num_parts_, (width + 15) / 16 * 16}, dtype == ScalarType::Double ? dtype : ScalarType::Float);
  }

  // Calls body(first item, end) in parallel, with about equal numbers of bytes and slots in each call.
  template <class Body>
  void parallel_for(int64_t width, const Body& body) const {
    const auto first = work_before_.begin(), last = first + int64_t(items_.size());
    blt::parallel_for(work_, blt::grain(width), [&](int64_t begin, int64_t end) {
      body(std::lower_bound(first, last, begin) - first, std::lower_bound(first, last, end) - first);
    });
  }

 private:
  void add(int64_t begin, int64_t end, int64_t patch) {
    int64_t long_patch = -1;
    if (patch >= 0 && end - begin > kPartRows) {
      long_patch = num_long();
      long_patches_.push_back({begin, end, patch, num_parts_});
      num_parts_ += (end - begin + kPartRows - 1) / kPartRows;
    }
    if (patch >= 0 && begin == end) {
      push({begin, end, patch, long_patch});
    }
    for (; begin < end; begin += kPartRows) {
      push({begin, std::min(begin + kPartRows, end), patch, long_patch});
    }
  }

  void push(const PoolItem& item) {
    items_.push_back(item);
    work_before_.push_back(work_);
    work_ += item.end - item.begin + 1;
  }

  std::vector<PoolItem> items_;
  std::vector<int64_t> work_before_;
  std::vector<LongPatch> long_patches_;
  int64_t num_parts_ = 0, work_ = 0;
};

Tensor patch_pool_cpu(const Tensor& x, const Tensor& offsets, const std::string& reduce) {
  constexpr const char* op = "patch_pool";
  blt::check_dim(op, "x", x, 3);
  const Tensor x_dense = blt::contiguous(x), offsets_dense = blt::contiguous(offsets);
  check_offsets(op, offsets_dense, x.size(0), x.size(1));
  const Reduce kind = blt::parse_reduce(op, reduce);
  Tensor out = blt::empty({x.size(0), offsets.size(1) - 1, x.size(2)}, x.scalar_type());
  const int32_t* begin = offsets_dense.const_data_ptr<int32_t>();
  blt::pool_segments({x.size(0), x.size(1), out.size(1), begin, begin + 1, offsets.size(1)}, kind,
                     blt::dtype_of(op, "x", x), x_dense, out);
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
  const Reduce kind = blt::parse_reduce(op, reduce);
  // Max and min compare x with the result of forward, to find the ties again.
  std::optional<Tensor> x_dense, out_dense;
  if (kind == Reduce::max || kind == Reduce::min) {
    BLT_CHECK(x.has_value() && out.has_value(), op, ": x, out: expected tensors for reduce = ", reduce);
    x_dense = blt::dense_like_grad(op, "x", *x, grad, {batch, num_bytes, width});
    out_dense = blt::dense_like_grad(op, "out", *out, grad, {batch, capacity, width});
  }
  Tensor grad_x = blt::empty({batch, num_bytes, width}, grad.scalar_type());
  if (grad_x.numel() == 0) {
    return grad_x;
  }
  const int32_t* begin = offsets_dense.const_data_ptr<int32_t>();
  const PoolItems items({batch, num_bytes, capacity, begin, begin + 1, capacity + 1}, /*gaps=*/true);
  const Tensor parts = items.parts(width, grad.scalar_type());
  const blt::cpu::PatchPoolBackwardArgs args{
      {blt::dtype_of(op, "grad", grad), kind, width, items.items(), items.long_patches(),
       x_dense ? x_dense->const_data_ptr() : nullptr,
       out_dense ? const_cast<void*>(out_dense->const_data_ptr()) : nullptr, parts.mutable_data_ptr(), parts.size(1)},
      blt::wants_streaming(grad_x),
      grad_dense.const_data_ptr(),
      grad_x.mutable_data_ptr()};
  const auto ties = blt::cpu::patch_pool_ties_cpu(), shares = blt::cpu::patch_pool_shares_cpu();
  const auto spread = blt::cpu::patch_pool_backward_cpu();
  if (x_dense && items.num_long() > 0) {
    items.parallel_for(width, [&](int64_t first, int64_t end) { ties(args, first, end); });
    blt::parallel_for(items.num_long(), blt::grain(width),
                      [&](int64_t first, int64_t end) { shares(args, first, end); });
  }
  items.parallel_for(width, [&](int64_t first, int64_t end) { spread(args, first, end); });
  return grad_x;
}

}  // namespace

namespace blt {

void pool_segments(const Segments& segments, Reduce reduce, DType dtype, const Tensor& x, const Tensor& out) {
  if (out.numel() == 0) {
    return;
  }
  const int64_t width = out.size(2);
  const PoolItems items(segments, /*gaps=*/false);
  const Tensor parts = items.parts(width, x.scalar_type());
  const PatchPoolArgs args{dtype,
                           reduce,
                           width,
                           items.items(),
                           items.long_patches(),
                           x.const_data_ptr(),
                           out.mutable_data_ptr(),
                           parts.mutable_data_ptr(),
                           parts.size(1)};
  const auto pool = cpu::patch_pool_cpu(), join = cpu::patch_pool_join_cpu();
  items.parallel_for(width, [&](int64_t first, int64_t end) { pool(args, first, end); });
  parallel_for(items.num_long(), grain(width), [&](int64_t first, int64_t end) { join(args, first, end); });
}

}  // namespace blt

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def("patch_pool(Tensor x, Tensor offsets, str reduce) -> Tensor");
  // x and out: for max and min only. SymInt, so that compiled graphs keep the number of bytes symbolic.
  m.def(
      "patch_pool_backward(Tensor grad, Tensor offsets, Tensor? x, Tensor? out, SymInt num_bytes, str reduce) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("patch_pool", TORCH_BOX(&patch_pool_cpu));
  m.impl("patch_pool_backward", TORCH_BOX(&patch_pool_backward_cpu));
}
