"""Four ways to cut a sentence into patches, and how to choose the entropy threshold.

You learn: `segment_fixed`, `segment_spaces`, `segment`, `segment_logits`, `entropy` and `calibrate_threshold`. A real
entropy model is a small transformer (see train_blt.py). Here, counts of three bytes in a row, from Python's own
library, stand in for it, so that the program needs no training and its boundaries still come from real text.
"""

import argparse
import ast
import pathlib
import tarfile
from pathlib import Path

import torch

from blt_kernels import (
    PatchLayout,
    calibrate_threshold,
    entropy,
    segment,
    segment_fixed,
    segment_logits,
    segment_spaces,
)

SENTENCE = b"def next_patch(self, entropy): return self.threshold < entropy"


def encode(text: bytes) -> torch.Tensor:
    """[1, N]: BOS (1), each byte plus 4, EOS (2): the vocabulary of published BLT, 260 tokens."""
    return torch.tensor([[1, *(byte + 4 for byte in text), 2]])


def show(title: str, layout: PatchLayout) -> None:
    """The sentence with a bar between two patches. BOS and EOS are drawn as < and >."""
    text = "<" + SENTENCE.decode() + ">"
    lengths = layout.lengths()[0, : int(layout.num_patches)].tolist()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    patches = [text[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    print(f"{title}: {len(patches)} patches, {layout.num_bytes / len(patches):.1f} bytes each\n  {'|'.join(patches)}\n")


# How often byte c follows a, b: counts[a, b, c]. Where that is rare, the model falls back on how often c follows b.
corpus = encode(b"".join(Path(module.__file__).read_bytes() for module in (argparse, ast, pathlib, tarfile)))
a, b, c = corpus[0, :-2], corpus[0, 1:-1], corpus[0, 2:]
counts = torch.zeros(260, 260, 260).index_put_((a, b, c), torch.ones(()), accumulate=True)
pairs = counts.sum(0) + 0.01
pairs /= pairs.sum(-1, keepdim=True)


def logits(tokens: torch.Tensor) -> torch.Tensor:
    """[1, N, 260]: at each byte the log-probabilities of the next one, given this byte and the one before."""
    before = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
    return (counts[before, tokens] + 2 * pairs[tokens]).log()


tokens = encode(SENTENCE)
show("segment_fixed, 6 bytes", segment_fixed(tokens, 6))
show("segment_spaces", segment_spaces(tokens))

# A patch starts where the next byte is hard to guess. Entropies and patches come from the logits in one pass.
entropies, layout = segment_logits(logits(tokens), 2.0)
show("segment_logits, threshold 2.0 nats", layout)
hardest = int(entropies[0, 1:-1].argmax())
print(f"hardest to guess: what follows {SENTENCE[: hardest + 1].decode()!r}, {entropies[0, hardest + 1]:.2f} nats\n")

# Nobody knows a good threshold in advance: ask for the mean patch size instead, on a sample of the corpus.
sample = entropy(logits(corpus[:, :100_000]))  # [1, N] nats
for rule in ("threshold", "monotonic"):  # "monotonic" looks at the rise of the entropy, not at its height
    threshold = calibrate_threshold(sample, patch_size=4.5, rule=rule)
    reached = segment(sample, threshold, rule=rule)
    print(f"rule {rule!r}: {threshold:.3f} nats give {sample.numel() / int(reached.num_patches):.2f} bytes a patch")
    show(f"segment, rule {rule!r}, longest patch 8", segment(entropies, threshold, rule=rule, max_patch_length=8))
