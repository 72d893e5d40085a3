// Attention between ragged groups of rows, for encoder_cross_attention and decoder_cross_attention.
#pragma once

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

// An item of work: query rows that see the same keys, together with key rows of their own. In the encoder these are the
// slots of a patch and its bytes; in the decoder they are the bytes that see a patch and the slots of the patch. Every
// query row and every key row of the batch belongs to exactly one item. An item without keys has queries that see
// nothing; an item without queries has keys that nothing sees.
struct AttentionItem {
  int64_t q_begin, q_end;
  int64_t kv_begin, kv_end;
  int64_t first;  // its queries see the keys of items first .. itself; they see nothing if `first` is beyond itself
  int64_t last;   // its keys are seen by those of the items itself .. last - 1 whose `first` reaches it
  int64_t cost;   // how many rows all items before this one touch
};

struct CrossAttentionArgs {
  DType dtype;
  int64_t heads, kv_heads, width;  // H, Hkv, E
  double scale;
  int64_t num_items;
  const AttentionItem* items;  // [num_items + 1]: the last one holds the total cost
  const void* q;               // [query rows, H, E]
  const void* k;               // [key rows, Hkv, E]
  const void* v;
  // Forward.
  void* out;  // like q
  void* lse;  // [query rows, H] natural log of the sum of the exponentials; -inf for a row that sees nothing
  // Backward.
  const void* grad;  // the gradient of out
  void* row_terms;   // [query rows, H, 3] with a window: the terms of each softmax, which one pass tells the next
  void* grad_q;      // null where it is not wanted
  void* grad_k;
  void* grad_v;
};

// A task holds the scores of a block of rows at a time. This is how many rows of one side a block has, where each meets
// `others` rows of the other side. (The function is static, so that no copy from an AVX-512 object file serves the
// other objects.)
static inline int64_t cross_attention_block(int64_t kv_heads, int64_t others) {
  const int64_t block = (1 << 15) / (kv_heads * (others < 1 ? 1 : others));
  return block < 4 ? 4 : block;
}

// How many numbers of work space the scores of `queries` query rows (times H / Hkv) and `keys` key rows need.
static inline int64_t cross_attention_numbers(int64_t kv_heads, int64_t queries, int64_t keys) {
  const int64_t lanes = 16;  // of the widest register
  return (2 * keys + 3) * (kv_heads * queries + lanes);
}

// Work space of one thread: room for the indices of the query rows (times H / Hkv) and key rows that meet in one item,
// and for cross_attention_numbers floats (doubles in fp64).
struct CrossAttentionScratch {
  int64_t* q_index;
  int64_t* kv_index;
  void* numbers;
};

// Lay the pairs (item, key head) side by side, each as wide as its item's cost. A kernel call does the pairs that start
// in begin .. end of the total width, which is the total cost times kv_heads. So equal ranges are equal work, however
// long a single item is.
BLT_CPU_KERNEL(cross_attention, const CrossAttentionArgs& args, int64_t begin, int64_t end,
               const CrossAttentionScratch& scratch)
// All gradients, where no item sees the keys of another one. A task holds the scores of a whole item.
BLT_CPU_KERNEL(cross_attention_backward, const CrossAttentionArgs& args, int64_t begin, int64_t end,
               const CrossAttentionScratch& scratch)
// With a window: the first kernel computes grad_q and row_terms, the second one grad_k and grad_v from row_terms.
BLT_CPU_KERNEL(cross_attention_backward_queries, const CrossAttentionArgs& args, int64_t begin, int64_t end,
               const CrossAttentionScratch& scratch)
BLT_CPU_KERNEL(cross_attention_backward_keys, const CrossAttentionArgs& args, int64_t begin, int64_t end,
               const CrossAttentionScratch& scratch)

}  // namespace blt::cpu
