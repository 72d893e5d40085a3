// patch_pool: bytes -> patches, the reduction of each patch's bytes.
#include "ops/patch_pool.h"

#include <algorithm>

#include "ops/reduce.h"

namespace {

using blt::Reduce;
using blt::ScalarType;
using blt::Segments;
using blt::Tensor;
using blt::cpu::DividedPatch;
using blt::cpu::PatchPiece;
using blt::cpu::PatchPoolArgs;
using blt::cpu::kPieceRows;

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

// A batch cut into pieces of about equal use to a thread.
class Pieces {
 public:
  // With `gaps`, bytes in no patch are pieces too.
  Pieces(const Segments& s, bool gaps) {
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

  const PatchPiece* pieces() const { return pieces_.data(); }
  const DividedPatch* divided() const { return divided_.data(); }
  int64_t num_divided() const { return int64_t(divided_.size()); }

  // Accumulators for the parts of divided patches, in rows of whole cache lines.
  Tensor parts(int64_t width, ScalarType dtype) const {
    return blt::empty({num_parts_, (width + 15) / 16 * 16}, dtype == ScalarType::Double ? dtype : ScalarType::Float);
  }

  // Calls body(first piece, end) in parallel, with about equal numbers of bytes and slots in each call.
  template <class Body>
  void parallel_for(int64_t width, const Body& body) const {
    const auto first = work_before_.begin(), last = first + int64_t(pieces_.size());
    blt::parallel_for(work_, blt::grain(width), [&](int64_t begin, int64_t end) {
      body(std::lower_bound(first, last, begin) - first, std::lower_bound(first, last, end) - first);
    });
  }

 private:
  void add(int64_t begin, int64_t end, int64_t patch) {
    int64_t divided = -1;
    if (patch >= 0 && end - begin > kPieceRows) {
      divided = num_divided();
      divided_.push_back({begin, end, patch, num_parts_});
      num_parts_ += (end - begin + kPieceRows - 1) / kPieceRows;
    }
    if (patch >= 0 && begin == end) {
      push({begin, end, patch, divided});
    }
    for (; begin < end; begin += kPieceRows) {
      push({begin, std::min(begin + kPieceRows, end), patch, divided});
    }
  }

  void push(const PatchPiece& piece) {
    pieces_.push_back(piece);
    work_before_.push_back(work_);
    work_ += piece.end - piece.begin + 1;
  }

  std::vector<PatchPiece> pieces_;
  std::vector<int64_t> work_before_;
  std::vector<DividedPatch> divided_;
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
  // What max and min compare to find the ties again: x and the forward's result.
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
  const Pieces pieces({batch, num_bytes, capacity, begin, begin + 1, capacity + 1}, /*gaps=*/true);
  const Tensor parts = pieces.parts(width, grad.scalar_type());
  const blt::cpu::PatchPoolBackwardArgs args{
      {blt::dtype_of(op, "grad", grad), kind, width, pieces.pieces(), pieces.divided(),
       x_dense ? x_dense->const_data_ptr() : nullptr, out_dense ? const_cast<void*>(out_dense->const_data_ptr()) : nullptr,
       parts.mutable_data_ptr(), parts.size(1)},
      blt::wants_streaming(grad_x),
      grad_dense.const_data_ptr(),
      grad_x.mutable_data_ptr()};
  const auto ties = blt::cpu::patch_pool_ties_cpu(), shares = blt::cpu::patch_pool_shares_cpu();
  const auto spread = blt::cpu::patch_pool_backward_cpu();
  if (x_dense && pieces.num_divided() > 0) {
    pieces.parallel_for(width, [&](int64_t first, int64_t end) { ties(args, first, end); });
    blt::parallel_for(pieces.num_divided(), blt::grain(width), [&](int64_t first, int64_t end) { shares(args, first, end); });
  }
  pieces.parallel_for(width, [&](int64_t first, int64_t end) { spread(args, first, end); });
  return grad_x;
}

}  // namespace

namespace blt {

void pool_segments(const Segments& segments, Reduce reduce, DType dtype, const Tensor& x, const Tensor& out) {
  if (out.numel() == 0) {
    return;
  }
  const int64_t width = out.size(2);
  const Pieces pieces(segments, /*gaps=*/false);
  const Tensor parts = pieces.parts(width, x.scalar_type());
  const PatchPoolArgs args{dtype,
                           reduce,
                           width,
                           pieces.pieces(),
                           pieces.divided(),
                           x.const_data_ptr(),
                           out.mutable_data_ptr(),
                           parts.mutable_data_ptr(),
                           parts.size(1)};
  const auto pool = cpu::patch_pool_cpu(), join = cpu::patch_pool_join_cpu();
  pieces.parallel_for(width, [&](int64_t first, int64_t end) { pool(args, first, end); });
  parallel_for(pieces.num_divided(), grain(width), [&](int64_t first, int64_t end) { join(args, first, end); });
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
