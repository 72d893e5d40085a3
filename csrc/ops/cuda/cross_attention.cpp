// encoder_cross_attention and decoder_cross_attention on CUDA.
#include "cuda/cross_attention.h"

#include <algorithm>
#include <cmath>

#include "cuda/patch_gather.h"
#include "ops/attention_inputs.h"
#include "ops/cuda/device.h"

namespace {

using blt::ScalarType;
using blt::Tensor;
using blt::cuda::CrossAttentionArgs;

void check_layout_tensor(const char* op, const char* name, const Tensor& t, int64_t dims, const Tensor& like) {
  blt::check_dim(op, name, t, dims);
  blt::check_dtype(op, name, t, ScalarType::Int, "int32");
  blt::check_same_device(op, name, t, like);
}

// The checked inputs, contiguous, and the arguments that forward and backward have in common.
class Attention {
 public:
  // `ids` are visible_ids for the decoder, and null for the encoder.
  Attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* ids, const Tensor& offsets,
            const Tensor& cu_patches, std::optional<double> scale, int64_t window)
      : op(op), device(blt::device_index(q)) {
    check_layout_tensor(op, "offsets", offsets, 2, q);
    BLT_CHECK(offsets.size(1) >= 1, op, ": offsets: expected shape [B, C + 1], got ", offsets.size(1), " columns");
    const int64_t batch = offsets.size(0), capacity = offsets.size(1) - 1;
    if (ids != nullptr) {
      check_layout_tensor(op, "visible_ids", *ids, 2, q);
      blt::check_size(op, "visible_ids", *ids, 0, batch);
    }
    blt::check_attention_inputs(op, q, k, v, batch);
    const bool encoder = ids == nullptr;
    const Tensor &slotted = encoder ? q : k, &bytes = encoder ? k : q;
    if (ids != nullptr) {
      blt::check_size(op, "q", q, 1, ids->size(1));
    }
    const int64_t slots = blt::slots_of(op, encoder ? "q" : "k", slotted, capacity);
    const int64_t sequences = blt::check_window(op, cu_patches, batch, window);
    blt::check_same_device(op, "cu_patches", cu_patches, q);

    q_ = blt::contiguous(q), k_ = blt::contiguous(k), v_ = blt::contiguous(v);
    layout_ = blt::contiguous(encoder ? offsets : *ids), cu_patches_ = blt::contiguous(cu_patches);
    args.dtype = blt::dtype_of(op, "q", q);
    args.encoder = encoder;
    args.batch = batch, args.num_bytes = bytes.size(1), args.capacity = capacity, args.slots = slots;
    args.heads = q.size(2), args.kv_heads = k.size(2), args.width = q.size(3);
    args.scale = scale.value_or(1.0 / std::sqrt(double(args.width)));
    args.window = std::min(window, std::max<int64_t>(capacity, 1));
    args.cu_patches = cu_patches_.const_data_ptr<int32_t>();
    args.sequences = batch == 1 ? sequences : 0;
    const int32_t* layout = layout_.const_data_ptr<int32_t>();
    if (encoder) {
      args.begin = layout, args.end = layout + 1, args.stride = capacity + 1;
    } else {
      args.ids = layout;
    }
    args.q = q_.const_data_ptr(), args.k = k_.const_data_ptr(), args.v = v_.const_data_ptr();
  }

