// hash_ngram_ids hashes the n-grams of tokens, and hash_ngram_embedding sums the table rows that the hashes name.
#include "ops/hash_ngram_embedding.h"

#include "cpu/hash_ngram_embedding.h"
#include "ops/layout.h"

namespace {

using blt::Ints;
using blt::Tensor;
using blt::cpu::HashArgs;
using blt::cpu::HashRowCounts;

// Checked arguments of the hash, and the storage that HashArgs points into.
struct Hash {
  Tensor tokens;
  Ints sizes, size_numbers, bounds, primes;
  HashArgs args{};
  int64_t positions, tables;

  Hash(const char* op, const Tensor& tokens_, const Ints& ngram_sizes, int64_t num_rows, const Ints& primes_,
       const std::optional<Tensor>& cu_seqlens)
      : tokens(blt::contiguous(tokens_)), size_numbers(blt::ascending_order(ngram_sizes)), primes(primes_) {
    tables = blt::set_ngram_hash(op, tokens, ngram_sizes, num_rows, primes, args);
    positions = tokens.numel();
    for (const int64_t number : size_numbers) {
      sizes.push_back(ngram_sizes[number]);
    }
    const blt::Sequences sequences = blt::parse_sequences(op, tokens.size(0), tokens.size(1), std::nullopt, cu_seqlens);
    bounds = sequences.begin;
    if (sequences.packed) {  // bytes after the last offset count as one more sequence
      bounds.push_back(sequences.end.empty() ? 0 : sequences.end.back());
    }
    bounds.push_back(positions);
    args.bounds = bounds.data();
    args.num_bounds = int64_t(bounds.size());
    args.sizes = sizes.data();
    args.size_numbers = size_numbers.data();
    args.primes = primes.data();
  }
  Hash(const Hash&) = delete;
};

Tensor hash_ngram_ids_cpu(const Tensor& tokens, const Ints& ngram_sizes, int64_t num_rows, const Ints& primes,
                          const std::optional<Tensor>& cu_seqlens) {
  const Hash hash("hash_ngram_ids", tokens, ngram_sizes, num_rows, primes, cu_seqlens);
  Tensor ids = blt::empty({tokens.size(0), tokens.size(1), hash.tables}, blt::ScalarType::Long);
  int64_t* const out = ids.mutable_data_ptr<int64_t>();
  const auto kernel = blt::cpu::hash_ngram_ids_cpu();
  blt::parallel_for(hash.positions, 1024, [&](int64_t begin, int64_t end) { kernel(hash.args, out, begin, end); });
  return ids;
}

// The op does not use sparse_grad, which tells autograd what kind of gradient to make.
Tensor hash_ngram_embedding_cpu(const Tensor& tokens, const Tensor& table, const std::optional<Tensor>& base,
                                const Ints& ngram_sizes, int64_t num_rows, const Ints& primes,
                                const std::optional<Tensor>& cu_seqlens, bool normalize, bool sparse_grad) {
  constexpr const char* op = "hash_ngram_embedding";
  const Hash hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens);
  blt::check_cpu(op, "table", table);
  blt::check_table(op, table, hash.tables, num_rows);
  const int64_t width = table.size(1);
  const blt::DType table_dtype = blt::dtype_of(op, "table", table);
  std::optional<Tensor> base_dense;
  if (base) {
    blt::check_cpu(op, "base", *base);
    base_dense = blt::dense_base(op, *base, tokens, table);
  }
  Tensor out = blt::empty({tokens.size(0), tokens.size(1), width}, base ? base->scalar_type() : table.scalar_type());
  if (width == 0) {
    return out;
  }
  const blt::cpu::HashEmbeddingArgs args{hash.args,
                                         table_dtype,
                                         blt::dtype_of(op, "base", out),
                                         width,
                                         table.const_data_ptr(),
                                         table.stride(0),
                                         base ? base_dense->const_data_ptr() : nullptr,
                                         out.mutable_data_ptr(),
                                         blt::wants_streaming(out),
                                         normalize ? double(ngram_sizes.size() + 1) : 1.0};
  const auto kernel = blt::cpu::hash_ngram_embedding_cpu();
  blt::parallel_for(hash.positions, 16384 / (hash.tables * width),
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

// Which rows the table gradient has: all of the table, those that are read, or those and padding up to B * N * G rows.
enum class Rows { of_table, read, padded };

// Sums grad over the positions that read each table row. Returns the rows, the sums, and how many rows are read.
std::tuple<Tensor, Tensor, int64_t> table_gradient(const char* op, const Tensor& grad, const Hash& hash, bool normalize,
                                                   blt::ScalarType table_dtype, Rows which) {
  const int64_t positions = hash.positions, tables = hash.tables, num_rows = hash.args.num_rows;
  const int64_t position_bits = blt::check_hash_grad(op, grad, hash.tokens, tables, num_rows), width = grad.size(2);
  blt::check_cpu(op, "grad", grad);
  const Tensor grad_dense = blt::contiguous(grad);

  const auto ints = [](int64_t size) { return blt::empty({size}, blt::ScalarType::Long); };
  Tensor keys = ints(tables * positions), scratch = ints(tables * positions);
  std::vector<HashRowCounts> counts(static_cast<size_t>(tables)), before;
  const blt::cpu::HashSortArgs sort{hash.args,
                                    positions,
                                    position_bits,
                                    static_cast<uint64_t*>(keys.mutable_data_ptr()),
                                    static_cast<uint64_t*>(scratch.mutable_data_ptr()),
                                    counts.data()};
  const auto keys_kernel = blt::cpu::hash_ngram_keys_cpu();
  const auto sort_kernel = blt::cpu::hash_ngram_sort_cpu();
  blt::parallel_for(positions, 1024, [&](int64_t begin, int64_t end) { keys_kernel(sort, begin, end); });
  blt::parallel_for(tables, 1, [&](int64_t begin, int64_t end) { sort_kernel(sort, begin, end); });
  HashRowCounts total{};
  for (const HashRowCounts& column : counts) {
    before.push_back(total);
    total.rows += column.rows;
    total.shared_rows += column.shared_rows;
    total.shared_entries += column.shared_entries;
  }

  const int64_t size = which == Rows::padded ? tables * positions : total.rows;
  const bool dense = which == Rows::of_table;
  Tensor rows = ints(size), shared_rows = ints(total.shared_rows), shared_begin = ints(total.shared_rows + 1),
         shared_positions = ints(total.shared_entries);
  Tensor out = blt::empty({dense ? tables * num_rows : size, width}, table_dtype);
  const blt::DType out_dtype = blt::dtype_of(op, "table_dtype", out);
  const blt::cpu::HashGradArgs args{blt::dtype_of(op, "grad", grad),
                                    out_dtype,
                                    width,
                                    tables,
                                    dense,
                                    blt::wants_streaming(out),
                                    normalize ? double(hash.args.num_sizes + 1) : 1.0,
                                    grad_dense.const_data_ptr(),
                                    out.mutable_data_ptr(),
                                    rows.mutable_data_ptr<int64_t>(),
                                    scratch.mutable_data_ptr<int64_t>(),  // the sort does not need it any more
                                    shared_rows.mutable_data_ptr<int64_t>(),
                                    shared_begin.mutable_data_ptr<int64_t>(),
                                    shared_positions.mutable_data_ptr<int64_t>()};
  blt::check_hash_dtypes(op, "grad", args.grad_dtype, out_dtype);
  args.shared_begin[total.shared_rows] = total.shared_entries;
  const auto list_kernel = blt::cpu::hash_ngram_list_rows_cpu();
  const auto sole_kernel = blt::cpu::hash_ngram_sole_rows_cpu();
  const auto shared_kernel = blt::cpu::hash_ngram_shared_rows_cpu();
  const auto unread_kernel = blt::cpu::hash_ngram_unread_rows_cpu();
  blt::parallel_for(tables, 1, [&](int64_t begin, int64_t end) { list_kernel(sort, args, before.data(), begin, end); });
  blt::parallel_for(positions, 16, [&](int64_t begin, int64_t end) { sole_kernel(args, begin, end); });
  // The work is cut into tiles of columns as well, so that several threads work on a row that every position reads.
  const int64_t entries = total.shared_entries, tile = blt::cpu::kSharedTile, tiles = (width + tile - 1) / tile;
  blt::parallel_for(tiles * entries, 64, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t t = begin / entries, stop = std::min(end, (t + 1) * entries);
      shared_kernel(args, total.shared_rows, begin - t * entries, stop - t * entries, t * tile,
                    std::min(width, (t + 1) * tile));
      begin = stop;
    }
  });
  // Rows of out that are no sums: in a dense gradient the rows that nobody reads, otherwise the padding.
  const int64_t listed = dense ? total.rows : 0, first = dense ? 0 : total.rows;
  blt::parallel_for(out.size(0) - first, 64,
                    [&](int64_t begin, int64_t end) { unread_kernel(args, listed, first + begin, first + end); });
  std::fill(args.rows + total.rows, args.rows + size, total.rows > 0 ? args.rows[total.rows - 1] : 0);
  return {rows, out, total.rows};
}

