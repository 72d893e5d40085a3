"""Names in Meta's code, facebookresearch/blt (November 2025): of tensors, as its conversion to transformers maps them,
and of fields, with what absent ones mean."""

from __future__ import annotations

from typing import Any

# Each part of our names of tensors that is another word there.
WORDS = {
    "self_attn": "attention",
    "mlp": "feed_forward",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "q_norm": "cross_attn_norm_q",
    "k_norm": "cross_attn_norm_kv",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "lm_head": "output",
}
# Tables of angles, which some files hold and which are computed.
IGNORED_SUFFIX = "rope.freqs_cis"

_STACK = {
    "n_kv_heads": None,
    "head_dim": None,
    "multiple_of": 256,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "weight_tying": False,
}
MODEL_DEFAULTS: dict[str, Any] = _STACK | {
    "ffn_dim_multiplier": 1.0,
    "dim_token": None,
    "dim_global": 512,
    "dim_local_encoder": 512,
    "dim_local_decoder": 512,
    "n_layers_global": 8,
    "n_layers_local_encoder": 8,
    "n_layers_local_decoder": 8,
    "n_heads_global": 8,
    "n_heads_local_encoder": 8,
    "n_heads_local_decoder": 8,
    "n_kv_heads_global": None,
    "cross_attn_encoder": False,
    "cross_attn_decoder": False,
    "cross_attn_window_encoder": None,
    "cross_attn_window_decoder": None,
    "cross_attn_k": None,
    "cross_attn_nheads": None,
    "cross_attn_all_layers_encoder": False,
    "cross_attn_all_layers_decoder": False,
    "cross_attn_init_by_pooling": False,
    "downsampling_by_pooling": None,
    "use_local_encoder_transformer": False,
    "encoder_hash_byte_group_size": None,
    "encoder_hash_byte_group_vocab": 30000,
    "encoder_hash_byte_group_nb_functions": 3,
    "encoder_enable_byte_ngrams": False,
    "tie_local_encoder_decoder_logits": False,
    "use_rope": True,
    "non_linearity": "swiglu",
    "norm_type": "rmsnorm",
    "pre_norm": True,
    "pm_size": 0,
    "local_attention_window_len": None,
    "patching_mode": None,
    "patching_threshold": None,
    "patching_threshold_add": None,
    "monotonicity": False,
    "max_patch_length": None,
}
# An absent window is that of 512 with which Meta's loader makes every entropy model.
ENTROPY_DEFAULTS: dict[str, Any] = _STACK | {"ffn_dim_multiplier": None, "sliding_window": 512}
# Where the arguments of a model say what those of a patcher say.
PATCHER_FIELDS = {
    "patching_mode": "patching_mode",
    "threshold": "patching_threshold",
    "threshold_add": "patching_threshold_add",
    "monotonicity": "monotonicity",
    "max_patch_length": "max_patch_length",
}
PATCHER_DEFAULTS: dict[str, Any] = {
    "patching_mode": "entropy",
    "threshold": 1.335442066192627,
    "threshold_add": None,
    "monotonicity": False,
    "max_patch_length": None,
}
