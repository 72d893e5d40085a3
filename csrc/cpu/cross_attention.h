// Attention between ragged groups of rows: the work of encoder_cross_attention and of decoder_cross_attention.
#pragma once

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace blt::cpu {

// Query rows that see the same keys, together with key rows of their own. In the encoder a patch's slots and its bytes;
// in the decoder the bytes that see a patch and the patch's slots. Every query row and every key row of the whole
// batch is in exactly one group. Groups without keys or without queries are rows that see nothing or are not seen.
struct AttentionGroup {
  int64_t q_begin, q_end;
  int64_t kv_begin, kv_end;
  int64_t first;  // its queries see the (consecutive) keys of groups first .. itself; beyond itself: they see nothing
  int64_t last;   // its keys are seen by those groups of itself .. last - 1 whose `first` reaches it
  int64_t cost;   // rows touched by all groups before this one
};

struct CrossAttentionArgs {
  DType dtype;
  int64_t heads, kv_heads, width;  // H, Hkv, E
  double scale;
  int64_t num_groups;
  const AttentionGroup* groups;  // [num_groups + 1]: the last one holds the total cost
  const void* q;                 // [query rows, H, E]
  const void* k;                 // [key rows, Hkv, E]
  const void* v;
  // Forward.
  void* out;  // as q
  void* lse;  // [query rows, H] natural log of the sum of the exponentials; -inf for a row that sees nothing
  // Backward.
  const void* grad;  // of out
  void* row_terms;   // [query rows, H, 3] with a window: what a query's softmax is made of, between the passes
  void* grad_q;      // null where not wanted
  void* grad_k;
  void* grad_v;
};

// Scores are held for a block of rows at a time: this many of one side, when each meets `others` of the other side.
// (static: a copy of an AVX-512 object file must not serve the others.)
static inline int64_t cross_attention_block(int64_t kv_heads, int64_t others) {
  const int64_t block = (1 << 15) / (kv_heads * (others < 1 ? 1 : others));
  return block < 4 ? 4 : block;
}

// Numbers of work space for the scores of so many query rows (times H / Hkv) and key rows.
static inline int64_t cross_attention_numbers(int64_t kv_heads, int64_t queries, int64_t keys) {
  const int64_t lanes = 16;  // of the widest register
  return (2 * keys + 3) * (kv_heads * queries + lanes);
}

// Work space of one thread: room for the query rows (times H / Hkv) and for the key rows that meet in one group, and
// cross_attention_numbers floats (doubles in fp64).
struct CrossAttentionScratch {
  int64_t* q_index;
  int64_t* kv_index;
  void* numbers;
};

// Each kernel does the (group, key head) pairs that start in begin .. end of the total cost times kv_heads, where a pair
// takes its group's cost: equal ranges are equal work, however long a single group is.
BLT_CPU_KERNEL(cross_attention, const CrossAttentionArgs& args, int64_t begin, int64_t end,
               const CrossAttentionScratch& scratch)
// All gradients where no group sees another's keys. The scores of a whole group are held at a time.
BLT_CPU_KERNEL(cross_attention_backward, const CrossAttentionArgs& args, int64_t begin, int64_t end,
               const CrossAttentionScratch& scratch)
// With a window: grad_q and row_terms, then grad_k and grad_v from row_terms.
BLT_CPU_KERNEL(cross_attention_backward_queries, const CrossAttentionArgs& args, int64_t begin, int64_t end,
               const CrossAttentionScratch& scratch)
BLT_CPU_KERNEL(cross_attention_backward_keys, const CrossAttentionArgs& args, int64_t begin, int64_t end,
               const CrossAttentionScratch& scratch)

}  // namespace blt::cpu
