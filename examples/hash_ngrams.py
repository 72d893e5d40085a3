"""Hashed n-gram embeddings: one pass instead of six lookups, and a gradient as small as the text.

You learn: `hash_ngram_ids`, `hash_ngram_embedding`, its row-sparse gradient with `RowwiseAdagrad` and its op
`rowwise_adagrad_update`, and `hash_ngram_embedding_row_grad`, which has a fixed size, for CUDA graphs.
"""

import argparse
from pathlib import Path

import torch

from blt_kernels import (
    hash_ngram_embedding,
    hash_ngram_embedding_row_grad,
    hash_ngram_ids,
    rowwise_adagrad_update,
)
from blt_kernels.optim import RowwiseAdagrad

SIZES, ROWS, D = (3, 4, 5, 6, 7, 8), 50021, 32
torch.manual_seed(0)
text = Path(argparse.__file__).read_bytes()[:8192]
tokens = torch.tensor([[byte + 4 for byte in text]])  # [1, N]
table = torch.nn.Parameter(torch.randn(len(SIZES) * ROWS, D))  # six tables, one after the other
base = torch.randn(1, tokens.shape[1], D)  # the byte embeddings, to which the n-grams are added

# The ids, for a look. The embedding computes them again on the fly and never stores them.
ids = hash_ngram_ids(tokens, SIZES, ROWS)  # int64 [1, N, 6]
for i, size in enumerate(SIZES):
    grams = {text[max(0, j - size + 1) : j + 1] for j in range(len(text))}
    print(f"{size}-grams: {len(grams)} different ones in {ids[..., i].unique().numel()} of {ROWS} rows")

ours = hash_ngram_embedding(tokens, table, base=base, ngram_sizes=SIZES, num_rows=ROWS, sparse_grad=True)
plain = base + sum(torch.nn.functional.embedding(ids[..., i] + i * ROWS, table) for i in range(len(SIZES)))
print(f"largest difference from six embedding lookups: {(ours - plain).abs().max():.1e}")

# Training touches only the rows that were read.
ours.square().mean().backward()
print(f"gradient: {table.grad._nnz()} rows of {len(table)}, "
      f"{table.grad._values().nbytes / 1e6:.1f} MB instead of {table.nbytes / 1e6:.1f} MB")  # fmt: skip
before = table.detach().clone()
optimizer = RowwiseAdagrad([table], lr=0.1)
optimizer.step()
print(f"RowwiseAdagrad changed {int((table != before).any(dim=1).sum())} rows, "
      f"and keeps {optimizer.state[table]['sum'].nbytes / 1e6:.1f} MB of state")  # fmt: skip

twin, state = before.clone(), torch.zeros(len(table))
rowwise_adagrad_update(twin, state, table.grad.indices()[0], table.grad.values(), lr=0.1)
print(f"the op by itself takes the same step: {torch.equal(twin, table.detach())}")

# The sparse gradient has as many rows as the text happens to read, so that on CUDA its backward waits for the device.
# This form is padded to a fixed size instead, and what it adds is right without a look at `count`.
ngrams = {"ngram_sizes": SIZES, "num_rows": ROWS}
weight, losses = table.detach(), []
for _ in range(4):
    x = hash_ngram_embedding(tokens, weight, base=base, **ngrams).requires_grad_()
    loss = x.square().mean()
    (grad,) = torch.autograd.grad(loss, x)
    rows, values, count = hash_ngram_embedding_row_grad(grad, tokens, **ngrams)
    weight.index_add_(0, rows, values, alpha=-40.0)  # a step of gradient descent
    losses.append(f"{loss.item():.2f}")
print(f"row_grad: values {list(values.shape)}, of which {int(count)} rows are in use")
print("loss, step by step:", " -> ".join(losses))
