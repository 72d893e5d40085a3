"""The ops beside PyTorch: `benchmarks/ops/<op>.py` yields the cases of an op, see `cases.py`."""

OPS = (
    "segment_logits",
    "linear_entropy",
    "patch_pool",
    "patch_gather",
    "encoder_cross_attention",
    "decoder_cross_attention",
    "hash_ngram_embedding",
    "rowwise_adagrad_update",
)
