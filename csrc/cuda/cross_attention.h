#pragma once

#include "common/dtype.h"
#include "common/segments.h"
#include "cuda/stream.h"

namespace blt::cuda {

// Attention between bytes and the K slots of patches. In the encoder slots are the queries and bytes the keys, in the
// decoder it is the other way round.
// The segments are patches, of the decoder the bytes that see a patch; the decoder's forward has ids only.
struct CrossAttentionArgs : Segments {
  DType dtype;
  bool encoder;
  int64_t slots;                   // K
  int64_t heads, kv_heads, width;  // H, Hkv, E
  double scale;
  int64_t window;
  const int32_t* cu_patches;  // [sequences + 1] where B = 1; otherwise every row is a sequence and sequences = 0
  int64_t sequences;
  const int32_t* ids;  // decoder: [B, N] the patch that a byte sees, or -1
  const void *q, *k, *v;
  void* lse;         // accumulators [query rows, H]; -inf for a row that sees nothing
  void* out;         // forward; as q
  void* parts;             // accumulators of attention_parts parts
  int32_t* long_patches;   // the patch of each part
  // Backward.
  const void* grad;  // of out
  void* row_terms;   // accumulators [query rows, H, 2]: what lse lacks of the softmax's sum, and delta
  void *grad_q, *grad_k, *grad_v;  // null where not wanted
};

// Patches of more bytes than this are divided, where a patch is one group's work: at multiples of it in a row.
constexpr int64_t kAttentionTile = 128;

// Parts of divided patches, 0 where there can be none: of each tile the one of a patch that began before it, and the
// one of a patch that begins in it.
inline int64_t attention_parts(const CrossAttentionArgs& args) {
  const int64_t tiles = (args.num_bytes + kAttentionTile - 1) / kAttentionTile;
  return tiles > 1 ? args.batch * tiles * 2 : 0;
}

// Whether backward is one walk over the bytes of each patch, with everything of its slots in registers. Otherwise it is
// a pass over the queries and one over the keys, which needs row_terms.
bool attention_is_fused(const CrossAttentionArgs& args);

void cross_attention(const CrossAttentionArgs& args, Stream stream);
void cross_attention_backward(const CrossAttentionArgs& args, Stream stream);

}  // namespace blt::cuda
