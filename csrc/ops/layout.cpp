// layout_from_lengths and layout_from_starts make the fields of a PatchLayout.
#include "ops/layout.h"

#include "cpu/layout.h"

namespace blt {

namespace {

// One thread walks a row, and with fewer bytes than this in all rows a second thread does not pay.
constexpr int64_t kGrainBytes = 16384;

std::vector<int64_t> read_ints(const char* op, const char* argument, const Tensor& t) {
  check_cpu(op, argument, t);
  check_dim(op, argument, t, 1);
  const Tensor dense = blt::contiguous(t);
  const int64_t n = dense.numel();
  if (t.scalar_type() == ScalarType::Int) {
    const int32_t* p = dense.const_data_ptr<int32_t>();
    return {p, p + n};
  }
  check_dtype(op, argument, t, ScalarType::Long, "int32 or int64");
  const int64_t* p = dense.const_data_ptr<int64_t>();
  return {p, p + n};
}

LayoutFields empty_fields(const Sequences& sequences, int64_t capacity) {
  const int64_t batch = sequences.batch, num_bytes = sequences.num_bytes;
  BLT_CHECK(num_bytes <= INT32_MAX && capacity <= INT32_MAX, "PatchLayout: a row holds at most 2^31 - 1 bytes");
  const auto int32 = [](std::vector<int64_t> sizes) { return empty(std::move(sizes), ScalarType::Int); };
  return {int32({batch, capacity + 1}),   int32({batch, num_bytes}),
          int32({batch, num_bytes}),      int32({batch}),
          int32({sequences.count() + 1}), int32({batch})};
}

cpu::LayoutArgs layout_args(const Sequences& sequences, const uint8_t* next_is_start, const LayoutFields& fields) {
  const auto data = [](const Tensor& t) { return t.mutable_data_ptr<int32_t>(); };
  cpu::LayoutArgs args{};
  args.num_bytes = sequences.num_bytes;
  args.capacity = std::get<0>(fields).size(1) - 1;
  args.packed = sequences.packed;
  args.num_sequences = sequences.count();
  args.seq_begin = sequences.begin.data();
  args.seq_end = sequences.end.data();
  args.next_is_start = next_is_start;
  args.offsets = data(std::get<0>(fields));
  args.patch_ids = data(std::get<1>(fields));
  args.visible_ids = data(std::get<2>(fields));
  args.num_patches = data(std::get<3>(fields));
  args.cu_patches = data(std::get<4>(fields));
  args.overflow = data(std::get<5>(fields));
  return args;
}

template <class Kernel>
void run(Kernel kernel, const cpu::LayoutArgs& args, int64_t batch) {
  const int64_t row_cost = args.num_bytes + args.capacity + 1;
  parallel_for(batch, kGrainBytes / row_cost, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  if (!args.packed) {
    int32_t total = 0;
    args.cu_patches[0] = 0;
    for (int64_t b = 0; b < batch; ++b) {
      args.cu_patches[b + 1] = total += args.num_patches[b];
    }
  }
}

// One byte for each sequence; it is 0 where the caller does not know.
std::vector<uint8_t> read_next_is_start(const char* op, const std::optional<Tensor>& next_is_start, int64_t count) {
  std::vector<uint8_t> out(size_t(count), 0);
  if (next_is_start) {
    check_cpu(op, "next_is_start", *next_is_start);
    check_dtype(op, "next_is_start", *next_is_start, ScalarType::Bool, "bool");
    check_dim(op, "next_is_start", *next_is_start, 1);
    check_size(op, "next_is_start", *next_is_start, 0, count);
    const Tensor dense = blt::contiguous(*next_is_start);
    const auto* p = static_cast<const uint8_t*>(dense.const_data_ptr());
    for (int64_t s = 0; s < count; ++s) {
      out[size_t(s)] = p[s] != 0;
    }
  }
  return out;
}

LayoutFields layout_from_starts_cpu(const Tensor& mask, const std::optional<Tensor>& seq_lens,
                                    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& next_is_start,
                                    std::optional<int64_t> capacity) {
  constexpr const char* op = "PatchLayout.from_starts";
  check_dim(op, "mask", mask, 2);
  check_dtype(op, "mask", mask, ScalarType::Bool, "bool");
  const Sequences sequences = parse_sequences(op, mask.size(0), mask.size(1), seq_lens, cu_seqlens);
  const auto next = read_next_is_start(op, next_is_start, sequences.count());
  const Tensor dense = blt::contiguous(mask);
  return layout_of_starts(op, static_cast<const uint8_t*>(dense.const_data_ptr()), sequences, next.data(), capacity);
}

// Writes the offsets of one row of lengths, cut at `real` bytes. Returns whether the lengths reach beyond these and the
// next byte is the first one of its slot.
template <class Int>
bool read_lengths(const char* op, const Int* lengths, int64_t slots, int64_t num_bytes, int64_t real,
                  int32_t* offsets) {
  bool next_is_start = false;
  int64_t total = 0;
  offsets[0] = 0;
  for (int64_t c = 0; c < slots; ++c) {
    const int64_t length = lengths[c] > 0 ? int64_t(lengths[c]) : 0;
    next_is_start |= length > 0 && total == real;
    BLT_CHECK(length <= num_bytes + 1 - total, op,
              ": lengths: expected sums of at most num_bytes + 1 = ", num_bytes + 1, ", got at least ", total, " + ",
              length);
    total += length;
    offsets[c + 1] = int32_t(total < real ? total : real);
  }
  return next_is_start;
}

LayoutFields layout_from_lengths_cpu(const Tensor& lengths, int64_t num_bytes, const std::optional<Tensor>& seq_lens,
                                     const std::optional<Tensor>& cu_seqlens,
                                     const std::optional<Tensor>& next_is_start) {
  constexpr const char* op = "PatchLayout.from_lengths";
  check_dim(op, "lengths", lengths, 2);
  const bool is_int32 = lengths.scalar_type() == ScalarType::Int;
  if (!is_int32) {
    check_dtype(op, "lengths", lengths, ScalarType::Long, "int32 or int64");
  }
  BLT_CHECK(num_bytes >= 0, op, ": num_bytes: expected at least 0, got ", num_bytes);
  const int64_t batch = lengths.size(0), slots = lengths.size(1);
  const Sequences sequences = parse_sequences(op, batch, num_bytes, seq_lens, cu_seqlens);
  auto next = read_next_is_start(op, next_is_start, sequences.count());
  const LayoutFields fields = empty_fields(sequences, slots);
  cpu::LayoutArgs args = layout_args(sequences, next.data(), fields);

  const Tensor dense = blt::contiguous(lengths);
  for (int64_t b = 0; b < batch; ++b) {
    int32_t* offsets = args.offsets + b * (slots + 1);
    // The sequences of the row; the real bytes end with the last one.
    const size_t from = sequences.packed ? 0 : size_t(b), to = sequences.packed ? sequences.end.size() : from + 1;
    const int64_t end = from == to ? 0 : sequences.end[to - 1];
    const int64_t real = end - b * num_bytes;
    const bool next_starts =
        is_int32 ? read_lengths(op, dense.const_data_ptr<int32_t>() + b * slots, slots, num_bytes, real, offsets)
                 : read_lengths(op, dense.const_data_ptr<int64_t>() + b * slots, slots, num_bytes, real, offsets);
    for (size_t s = from; s < to && !next_is_start; ++s) {
      next[s] = next_starts && sequences.end[s] == end;
    }
    args.overflow[b] = 0;
  }
  if (sequences.packed) {
    int64_t c = 0;
    for (const int64_t begin : sequences.begin) {
      while (c < slots && args.offsets[c] < begin) {
        ++c;
      }
      BLT_CHECK(args.offsets[c] == begin || args.offsets[slots] < begin, op,
                ": lengths: expected a patch that starts at byte ", begin, ", where a sequence does");
    }
  }
  run(cpu::layout_from_lengths_cpu(), args, batch);
  return fields;
}

}  // namespace

Sequences parse_sequences(const char* op, int64_t batch, int64_t num_bytes, const std::optional<Tensor>& seq_lens,
                          const std::optional<Tensor>& cu_seqlens) {
  Sequences out{batch, num_bytes, cu_seqlens.has_value(), {}, {}};
  if (cu_seqlens) {
    BLT_CHECK(!seq_lens, op, ": cu_seqlens: expected either seq_lens or cu_seqlens, got both");
    BLT_CHECK(batch == 1, op, ": cu_seqlens: expected one row (B = 1) with cu_seqlens, got ", batch);
    const auto cu = read_ints(op, "cu_seqlens", *cu_seqlens);
    BLT_CHECK(!cu.empty() && cu[0] == 0, op, ": cu_seqlens: expected 0 as the first value");
    for (size_t s = 1; s < cu.size(); ++s) {
      BLT_CHECK(cu[s - 1] <= cu[s] && cu[s] <= num_bytes, op,
                ": cu_seqlens: expected values that rise from 0 to at most ", num_bytes, ", got ", cu[s], " after ",
                cu[s - 1]);
    }
    out.begin.assign(cu.begin(), cu.end() - 1);
    out.end.assign(cu.begin() + 1, cu.end());
    return out;
  }
  std::vector<int64_t> lens(size_t(batch), num_bytes);
  if (seq_lens) {
    lens = read_ints(op, "seq_lens", *seq_lens);
    check_size(op, "seq_lens", *seq_lens, 0, batch);
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = lens[size_t(b)];
    BLT_CHECK(0 <= n && n <= num_bytes, op, ": seq_lens: expected values in 0 .. ", num_bytes, ", got ", n, " in row ",
              b);
    out.begin.push_back(b * num_bytes);
    out.end.push_back(b * num_bytes + n);
  }
  return out;
}

LayoutFields layout_of_starts(const char* op, const uint8_t* starts, const Sequences& sequences,
                              const uint8_t* next_is_start, std::optional<int64_t> capacity) {
  const int64_t in_row = sequences.packed ? sequences.count() : 1;
  BLT_CHECK(!capacity || *capacity >= in_row, op, ": capacity: expected at least ", in_row,
            ", one slot for each sequence in a row, got ", capacity.value_or(0));
  const LayoutFields fields = empty_fields(sequences, capacity.value_or(sequences.num_bytes));
  cpu::LayoutArgs args = layout_args(sequences, next_is_start, fields);
  args.starts = starts;
  args.merge = capacity.has_value();
  run(cpu::layout_from_starts_cpu(), args, sequences.batch);
  return fields;
}

}  // namespace blt

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def(
      "layout_from_lengths(Tensor lengths, SymInt num_bytes, Tensor? seq_lens, Tensor? cu_seqlens, "
      "Tensor? next_is_start) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layout_from_starts(Tensor mask, Tensor? seq_lens, Tensor? cu_seqlens, Tensor? next_is_start, "
      "SymInt? capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("layout_from_lengths", TORCH_BOX(&blt::layout_from_lengths_cpu));
  m.impl("layout_from_starts", TORCH_BOX(&blt::layout_from_starts_cpu));
}
