// patch_gather gives each byte the row of its patch. Its backward is a segment sum.
#include <algorithm>

#include "cpu/patch_gather.h"
#include "ops/patch_pool.h"

namespace {

using blt::Tensor;

Tensor check_ids(const char* op, const Tensor& ids, int64_t batch, int64_t capacity) {
  blt::check_dim(op, "ids", ids, 2);
  blt::check_size(op, "ids", ids, 0, batch);
  blt::check_dtype(op, "ids", ids, blt::ScalarType::Int, "int32");
  blt::check_cpu(op, "ids", ids);
  const Tensor dense = blt::contiguous(ids);
  const int32_t* id = dense.const_data_ptr<int32_t>();
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < dense.numel(); ++i) {
    low = std::min(low, id[i]);
    high = std::max(high, id[i]);
  }
  BLT_CHECK(low >= -1 && high < capacity, op, ": ids: expected values from -1 to ", capacity - 1, ", got ",
            low < -1 ? low : high);
  return dense;
}

Tensor patch_gather_cpu(const Tensor& y, const Tensor& ids) {
  constexpr const char* op = "patch_gather";
  blt::check_dim(op, "y", y, 3);
  blt::dtype_of(op, "y", y);
  const int64_t batch = y.size(0), capacity = y.size(1), width = y.size(2);
  const Tensor y_dense = blt::contiguous(y), ids_dense = check_ids(op, ids, batch, capacity);
  const int64_t num_bytes = ids.size(1);
  Tensor out = blt::empty({batch, num_bytes, width}, y.scalar_type());
  const blt::cpu::PatchGatherArgs args{num_bytes,
                                       capacity,
                                       width * int64_t(y.element_size()),
                                       blt::wants_streaming(out),
                                       ids_dense.const_data_ptr<int32_t>(),
                                       y_dense.const_data_ptr(),
                                       out.mutable_data_ptr()};
  const auto kernel = blt::cpu::patch_gather_cpu();
  blt::parallel_for(width == 0 ? 0 : batch * num_bytes, blt::grain(width),
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

// Finds the bytes begin .. end - 1 of each slot. In the ids of a layout equal ids are neighbours, and ids never
// decrease, apart from -1 between them.
void find_segments(const char* op, const int32_t* ids, int64_t num_bytes, int64_t capacity, int32_t* begin,
                   int32_t* end) {
  int64_t slot = -1;  // the last slot seen
  int32_t position = 0;
  for (int32_t i = 0; i < num_bytes; ++i) {
    if (ids[i] < 0) {
      continue;
    }
    if (ids[i] == slot && position == i) {
      end[slot] = position = i + 1;
      continue;
    }
    BLT_CHECK(ids[i] > slot, op, ": ids: expected the ids of a layout, which never decrease, got ", ids[i], " after ",
              slot);
    while (++slot < ids[i]) {
      begin[slot] = end[slot] = position;
    }
    begin[slot] = i;
    end[slot] = position = i + 1;
  }
  while (++slot < capacity) {
    begin[slot] = end[slot] = position;
  }
}

Tensor patch_gather_backward_cpu(const Tensor& grad, const Tensor& ids, int64_t capacity) {
  constexpr const char* op = "patch_gather_backward";
  blt::check_dim(op, "grad", grad, 3);
  BLT_CHECK(capacity >= 0, op, ": capacity: expected at least 0, got ", capacity);
  const int64_t batch = grad.size(0), num_bytes = grad.size(1), width = grad.size(2);
  const Tensor grad_dense = blt::contiguous(grad), ids_dense = check_ids(op, ids, batch, capacity);
  blt::check_size(op, "ids", ids, 1, num_bytes);
  std::vector<int32_t> begin(batch * capacity), end(batch * capacity);
  for (int64_t b = 0; b < batch; ++b) {
    find_segments(op, ids_dense.const_data_ptr<int32_t>() + b * num_bytes, num_bytes, capacity,
                  begin.data() + b * capacity, end.data() + b * capacity);
  }
  Tensor grad_y = blt::empty({batch, capacity, width}, grad.scalar_type());
  blt::pool_segments({batch, num_bytes, capacity, begin.data(), end.data(), capacity}, blt::Reduce::sum,
                     blt::dtype_of(op, "grad", grad), grad_dense, grad_y);
  return grad_y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def("patch_gather(Tensor y, Tensor ids) -> Tensor");
  m.def("patch_gather_backward(Tensor grad, Tensor ids, SymInt capacity) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("patch_gather", TORCH_BOX(&patch_gather_cpu));
  m.impl("patch_gather_backward", TORCH_BOX(&patch_gather_backward_cpu));
}