Tensor hash_ngram_embedding_backward_cpu(const Tensor& grad, const Tensor& tokens, const Ints& ngram_sizes,
                                         int64_t num_rows, const Ints& primes, const std::optional<Tensor>& cu_seqlens,
                                         bool normalize, blt::ScalarType table_dtype) {
  constexpr const char* op = "hash_ngram_embedding_backward";
  const Hash hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens);
  return std::get<1>(table_gradient(op, grad, hash, normalize, table_dtype, Rows::of_table));
}

std::tuple<Tensor, Tensor> hash_ngram_embedding_sparse_backward_cpu(const Tensor& grad, const Tensor& tokens,
                                                                    const Ints& ngram_sizes, int64_t num_rows,
                                                                    const Ints& primes,
                                                                    const std::optional<Tensor>& cu_seqlens,
                                                                    bool normalize, blt::ScalarType table_dtype) {
  constexpr const char* op = "hash_ngram_embedding_sparse_backward";
  const Hash hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens);
  const auto [rows, values, count] = table_gradient(op, grad, hash, normalize, table_dtype, Rows::read);
  return {rows, values};
}

std::tuple<Tensor, Tensor, Tensor> hash_ngram_embedding_row_grad_cpu(const Tensor& grad, const Tensor& tokens,
                                                                     const Ints& ngram_sizes, int64_t num_rows,
                                                                     const Ints& primes,
                                                                     const std::optional<Tensor>& cu_seqlens,
                                                                     bool normalize, blt::ScalarType table_dtype) {
  constexpr const char* op = "hash_ngram_embedding_row_grad";
  const Hash hash(op, tokens, ngram_sizes, num_rows, primes, cu_seqlens);
  const auto [rows, values, num_read] = table_gradient(op, grad, hash, normalize, table_dtype, Rows::padded);
  Tensor count = blt::empty({}, blt::ScalarType::Long);
  *count.mutable_data_ptr<int64_t>() = num_read;
  return {rows, values, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels, m) {
  m.def("hash_ngram_ids(Tensor tokens, int[] ngram_sizes, int num_rows, int[] primes, Tensor? cu_seqlens) -> Tensor");
  m.def(
      "hash_ngram_embedding(Tensor tokens, Tensor table, Tensor? base, int[] ngram_sizes, int num_rows, int[] primes, "
      "Tensor? cu_seqlens, bool normalize, bool sparse_grad) -> Tensor");
  m.def(
      "hash_ngram_embedding_backward(Tensor grad, Tensor tokens, int[] ngram_sizes, int num_rows, int[] primes, "
      "Tensor? cu_seqlens, bool normalize, ScalarType table_dtype) -> Tensor");
  m.def(
      "hash_ngram_embedding_sparse_backward(Tensor grad, Tensor tokens, int[] ngram_sizes, int num_rows, int[] primes, "
      "Tensor? cu_seqlens, bool normalize, ScalarType table_dtype) -> (Tensor rows, Tensor values)");
  m.def(
      "hash_ngram_embedding_row_grad(Tensor grad, Tensor tokens, int[] ngram_sizes, int num_rows, int[] primes, "
      "Tensor? cu_seqlens, bool normalize, ScalarType table_dtype) -> (Tensor rows, Tensor values, Tensor count)");
}

STABLE_TORCH_LIBRARY_IMPL(blt_kernels, CPU, m) {
  m.impl("hash_ngram_ids", TORCH_BOX(&hash_ngram_ids_cpu));
  m.impl("hash_ngram_embedding", TORCH_BOX(&hash_ngram_embedding_cpu));
  m.impl("hash_ngram_embedding_backward", TORCH_BOX(&hash_ngram_embedding_backward_cpu));
  m.impl("hash_ngram_embedding_sparse_backward", TORCH_BOX(&hash_ngram_embedding_sparse_backward_cpu));
  m.impl("hash_ngram_embedding_row_grad", TORCH_BOX(&hash_ngram_embedding_row_grad_cpu));
}
