"""The definition of generation: the whole model is run again for every byte, one row at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data import encode
from ..model import BLT
from ..tokens import BOE_ID, BOS_ID, BPE_ID, BYTE_OFFSET, EOS_ID, VOCAB_SIZE
from ..training.patcher import Patcher

WITHOUT_BYTE = (BOE_ID, BOS_ID, BPE_ID)  # a document goes on with a byte or ends with EOS, and with nothing else


def mask_tokens(logits: torch.Tensor) -> torch.Tensor:
    """`logits` [..., V] with -inf at the tokens that stand for no byte and do not end a document.

    A vocabulary may be larger than bytes need, and what comes after the last byte stands for none.
    """
    masked = logits.clone()
    masked[..., list(WITHOUT_BYTE)] = -torch.inf
    masked[..., VOCAB_SIZE:] = -torch.inf
    return masked


@torch.no_grad()
def next_logits(model: BLT, patcher: Patcher, tokens: Sequence[int]) -> torch.Tensor:
    """float32 [V]: the prediction of the token that follows `tokens`, which begin with BOS."""
    row = torch.tensor([list(tokens)], device=model.lm_head.weight.device)
    return model(row, patcher.layout(row).trim())[0, -1]


def generate_uncached(model: BLT, patcher: Patcher, prompts: Sequence[bytes], *, max_new_bytes: int) -> list[bytes]:
    """What `generate` gives at temperature 0, by its definition; time grows with the square of the length."""
    results = []
    for prompt in prompts:
        tokens = encode(prompt, eos=False).tolist()
        begin = len(tokens)
        while len(tokens) < begin + max_new_bytes:
            token = int(mask_tokens(next_logits(model, patcher, tokens)).argmax())
            if token == EOS_ID:
                break
            tokens.append(token)
        results.append(bytes(token - BYTE_OFFSET for token in tokens[begin:]))
    return results
