"""Replace the slow lines of an existing byte model, in the style of `transformers`, and get the same numbers.

You learn: which lines of code written with masks, expanded indices and `F.embedding` become which op, and that loss and
gradients stay what they were. Weights are shared by both models, so that a checkpoint of one is a checkpoint of the
other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blt_kernels import (
    PatchLayout,
    decoder_cross_attention,
    encoder_cross_attention,
    hash_ngram_embedding,
    hash_ngram_ids,
    patch_pool,
)

D, H, K, SIZES, ROWS = 64, 4, 2, (3, 4, 5), 4099


class ByteModel(nn.Module):
    """Embeddings with hashed n-grams, pooling, cross-attention to patch slots and back, as published code writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(260, D)
        self.ngrams = nn.Embedding(len(SIZES) * ROWS, D)
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.slots = nn.Linear(D, K * D, bias=False)
        self.head = nn.Linear(D, 260, bias=False)

    def forward(self, tokens: Tensor, patch_lengths: Tensor) -> Tensor:
        layout = PatchLayout.from_lengths(patch_lengths, tokens.shape[1])
        x = self.embed(tokens)
        q = self.slots(self.pool(x, layout)).view(len(x), -1, D)
        slots = self.encode(self.heads(self.q(q)), self.heads(self.k(x)), self.heads(self.v(x)), layout)
        x = x + self.decode(self.heads(self.q(x)), slots, slots, layout).flatten(-2)
        return self.head(x)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (H, -1))

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens)
        ids = hash_ngram_ids(tokens, SIZES, ROWS)
        for i in range(len(SIZES)):
            x = x + self.ngrams(ids[..., i] + i * ROWS)
        return x

    def pool(self, x: Tensor, layout: PatchLayout) -> Tensor:
        index = layout.patch_ids.long()[..., None].expand_as(x)
        return x.new_zeros(len(x), layout.capacity, D).scatter_reduce(1, index, x, "amax", include_self=False)

    def encode(self, q: Tensor, k: Tensor, v: Tensor, layout: PatchLayout) -> Tensor:
        slot_patch = torch.arange(layout.capacity).repeat_interleave(K)
        return self.attend(q, k, v, slot_patch[:, None] == layout.patch_ids[:, None])

    def decode(self, q: Tensor, k: Tensor, v: Tensor, layout: PatchLayout) -> Tensor:
        slot_patch = torch.arange(layout.capacity).repeat_interleave(K)
        return self.attend(q, k, v, layout.visible_ids[..., None] == slot_patch)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None])
        return out.transpose(1, 2)


class FasterByteModel(ByteModel):
    """The same model. Every method that built an index or a mask is now one op."""

    def embed(self, tokens: Tensor) -> Tensor:
        base = self.bytes(tokens)
        return hash_ngram_embedding(tokens, self.ngrams.weight, base=base, ngram_sizes=SIZES, num_rows=ROWS)

    def pool(self, x: Tensor, layout: PatchLayout) -> Tensor:
        return patch_pool(x, layout, "max")

    def encode(self, q: Tensor, k: Tensor, v: Tensor, layout: PatchLayout) -> Tensor:
        return encoder_cross_attention(q, k, v, layout)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, layout: PatchLayout) -> Tensor:
        return decoder_cross_attention(q, k, v, layout)


torch.manual_seed(0)
text = b"The same model, twice: once with masks and scatter, once with ops that know about patches. " * 8
tokens = torch.tensor([[1, *(byte + 4 for byte in text), 2]])
whole, rest = divmod(tokens.shape[1] - 1, 5)
lengths = torch.tensor([[1, *[5] * whole, rest]])  # as published code has them: the first byte, then patches of 5
slow, fast = ByteModel(), FasterByteModel()
fast.load_state_dict(slow.state_dict())
for model in (slow, fast):
    logits = model(tokens, lengths)
    loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:])
    loss.backward()
    print(f"{type(model).__name__:16} loss {loss.item():.6f}")
for name, parameter in slow.named_parameters():
    other = fast.get_parameter(name).grad
    print(f"gradient of {name:13} {(parameter.grad - other).norm() / parameter.grad.norm():.1e} apart, relative")
