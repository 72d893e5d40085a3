"""From text to a trained Byte Latent Transformer in one short loop of your own.

You learn: how documents become packed rows (`blt_kernels.data`), how a small entropy model cuts them into patches, and
how to train a BLT on those rows with AdamW for its dense parameters and row-wise Adagrad for its hash tables. The
command `blt-kernels train` does the same with checkpoints, a schedule and held-out text. A minute of training would do
better: here a few dozen steps show that the loss falls.
"""

import os
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from blt_kernels import PatchLayout, calibrate_threshold, segment
from blt_kernels.data import Batch, Corpus, DocumentStream, PackedBatches
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig
from blt_kernels.optim import RowwiseAdagrad, clip_grad_norm

torch.manual_seed(0)
library = Path(os.__file__).parent / "email"  # of Python's own library: real text that every machine has
corpus = Corpus(library, include="*.py", max_document_bytes=8192)
print(f"{len(corpus.files)} files, {sum(file.size for file in corpus.files) / 1e6:.2f} MB")


def tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [1, N], targets [1, N] and cu_seqlens [S+1] of a row that holds sequences of several documents."""
    return torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets), torch.from_numpy(batch.cu_seqlens)


# 1. A byte model that learns how surprising the next byte is.
entropy_model = EntropyModel(EntropyModelConfig.preset("tiny"))
adam = torch.optim.AdamW(entropy_model.parameters(), lr=5e-3)
rows = PackedBatches(DocumentStream(corpus, seed=0), row_tokens=1024, longest_sequence=256)
losses = []
for _ in range(25):
    tokens, targets, cu_seqlens = tensors(next(rows))
    loss = entropy_model.loss(tokens, targets, cu_seqlens=cu_seqlens)
    loss.mean.backward()
    adam.step()
    adam.zero_grad()
    losses.append(loss.mean.item())
print(f"entropy model: loss {mean(losses[:5]):.2f} nats in its first five steps, {mean(losses[-5:]):.2f} in its last")

# 2. The threshold that gives patches of 4.5 bytes on average.
tokens, _, cu_seqlens = tensors(
    next(PackedBatches(DocumentStream(corpus, seed=2), row_tokens=1 << 14, longest_sequence=1 << 13))
)
entropies = entropy_model.entropies(tokens, cu_seqlens=cu_seqlens)
threshold = calibrate_threshold(entropies, patch_size=4.5, cu_seqlens=cu_seqlens)
print(f"threshold {threshold:.3f} nats")


def cut(tokens: np.ndarray) -> np.ndarray:
    """The patch lengths of one document, for the loader."""
    layout = segment(entropy_model.entropies(torch.from_numpy(tokens)[None]), threshold)
    return layout.lengths()[0, : int(layout.num_patches)].numpy()


# 3. Rows of 576 bytes and 128 patches, in the proportion of the text, so that both are used up together.
rows = PackedBatches(
    DocumentStream(corpus, seed=1), row_tokens=576, longest_sequence=144, segmenter=cut, row_patches=128
)
model = BLT(BLTConfig.preset("tiny"))
tables = list(model.encoder_hash_tok_embedding.parameters())
dense = [parameter for parameter in model.parameters() if parameter not in set(tables)]
optimizers = [torch.optim.AdamW(dense, lr=3e-3), RowwiseAdagrad(tables, lr=3e-2)]
losses, num_bytes = [], 0
for _ in range(25):
    batch = next(rows)
    tokens, targets, cu_seqlens = tensors(batch)
    layout = PatchLayout.from_lengths(
        torch.from_numpy(batch.patch_lengths),
        num_bytes=tokens.shape[1],
        cu_seqlens=cu_seqlens,
        next_is_start=torch.from_numpy(batch.next_is_start),
    )
    loss = model.loss(tokens, targets, layout, cu_seqlens=cu_seqlens)
    loss.mean.backward()
    norm = clip_grad_norm(model.parameters(), 1.0)  # one norm over dense and sparse gradients
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.mean.item())
    num_bytes += batch.num_tokens
print(f"BLT: loss {mean(losses[:5]):.2f} nats in its first five steps, {mean(losses[-5:]):.2f} in its last")
print(
    f"a row uses {num_bytes / 25:.0f} of 576 bytes and {int(layout.num_patches)} of 128 slots; gradient norm {norm:.1f}"
)
