// hash_ngram_ids and hash_ngram_embedding on CUDA.
#include "cuda/hash_ngram_embedding.h"

#include "ops/cuda/sort.h"
#include "ops/hash_ngram_embedding.h"

namespace {

using blt::Ints;
using blt::ScalarType;
using blt::Tensor;
using blt::cuda::HashArgs;
using blt::cuda::OnDevice;

// Checked arguments of the hash, and the storage that HashArgs points into.
struct Hash {
  Tensor tokens;
  std::optional<Tensor> offsets, numbers;
  OnDevice device;
  HashArgs args{};
  int64_t positions, tables;

  Hash(const char* op, const Tensor& tokens_, const Ints& ngram_sizes, int64_t num_rows, const Ints& primes,
       const std::optional<Tensor>& cu_seqlens)
      : tokens(tokens_), device(device_of(op, tokens_, cu_seqlens)) {
    tokens = blt::contiguous(tokens);
    tables = blt::set_ngram_hash(op, tokens, ngram_sizes, num_rows, primes, args);
    positions = tokens.numel();
    args.positions = positions;
    args.row_length = tokens.size(1);
    if (cu_seqlens) {
      set_offsets(op, *cu_seqlens);
    }
    set_numbers(ngram_sizes, primes);
  }
  Hash(const Hash&) = delete;

 private:
  static int device_of(const char* op, const Tensor& tokens, const std::optional<Tensor>& cu_seqlens) {
    if (cu_seqlens) {
      blt::check_same_device(op, "cu_seqlens", *cu_seqlens, tokens);
    }
    return blt::device_index(tokens);
  }

  void set_offsets(const char* op, const Tensor& cu_seqlens) {
    BLT_CHECK(tokens.size(0) == 1, op, ": cu_seqlens: expected one row (B = 1) with cu_seqlens, got ", tokens.size(0));
    blt::check_dim(op, "cu_seqlens", cu_seqlens, 1);
    BLT_CHECK(cu_seqlens.size(0) > 0, op, ": cu_seqlens: expected shape [S + 1], got no values");
    offsets = blt::contiguous(cu_seqlens);
    args.num_offsets = offsets->size(0);
    if (offsets->scalar_type() == ScalarType::Long) {
      args.offsets64 = offsets->const_data_ptr<int64_t>();
    } else {
      blt::check_dtype(op, "cu_seqlens", *offsets, ScalarType::Int, "int32 or int64");
      args.offsets32 = offsets->const_data_ptr<int32_t>();
    }
  }

  void set_numbers(const Ints& sizes, const Ints& primes) {
    const Ints order = blt::ascending_order(sizes);
    Ints all;
    for (const int64_t number : order) {
      all.push_back(sizes[number]);
    }
    all.insert(all.end(), order.begin(), order.end());
    all.insert(all.end(), primes.begin(), primes.end());
    const int64_t count = int64_t(all.size());
    if (count <= blt::cuda::kFewNumbers) {
      std::copy(all.begin(), all.end(), args.few);
    } else {
      numbers = blt::empty_on(tokens, {count}, ScalarType::Long);
      args.numbers = numbers->mutable_data_ptr<int64_t>();
      blt::cuda::store_numbers(all.data(), count, numbers->mutable_data_ptr<int64_t>(), device.stream());
    }
  }
};

Tensor hash_ngram_ids_cuda(const Tensor& tokens, const Ints& ngram_sizes, int64_t num_rows, const Ints& primes,
                           const std::optional<Tensor>& cu_seqlens) {
  const Hash hash("hash_ngram_ids", tokens, ngram_sizes, num_rows, primes, cu_seqlens);
  Tensor ids = blt::empty_on(tokens, {tokens.size(0), tokens.size(1), hash.tables}, ScalarType::Long);
  if (hash.positions > 0) {
    blt::cuda::hash_ngram_ids(hash.args, ids.mutable_data_ptr<int64_t>(), hash.device.stream());
  }
  return ids;
}

double factor_of(const Ints& ngram_sizes, bool normalize) {
  return normalize ? 1.0 / double(ngram_sizes.size() + 1) : 1.0;
}

// The op does not use sparse_grad, which tells autograd what kind of gradient to make.
Tensor hash_ngram_embedding_cuda(const Tensor& tokens, const Tensor& table, const std::optional<Tensor>& base,
                                 const Ints& ngram_sizes, int64_t num_rows, const Ints& primes,
                                 const std::optional<Tensor>& cu_seqlens, bool normalize, bool sparse_grad) {
  constexpr const char* op = "hash_ngram_embedding";
  blt::check_same_device(op, "table", table, tokens);
  if (base) {
    blt::check_same_device(op, "base", *base, tokens);
  }
  const Hash hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens);
  blt::check_table(op, table, hash.tables, num_rows);
  const int64_t width = table.size(1);
  const blt::DType table_dtype = blt::dtype_of(op, "table", table);
  std::optional<Tensor> base_dense;
  if (base) {
    base_dense = blt::dense_base(op, *base, tokens, table);
  }
  Tensor out =
      blt::empty_on(tokens, {tokens.size(0), tokens.size(1), width}, base ? base->scalar_type() : table.scalar_type());
  if (out.numel() > 0) {
    blt::cuda::hash_ngram_embedding(
        {hash.args, table_dtype, blt::dtype_of(op, "base", out), width, table.const_data_ptr(), table.stride(0),
         base ? base_dense->const_data_ptr() : nullptr, out.mutable_data_ptr(), factor_of(ngram_sizes, normalize)},
        hash.device.stream());
  }
  return out;
}

