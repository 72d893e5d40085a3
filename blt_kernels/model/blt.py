"""The Byte Latent Transformer: bytes go in patches through the latent transformer, and come back as bytes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from .._checks import (
    INT_DTYPES,
    can_look_at,
    check_longest,
    check_range,
    check_sequence_values,
    check_sequences,
    check_shape,
    check_tensor,
    fail_type,
    fail_value,
)
from ..layout import PatchLayout, check_layout
from ..nn import HashNgramEmbedding
from .activations import LayerStack
from .config import BLTConfig
from .decoder import LocalDecoder
from .encoder import LocalEncoder
from .loss import NextByteLoss, next_byte_loss
from .transformer import Sequences, init_weights, make_layers, plan_attention

_MULTIPLE = 128  # Capacities are rounded up to a multiple of this many slots.


class LatentTransformer(LayerStack):
    """Causal layers over patches. They hold nearly all the parameters that are not in hash tables."""

    def __init__(self, config: BLTConfig):
        super().__init__()
        self.config = config
        shape = config.latent
        width = config.slots_per_patch * config.encoder.dim
        if width != shape.dim:
            self.token_embedding_projection: nn.Module = nn.Linear(width, shape.dim, bias=False)
        else:
            self.token_embedding_projection = nn.Identity()
        self.layers = make_layers(shape)
        init_weights(self, shape.num_layers)

    def forward(self, patches: torch.Tensor, sequences: Sequences | None) -> torch.Tensor:
        """[B, C, K*d] -> [B, C, D]; `sequences` are those of the slots of a packed row."""
        x = self.token_embedding_projection(patches).type_as(patches)
        plan = plan_attention(self.config.latent, x, sequences)
        for layer in self.layers:
            x = self.run_layer(layer, x, plan)
        return x


class BLT(nn.Module):
    """A Byte Latent Transformer over bytes that are already cut into patches.

    Parameters carry the names that the published weights have in transformers, less the prefix `model.`, and with them
    it computes the published logits. Sequences of a packed row and rows of a batch never see each other. Under
    autocast the residual streams stay in the dtype of the parameters.
    """

    def __init__(self, config: BLTConfig):
        if not isinstance(config, BLTConfig):
            raise fail_type("BLT", "config", "a BLTConfig", type(config).__name__)
        super().__init__()
        self.config = config
        dim = config.encoder.dim
        self.encoder_hash_tok_embedding: HashNgramEmbedding | None = None
        self.hash_projection: nn.Linear | None = None
        if config.ngram_sizes:
            self.encoder_hash_tok_embedding = HashNgramEmbedding(
                config.hash_rows,
                config.hash_dim or dim,
                config.ngram_sizes,
                num_functions=config.hash_functions,
                sparse_grad=config.sparse_grad,
            )
            if config.hash_dim not in (None, dim):
                self.hash_projection = nn.Linear(config.hash_dim, dim, bias=False)
        self.local_encoder = LocalEncoder(config)
        self.global_transformer = LatentTransformer(config)
        self.local_decoder = LocalDecoder(config)
        self.lm_head = nn.Linear(dim, config.vocab_size, bias=False)
        for module in (self.hash_projection, self.lm_head):
            if module is not None:
                init_weights(module, 1)

    @staticmethod
    def from_pretrained(
        path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> tuple[BLT, Any]:
        """A BLT and its patcher (a `blt_kernels.training.patcher.Patcher`, or None) from a published checkpoint or a
        run: see `blt_kernels.checkpoints.from_pretrained`."""
        from ..checkpoints import from_pretrained  # which is built on this module

        return from_pretrained(path, dtype=dtype, device=device)

    def embed(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Byte plus n-gram embeddings [B, N, d] of tokens [B, N]."""
        x = self.local_encoder.embed_tokens(tokens)
        tables = self.encoder_hash_tok_embedding
        if tables is None:
            return x
        if self.hash_projection is None:
            return tables(tokens, x, cu_seqlens=cu_seqlens)
        return x + self.hash_projection(tables(tokens, cu_seqlens=cu_seqlens))

    def forward(
        self,
        tokens: torch.Tensor,
        layout: PatchLayout,
        *,
        cu_seqlens: torch.Tensor | None = None,
        longest_sequence: int | None = None,
        longest_patches: int | None = None,
    ) -> torch.Tensor:
        """Next-byte logits: [b, i] predicts byte i + 1 from bytes 0 .. i and the patches finished by then.

        Args:
            tokens: [B, N] int32 or int64. Pad with token 0; padding is what lies outside the patches of `layout`.
            layout: the patches of `tokens`, from `segment*` or `PatchLayout.from_*`. The latent transformer computes
                every slot, so call `layout.trim()`, or segment with a capacity of 1.25 * N / patch_size rounded up to
                128.
            cu_seqlens: [S+1], B = 1: the sequences that `layout` was made with. N-grams, self-attention and the latent
                transformer stay within them.
            longest_sequence, longest_patches: no sequence has more tokens, none has more patches. They bound the work
                of attention where it needs a mask, and the kernels for CUDA are launched by them. None: N tokens, and
                as many patches as tokens.

        Returns:
            float32 [B, N, V]. Rows of padding hold finite values without meaning.

        Raises:
            TypeError, ValueError: arguments that do not fit each other, tokens outside the vocabulary, other sequences
                than the layout's, a layout with a slot for every byte that uses far fewer of them. Values are looked
                at on the CPU, on CUDA with BLT_KERNELS_DEBUG=1, and not under torch.compile. A layout with a slot for
                every byte, and more than 128 of them, is looked at on CUDA too, which waits for the device once.
        """
        self._check(tokens, layout, cu_seqlens)
        longest_patches = longest_sequence if longest_patches is None else longest_patches
        if cu_seqlens is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            sequences = Sequences((positions >= layout.offsets[:, :1]).long())  # left padding is sequence 0
            slot_sequences = None
        else:
            check_longest("BLT", "longest_sequence", longest_sequence, cu_seqlens)
            check_longest("BLT", "longest_patches", longest_patches, layout.cu_patches)
            sequences = Sequences.packed(cu_seqlens, tokens.shape[1], longest_sequence)
            slot_sequences = Sequences.packed(layout.cu_patches, layout.capacity, longest_patches)
        x, patches = self.local_encoder(self.embed(tokens, cu_seqlens), layout, sequences)
        patches = self.global_transformer(patches, slot_sequences)
        x = self.local_decoder(x, patches, layout, sequences)
        return self.lm_head(x).float()

    def loss(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        layout: PatchLayout,
        *,
        cu_seqlens: torch.Tensor | None = None,
        longest_sequence: int | None = None,
        longest_patches: int | None = None,
    ) -> NextByteLoss:
        """Loss of targets [B, N] int, the byte after each byte of `tokens`; -100 does not count."""
        logits = self(
            tokens,
            layout,
            cu_seqlens=cu_seqlens,
            longest_sequence=longest_sequence,
            longest_patches=longest_patches,
        )
        return next_byte_loss(logits, targets)

    def _check(self, tokens: torch.Tensor, layout: PatchLayout, cu_seqlens: torch.Tensor | None) -> None:
        op = "BLT"
        check_tensor(op, "tokens", tokens, ndim=2, dtypes=INT_DTYPES)
        check_range(op, "tokens", tokens, 0, self.config.vocab_size - 1)
        check_layout(op, layout, tokens.device, "tokens")
        check_shape(op, "layout.patch_ids", layout.patch_ids, tokens.shape)
        given = check_sequences(op, tokens.shape[0], tokens.device, "tokens", None, cu_seqlens, tokens.shape[1])
        made_with = layout.cu_patches.shape[0] - 1
        if given != made_with:
            got = "none" if cu_seqlens is None else f"{given}"
            raise fail_value(op, "cu_seqlens", f"the {made_with} sequences that the layout was made with", got)
        if cu_seqlens is not None:
            check_sequence_values(op, tokens.shape[1], None, cu_seqlens)
            _check_same_sequences(op, layout, cu_seqlens)
        _check_capacity(op, layout)