  std::tuple<Tensor, Tensor> forward() {
    Tensor out = like(q_), lse = numbers({q_.size(0), q_.size(1), q_.size(2)});
    args.out = out.mutable_data_ptr(), args.lse = lse.mutable_data_ptr();
    const Scratch scratch = allocate_parts(args.encoder && args.window == 1, args.heads, args.width + 2);
    if (out.numel() > 0) {
      blt::cuda::cross_attention(args, device.stream());
    }
    return {out, lse};
  }

  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& lse, bool need_q, bool need_k,
                                              bool need_v) {
    blt::check_attention_grad(op, grad, lse, q_);
    const Tensor grad_dense = blt::contiguous(grad), lse_dense = blt::contiguous(lse);
    args.grad = grad_dense.const_data_ptr();
    args.lse = const_cast<void*>(lse_dense.const_data_ptr());
    const auto gradient = [&](const Tensor& t, bool needed, void*& data) {
      Tensor out = needed ? like(t) : blt::empty_on(t, {0}, t.scalar_type());
      data = needed ? out.mutable_data_ptr() : nullptr;
      return out;
    };
    Tensor grad_q = gradient(q_, need_q, args.grad_q);
    Tensor grad_k = gradient(k_, need_k, args.grad_k);
    Tensor grad_v = gradient(v_, need_v, args.grad_v);
    if (grad_q.numel() + grad_k.numel() + grad_v.numel() == 0) {
      return {grad_q, grad_k, grad_v};
    }
    const bool fused = attention_is_fused(args);
    const Tensor row_terms = numbers({fused ? 0 : q_.size(0) * q_.size(1) * args.heads, 2});
    // The slots of a patch are queries, whose parts hold a gradient and two numbers, or keys, whose parts hold two
    // gradients.
    const Scratch scratch = args.encoder ? allocate_parts(fused, args.heads, args.width + 2)
                                         : allocate_parts(fused, args.kv_heads, 2 * args.width);
    args.row_terms = row_terms.mutable_data_ptr();
    const Tensor segments = blt::empty_on(q_, {args.encoder ? 0 : 2, args.batch * args.capacity}, ScalarType::Int);
    if (!args.encoder) {
      int32_t* const begin = segments.mutable_data_ptr<int32_t>();
      int32_t* const end = begin + args.batch * args.capacity;
      args.begin = begin, args.end = end, args.stride = args.capacity;
      if (args.capacity > 0) {
        blt::cuda::segments_of_ids({args.batch * args.num_bytes, args.num_bytes, args.capacity, args.ids, begin, end},
                                   args.batch, device.stream());
      }
    }
    blt::cuda::cross_attention_backward(args, device.stream());
    return {grad_q, grad_k, grad_v};
  }

 private:
  Tensor like(const Tensor& t) const {
    return blt::empty_on(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
  }
  Tensor numbers(std::vector<int64_t> sizes) const {
    return blt::empty_on(q_, std::move(sizes), blt::arithmetic_type(q_));
  }

  // Memory for the parts of long patches, if there are any: for each slot and head `row` numbers.
  struct Scratch {
    Tensor parts, long_patches;
  };
  Scratch allocate_parts(bool any, int64_t heads, int64_t row) {
    const int64_t count = any ? attention_parts(args) : 0;
    Scratch scratch{numbers({count * args.slots, heads, row}), blt::empty_on(q_, {count}, ScalarType::Int)};
    args.parts = scratch.parts.mutable_data_ptr();
    args.long_patches = scratch.long_patches.mutable_data_ptr<int32_t>();
    return scratch;
  }

  const char* op;
  blt::cuda::OnDevice device;
  CrossAttentionArgs args{};
  Tensor q_, k_, v_, layout_, cu_patches_;
};

std::tuple<Tensor, Tensor> encoder(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
                                   const Tensor& cu_patches, std::optional<double> scale, int64_t window) {
  return Attention("encoder_cross_attention", q, k, v, nullptr, offsets, cu_patches, scale, window).forward();
}

std::tuple<Tensor, Tensor, Tensor> encoder_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& lse, const Tensor& offsets,
                                                    const Tensor& cu_patches, std::optional<double> scale,
                                                    int64_t window, bool need_q, bool need_k, bool need_v) {
  return Attention("encoder_cross_attention", q, k, v, nullptr, offsets, cu_patches, scale, window)
      .backward(grad, lse, need_q, need_k, need_v);
}

std::tuple<Tensor, Tensor> decoder(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& visible_ids,
                                   const Tensor& offsets, const Tensor& cu_patches, std::optional<double> scale,
                                   int64_t window) {
  return Attention("decoder_cross_attention", q, k, v, &visible_ids, offsets, cu_patches, scale, window).forward();
}

std::tuple<Tensor, Tensor, Tensor> decoder_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& lse, const Tensor& visible_ids,
                                                    const Tensor& offsets, const Tensor& cu_patches,
                                                    std::optional<double> scale, int64_t window, bool need_q,
                                                    bool need_k, bool need_v) {
  return Attention("decoder_cross_attention", q, k, v, &visible_ids, offsets, cu_patches, scale, window)
      .backward(grad, lse, need_q, need_k, need_v);
}

}  // namespace

BLT_CUDA_OPS(m) {
  m.impl("encoder_cross_attention", TORCH_BOX(&encoder));
  m.impl("encoder_cross_attention_backward", TORCH_BOX(&encoder_backward));
  m.impl("decoder_cross_attention", TORCH_BOX(&decoder));
  m.impl("decoder_cross_attention_backward", TORCH_BOX(&decoder_backward));
}