// The keys of all positions and tables, sorted.
struct Sorted {
  Tensor keys, places, heads, positions;
  std::optional<Tensor> runs;  // for each tile, how many runs start in it or before it
  blt::cuda::SortedKeys args{};

  Sorted(const Hash& hash, bool with_runs) {
    const int64_t entries = hash.tables * hash.positions, tiles = blt::cuda::run_tiles(entries);
    const bool wide = hash.tables * hash.args.num_rows > INT32_MAX;
    Tensor unsorted = blt::empty_on(hash.tokens, {entries}, wide ? ScalarType::Long : ScalarType::Int);
    void* const to = unsorted.mutable_data_ptr();
    const blt::cuda::Stream stream = hash.device.stream();
    blt::cuda::hash_ngram_keys(hash.args, wide ? nullptr : static_cast<int32_t*>(to),
                               wide ? static_cast<int64_t*>(to) : nullptr, stream);
    std::tie(keys, places) = blt::stable_sort(unsorted);
    heads = blt::empty_on(hash.tokens, {tiles}, ScalarType::Int);
    positions = blt::empty_on(hash.tokens, {entries}, ScalarType::Int);
    args = {entries, wide ? nullptr : keys.const_data_ptr<int32_t>(), wide ? keys.const_data_ptr<int64_t>() : nullptr,
            static_cast<uint32_t*>(heads.mutable_data_ptr())};
    std::optional<Tensor> counts;
    if (with_runs) {
      counts = blt::empty_on(hash.tokens, {tiles}, ScalarType::Int);
    }
    blt::cuda::hash_ngram_runs(args, places.const_data_ptr<int64_t>(), hash.positions,
                               positions.mutable_data_ptr<int32_t>(),
                               counts ? counts->mutable_data_ptr<int32_t>() : nullptr, stream);
    if (with_runs) {
      runs = blt::running_sum(*counts);
    }
  }
};

blt::DType check_grad(const char* op, const Tensor& grad, const Hash& hash) {
  blt::check_hash_grad(op, grad, hash.tokens, hash.tables, hash.args.num_rows);
  const blt::DType dtype = blt::dtype_of(op, "grad", grad);
  BLT_CHECK(hash.positions <= INT32_MAX / hash.tables, op, ": tokens: expected tables * tokens below 2**31, got ",
            hash.tables, " * ", hash.positions);
  return dtype;
}

// Writes the sums of grad to `out`.
void sum_runs(const Sorted& sorted, const Tensor& grad, blt::DType grad_dtype, const Tensor& out, blt::DType out_dtype,
              double factor, blt::cuda::Stream stream) {
  const int64_t width = grad.size(2), entries = sorted.args.entries;
  const Tensor grad_dense = blt::contiguous(grad);
  const int64_t tiles = entries > blt::cuda::kRunTile ? blt::cuda::run_tiles(entries) : 0;
  const ScalarType sums = out_dtype == blt::DType::f64 ? ScalarType::Double : ScalarType::Float;
  const Tensor parts = blt::empty_on(grad, {tiles, width}, sums);
  blt::cuda::hash_ngram_table_gradient(
      {sorted.args, grad_dtype, out_dtype, width, sorted.positions.const_data_ptr<int32_t>(),
       sorted.runs ? sorted.runs->const_data_ptr<int64_t>() : nullptr, grad_dense.const_data_ptr(),
       out.mutable_data_ptr(), parts.mutable_data_ptr(), factor},
      stream);
}

