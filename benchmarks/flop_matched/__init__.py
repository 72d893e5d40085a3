"""BLT against token models at equal FLOPs: `python -m benchmarks matched --help`.

What is compared, and how it is kept fair:

- **Models.** The token model is a Llama-style transformer (RoPE, RMSNorm, SwiGLU, SDPA; `model.EntropyModel` without a
  window) over a byte-level BPE vocabulary learned on the same training text. The BLTs have fixed local models and a
  latent model grown until their *inclusive* inference FLOPs per byte, entropy model and projections included, are
  within 2 % of the token model's. The paper's count, which leaves the entropy model out, is reported beside it.
- **Text.** All models read the same documents in the same order for the same seed. Learning rates are chosen and curves
  drawn on the validation sample; final figures are of the test sample, which no choice looks at. Both are the
  beginnings of documents that are not trained on, the same bytes for every model.
- **Context.** Batches and their longest sequences hold the same bytes for every model. Sequences are cut at tokens or
  at patches, so that evaluation restarts at slightly different bytes. Nothing sees beyond its sequence. One loader
  packs both kinds of batches, which are equally full.
- **Budget.** Every model of a size gets the training FLOPs of the token model reading `train_bytes`, a BLT's entropy
  model counted forward in every step. What training the entropy model once cost is in its own result.
- **Optimiser.** AdamW with warm-up and cosine to 0 for all (SparseAdam for n-gram tables, at 8 times the dense rate).
  The learning rate of each model is chosen on the same grid by runs of a fraction of the budget; ablations take their
  base model's.
- **Speed.** Seconds of a curve are of training with the loader, where a BLT's patches are made. FLOP realisation is
  bytes/s x FLOPs/byte of a BLT over the token model's, in the same precision: float32 on the CPU, bfloat16 autocast
  on a GPU, where compiled models are measured as well and the faster counts.
"""
