"""The entropy model: a small byte language model that says where the next byte is hard to guess."""

from __future__ import annotations

import torch
from torch import nn

from .._checks import (
    INT_DTYPES,
    check_longest,
    check_range,
    check_sequence_values,
    check_sequences,
    check_tensor,
    fail_type,
)
from ..nn import HashNgramEmbedding
from ..ops.linear_entropy import linear_entropy
from .activations import LayerStack
from .config import EntropyModelConfig
from .loss import NextByteLoss, next_byte_loss
from .transformer import Sequences, init_weights, make_layers, plan_attention


class EntropyModel(LayerStack):
    """A causal transformer over bytes whose attention is windowed and stays within sequences.

    Batches are padded on the right, where padding cannot be seen, or packed in one row with `cu_seqlens`. Parameters
    carry the names of the published `patcher`, which has no tables.

    With `ngram_sizes` the rows of hashed n-grams are added to the byte embeddings, from tables that get a sparse
    gradient. Without layers such a model computes each byte by itself, so that its entropies are the same to the last
    bit whatever else is in the batch. A row may then be padded with token 0 on the left, too.
    """

    def __init__(self, config: EntropyModelConfig):
        if not isinstance(config, EntropyModelConfig):
            raise fail_type("EntropyModel", "config", "an EntropyModelConfig", type(config).__name__)
        super().__init__()
        self.config = config
        shape = config.transformer
        self.embed_tokens = nn.Embedding(config.vocab_size, shape.dim)
        self.layers = make_layers(shape)
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.lm_head = nn.Linear(shape.dim, config.vocab_size, bias=False)
        init_weights(self, shape.num_layers)
        self.hash_tok_embedding: HashNgramEmbedding | None = None
        if config.ngram_sizes:
            self.hash_tok_embedding = HashNgramEmbedding(
                config.hash_rows, shape.dim, config.ngram_sizes, sparse_grad=True
            )

    def embed(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Byte plus n-gram embeddings [B, N, dim] of tokens [B, N]. N-grams stay within their sequence."""
        x = self.embed_tokens(tokens)
        return x if self.hash_tok_embedding is None else self.hash_tok_embedding(tokens, x, cu_seqlens=cu_seqlens)

    def hidden(
        self, tokens: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None, longest_sequence: int | None = None
    ) -> torch.Tensor:
        """Normalised final states [B, N, dim] of tokens [B, N].

        Args:
            cu_seqlens: [S+1], B = 1: the sequences of a packed row.
            longest_sequence: no sequence has more tokens; None: N. It bounds the work of attention.

        Raises:
            TypeError, ValueError: tokens outside the vocabulary, cu_seqlens that do not rise from 0 to at most N.
                Values are looked at on the CPU, on CUDA with BLT_KERNELS_DEBUG=1, and not under torch.compile.
        """
        op = "EntropyModel"
        check_tensor(op, "tokens", tokens, ndim=2, dtypes=INT_DTYPES)
        check_range(op, "tokens", tokens, 0, self.config.vocab_size - 1)
        check_sequences(op, tokens.shape[0], tokens.device, "tokens", None, cu_seqlens, tokens.shape[1])
        check_sequence_values(op, tokens.shape[1], None, cu_seqlens)
        if cu_seqlens is not None:
            check_longest(op, "longest_sequence", longest_sequence, cu_seqlens)
        x = self.embed(tokens, cu_seqlens)
        if self.layers:
            sequences = None if cu_seqlens is None else Sequences.packed(cu_seqlens, tokens.shape[1], longest_sequence)
            plan = plan_attention(self.config.transformer, x, sequences)
            for layer in self.layers:
                x = self.run_layer(layer, x, plan)
        return self.norm(x)

    def forward(
        self, tokens: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None, longest_sequence: int | None = None
    ) -> torch.Tensor:
        """Next-byte logits, float32 [B, N, V]."""
        return self.lm_head(self.hidden(tokens, cu_seqlens=cu_seqlens, longest_sequence=longest_sequence)).float()

    def loss(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        longest_sequence: int | None = None,
    ) -> NextByteLoss:
        """Loss of targets [B, N] int, the byte after each byte of `tokens`; -100 does not count."""
        return next_byte_loss(self(tokens, cu_seqlens=cu_seqlens, longest_sequence=longest_sequence), targets)

    @torch.no_grad()
    def entropies(
        self, tokens: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None, longest_sequence: int | None = None
    ) -> torch.Tensor:
        """Next-byte entropies in nats, float32 [B, N]: [b, i] is of the prediction made at byte i, for byte i + 1.

        The logits never reach memory whole, and their arithmetic is fp32 under autocast too.
        """
        hidden = self.hidden(tokens, cu_seqlens=cu_seqlens, longest_sequence=longest_sequence)
        return linear_entropy(hidden, self.lm_head.weight)