Tensor hash_ngram_embedding_backward_cuda(const Tensor& grad, const Tensor& tokens, const Ints& ngram_sizes,
                                          int64_t num_rows, const Ints& primes, const std::optional<Tensor>& cu_seqlens,
                                          bool normalize, ScalarType table_dtype) {
  constexpr const char* op = "hash_ngram_embedding_backward";
  blt::check_same_device(op, "grad", grad, tokens);
  const Hash hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens);
  const blt::DType grad_dtype = check_grad(op, grad, hash);
  const std::vector<int64_t> sizes{hash.tables * num_rows, grad.size(2)};
  Tensor out = blt::touchable(torch::stable::new_zeros(grad, sizes, table_dtype));
  const blt::DType out_dtype = blt::dtype_of(op, "table_dtype", out);
  blt::check_hash_dtypes(op, "grad", grad_dtype, out_dtype);
  if (grad.numel() > 0) {
    sum_runs(Sorted(hash, false), grad, grad_dtype, out, out_dtype, factor_of(ngram_sizes, normalize),
             hash.device.stream());
  }
  return out;
}

// The table rows that are read, the sums of grad for them, and how many there are. With `padded` the result has as many
// rows as entries. Otherwise it has no other rows, and the function waits for the device once, to learn their number.
std::tuple<Tensor, Tensor, Tensor> row_gradient(const char* op, const Tensor& grad, const Hash& hash, double factor,
                                                ScalarType table_dtype, bool padded) {
  const blt::cuda::Stream stream = hash.device.stream();
  const blt::DType grad_dtype = check_grad(op, grad, hash);
  std::optional<Sorted> sorted;
  Tensor count;
  int64_t size = 0;
  if (hash.positions > 0) {
    sorted.emplace(hash, true);
    count = torch::stable::select(*sorted->runs, 0, sorted->runs->numel() - 1);
    size = padded ? sorted->args.entries : blt::read(count);
  } else {
    count = blt::touchable(torch::stable::new_zeros(hash.tokens, {}, ScalarType::Long));
  }
  Tensor rows = blt::empty_on(hash.tokens, {size}, ScalarType::Long);
  Tensor values = blt::empty_on(grad, {size, grad.size(2)}, table_dtype);
  const blt::DType out_dtype = blt::dtype_of(op, "table_dtype", values);
  blt::check_hash_dtypes(op, "grad", grad_dtype, out_dtype);
  if (size > 0) {
    blt::cuda::hash_ngram_rows(sorted->args, sorted->runs->const_data_ptr<int64_t>(), rows.mutable_data_ptr<int64_t>(),
                               size, stream);
  }
  if (values.numel() > 0) {
    sum_runs(*sorted, grad, grad_dtype, values, out_dtype, factor, stream);
    if (padded) {
      const int64_t row_bytes = grad.size(2) * int64_t(values.element_size());
      blt::cuda::hash_ngram_padding(count.const_data_ptr<int64_t>(), size, row_bytes, values.mutable_data_ptr(),
                                    stream);
    }
  }
  return {rows, values, count};
}

std::tuple<Tensor, Tensor> hash_ngram_embedding_sparse_backward_cuda(const Tensor& grad, const Tensor& tokens,
                                                                     const Ints& ngram_sizes, int64_t num_rows,
                                                                     const Ints& primes,
                                                                     const std::optional<Tensor>& cu_seqlens,
                                                                     bool normalize, ScalarType table_dtype) {
  constexpr const char* op = "hash_ngram_embedding_sparse_backward";
  blt::check_same_device(op, "grad", grad, tokens);
  const Hash hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens);
  const auto [rows, values, count] =
      row_gradient(op, grad, hash, factor_of(ngram_sizes, normalize), table_dtype, /*padded=*/false);
  return {rows, values};
}

std::tuple<Tensor, Tensor, Tensor> hash_ngram_embedding_row_grad_cuda(const Tensor& grad, const Tensor& tokens,
                                                                      const Ints& ngram_sizes, int64_t num_rows,
                                                                      const Ints& primes,
                                                                      const std::optional<Tensor>& cu_seqlens,
                                                                      bool normalize, ScalarType table_dtype) {
  constexpr const char* op = "hash_ngram_embedding_row_grad";
  blt::check_same_device(op, "grad", grad, tokens);
  const Hash hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens);
  const auto [rows, values, count] =
      row_gradient(op, grad, hash, factor_of(ngram_sizes, normalize), table_dtype, /*padded=*/true);
  return {rows, values, torch::stable::clone(count)};  // a copy, so that the running sums can be freed
}

}  // namespace

BLT_CUDA_OPS(m) {
  m.impl("hash_ngram_ids", TORCH_BOX(&hash_ngram_ids_cuda));
  m.impl("hash_ngram_embedding", TORCH_BOX(&hash_ngram_embedding_cuda));
  m.impl("hash_ngram_embedding_backward", TORCH_BOX(&hash_ngram_embedding_backward_cuda));
  m.impl("hash_ngram_embedding_sparse_backward", TORCH_BOX(&hash_ngram_embedding_sparse_backward_cuda));
  m.impl("hash_ngram_embedding_row_grad", TORCH_BOX(&hash_ngram_embedding_row_grad_cuda));
}