def _check_same_sequences(op: str, layout: PatchLayout, cu_seqlens: torch.Tensor) -> None:
    """`cu_seqlens` are those that `layout` was made with, as far as it knows them, where checks may look at them."""
    if not (can_look_at(cu_seqlens) and can_look_at(layout.offsets) and can_look_at(layout.cu_patches)):
        return
    offsets = layout.offsets[0]
    known, end = offsets[layout.cu_patches.long()], offsets[-1]
    # The layout does not know sequences that begin after its last patch, nor how long the last one goes on.
    if not bool(((cu_seqlens == known) | ((known == end) & (cu_seqlens >= end))).all()):
        expected = f"the sequences that the layout was made with, which are {known.tolist()}"
        raise fail_value(op, "cu_seqlens", expected, cu_seqlens.tolist())


def _check_capacity(op: str, layout: PatchLayout) -> None:
    """A layout that has a slot for every byte, because nobody chose a capacity, needs most of them."""
    capacity, num_patches = layout.capacity, layout.num_patches
    suspicious = capacity >= layout.num_bytes and capacity > _MULTIPLE
    if not suspicious or num_patches.shape[0] == 0 or not can_look_at(num_patches, may_wait=True):
        return
    num_bytes = layout.offsets[:, -1] - layout.offsets[:, 0]
    used, most_bytes = torch.stack((num_patches, num_bytes)).amax(1).tolist()
    needed = -(-5 * used // (4 * _MULTIPLE)) * _MULTIPLE
    # Where patches are single bytes, a loader gives each its slot, and slots are free only because the row is not full.
    if capacity > needed and 5 * used < 4 * most_bytes:
        raise fail_value(
            op,
            "layout.capacity",
            f"at most {needed} slots for rows of at most {used} patches, because the latent transformer computes every "
            f"slot: use layout.trim(), or segment with capacity=1.25 * N / patch_size rounded up to {_MULTIPLE}",
            capacity,
        )
