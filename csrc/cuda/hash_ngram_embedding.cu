#include "cuda/hash_ngram_embedding.cuh"

#include "cuda/launch.h"

namespace blt::cuda {

namespace {

int64_t blocks_for(int64_t threads) { return ceil_div(threads, kHashThreads); }

int tables_of(const HashArgs& args) { return args.num_sizes * args.num_primes; }

template <class T, class U, int N>
void embed(const HashEmbeddingArgs& args, Stream stream) {
  // A block takes enough positions for hashing to be little of its time, and few enough for there to be many blocks.
  const int64_t packs = args.width / N;
  const int64_t most = kMaxTables / tables_of(args.hash);
  const int64_t tile = max_of(int64_t(1), min_of(8 * kHashThreads / packs, most));
  const int64_t blocks = ceil_div(args.hash.positions, tile);
  launch("hash_ngram_embedding", hash_ngram_embedding_kernel<T, U, N>, blocks, kHashThreads, 0, stream, args,
         int(tile));
}

template <class T, class U, int N>
void sum(const HashGradArgs& args, Stream stream) {
  const int64_t tiles = run_tiles(args.sorted.entries);
  const int64_t blocks = blocks_for(tiles * (args.width / N));
  launch("hash_ngram_sum", hash_ngram_sum_kernel<T, U, N>, blocks, kHashThreads, 0, stream, args);
}

template <class T, int N>
void join(const HashGradArgs& args, Stream stream) {
  const int64_t chunks = ceil_div(args.width, kWarp * N);
  launch("hash_ngram_join", hash_ngram_join_kernel<T, N>, ceil_div(run_tiles(args.sorted.entries), kWarp) * chunks,
         kHashThreads, 0, stream, args, chunks);
}

// How many elements one access covers in rows of each of these types.
template <class T, class U>
constexpr int kWide = 16 / int(sizeof(T) > sizeof(U) ? sizeof(T) : sizeof(U));

}  // namespace

void store_numbers(const int64_t* numbers, int64_t count, int64_t* out, Stream stream) {
  for (int64_t done = 0; done < count; done += kHashThreads) {
    const int some = int(min_of(count - done, int64_t(kHashThreads)));
    Numbers batch{};
    for (int i = 0; i < some; ++i) batch.data[i] = numbers[done + i];
    launch("store_numbers", store_numbers_kernel, 1, kHashThreads, 0, stream, batch, out + done, some);
  }
}

void hash_ngram_ids(const HashArgs& args, int64_t* ids, Stream stream) {
  const int tile = kMaxTables / tables_of(args);
  launch("hash_ngram_ids", hash_ngram_ids_kernel, ceil_div(args.positions, tile), kHashThreads, 0, stream, args, ids,
         tile);
}

void hash_ngram_embedding(const HashEmbeddingArgs& args, Stream stream) {
  BLT_DISPATCH_TABLE(args.table_dtype, args.out_dtype, T, U, {
    constexpr int N = kWide<T, U>;
    const bool wide = access_width(args.table_stride, sizeof(T), N, args.table) == N &&
                      access_width(args.width, sizeof(U), N, args.base, args.out) == N;
    (wide ? embed<T, U, N> : embed<T, U, 1>)(args, stream);
  })
}

void hash_ngram_keys(const HashArgs& args, int32_t* keys32, int64_t* keys64, Stream stream) {
  const int64_t blocks = blocks_for(args.positions * args.num_primes);
  if (keys64 != nullptr) {
    launch("hash_ngram_keys", hash_ngram_keys_kernel<int64_t>, blocks, kHashThreads, 0, stream, args, keys64);
  } else {
    launch("hash_ngram_keys", hash_ngram_keys_kernel<int32_t>, blocks, kHashThreads, 0, stream, args, keys32);
  }
}

void hash_ngram_runs(const SortedKeys& sorted, const int64_t* places, int64_t num_positions, int32_t* positions,
                     int32_t* counts, Stream stream) {
  launch("hash_ngram_runs", hash_ngram_runs_kernel, blocks_for(sorted.entries), kHashThreads, 0, stream, sorted, places,
         num_positions, positions, counts);
}

void hash_ngram_rows(const SortedKeys& sorted, const int64_t* runs, int64_t* rows, int64_t num_rows, Stream stream) {
  launch("hash_ngram_rows", hash_ngram_rows_kernel, blocks_for(sorted.entries), kHashThreads, 0, stream, sorted, runs,
         rows, num_rows);
}

void hash_ngram_padding(const int64_t* count, int64_t num_rows, int64_t row_bytes, void* out, Stream stream) {
  constexpr int64_t kBlocks = 2048;  // enough for any device; how many rows are to be filled is not known here
  const auto run = [&](auto access) {
    using Access = decltype(access);
    const int64_t accesses = row_bytes / int64_t(sizeof(Access));
    launch("hash_ngram_padding", hash_ngram_padding_kernel<Access>, min_of(blocks_for(num_rows * accesses), kBlocks),
           kHashThreads, 0, stream, count, num_rows, accesses, static_cast<Access*>(out));
  };
  if (access_width(row_bytes, 1, 16, out) == 16) {
    run(uint4{});
  } else {
    run(uint16_t{});  // the size of every element is a multiple of this
  }
}

void hash_ngram_table_gradient(const HashGradArgs& args, Stream stream) {
  BLT_DISPATCH_TABLE(args.table_dtype, args.grad_dtype, T, U, {
    constexpr int N = kWide<T, U>;
    const bool wide =
        access_width(args.width, sizeof(T), N, args.out) == N && access_width(args.width, sizeof(U), N, args.grad) == N;
    (wide ? sum<T, U, N> : sum<T, U, 1>)(args, stream);
  })
  if (args.sorted.entries > kRunTile) {
    BLT_DISPATCH_FLOAT(args.table_dtype, T, {
      constexpr int N = 16 / sizeof(Acc<T>);
      const bool wide = access_width(args.width, sizeof(T), N, args.out) == N &&
                        access_width(args.width, sizeof(Acc<T>), N, args.parts) == N;
      (wide ? join<T, N> : join<T, 1>)(args, stream);
    })
  }
}

}  // namespace blt::cuda
