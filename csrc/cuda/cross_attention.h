#pragma once

#include "common/dtype.h"
#include "common/segments.h"
#include "cuda/stream.h"

namespace blt::cuda {

// Attention between bytes and the K slots of patches. In the encoder the slots are the queries and the bytes are the
// keys; in the decoder it is the other way round. The segments are the bytes of each patch (encoder) or the bytes that
// see it (decoder); the decoder's forward has no segments, but ids.
struct CrossAttentionArgs : Segments {
  DType dtype;
  bool encoder;
  int64_t slots;                   // K
  int64_t heads, kv_heads, width;  // H, Hkv, E
  double scale;
  int64_t window;
  const int32_t* cu_patches;  // [sequences + 1] where B = 1; otherwise every row is one sequence, and sequences = 0
  int64_t sequences;
  const int32_t* ids;  // decoder: [B, N], the patch that a byte sees, or -1
  const void *q, *k, *v;
  void* lse;              // accumulators [query rows, H]; -inf for a row that sees nothing
  void* out;              // forward: like q
  void* parts;            // accumulators of attention_parts parts
  int32_t* long_patches;  // [attention_parts]: the long patch of each part, or -1
  // Backward.
  const void* grad;  // the gradient of out
  void* row_terms;   // accumulators [query rows, H, 2]: by how much lse misses the softmax's sum, and delta
  void *grad_q, *grad_k, *grad_v;  // null where not wanted
};

// A patch of more bytes than this is long: where patches are items, it is cut at the multiples of kAttentionTile.
constexpr int64_t kAttentionTile = 128;

// The number of parts: two for each tile, one of a long patch that began before it and one of a long patch that begins
// in it; 0 where no patch can be long.
inline int64_t attention_parts(const CrossAttentionArgs& args) {
  const int64_t tiles = (args.num_bytes + kAttentionTile - 1) / kAttentionTile;
  return tiles > 1 ? args.batch * tiles * 2 : 0;
}

// Whether backward is one walk over the bytes of each patch that holds all rows of the patch's slots in registers.
// Otherwise it is a pass over the queries and a pass over the keys, and needs row_terms.
bool attention_is_fused(const CrossAttentionArgs& args);

void cross_attention(const CrossAttentionArgs& args, Stream stream);
void cross_attention_backward(const CrossAttentionArgs& args, Stream stream);

}  // namespace blt::cuda
