"""The Byte Latent Transformer: bytes -> patches -> latent transformer -> bytes."""

from __future__ import annotations

import math

import torch
from torch import nn

from .._checks import INT_DTYPES, check_device, check_shape, check_tensor, fail_value
from ..layout import PatchLayout, check_layout
from ..nn import HashNgramEmbedding
from .config import BLTConfig
from .decoder import LocalDecoder
from .encoder import LocalEncoder
from .loss import NextByteLoss, next_byte_loss
from .transformer import document_ids, init_weights, make_layers, plan_attention

CAPACITY_MULTIPLE = 128


def latent_capacity(num_bytes: int, patch_size: float) -> int:
    """Patch slots for `num_bytes` bytes that are patched inside the training step at a mean of `patch_size` bytes.

    A quarter more than the mean, rounded up to 128, at most `num_bytes`. The latent transformer computes every slot,
    so it spends about 1.25 times the FLOPs of the used patches, more for short rows: pack documents in one row.
    Segmenting one batch ahead and `layout.trim(multiple_of=128)`, or rows cut to a constant number of patches by the
    loader, spend less than 1.1 times.
    """
    slots = math.ceil(1.25 * num_bytes / patch_size)
    return min(num_bytes, -(-slots // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE)


class LatentTransformer(nn.Module):
    """Causal layers over patches; nearly all the parameters outside the tables."""

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

    def forward(self, patches: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
        """[B, C, K*d] -> [B, C, D]; `documents` [1, C] of a packed row."""
        x = self.token_embedding_projection(patches).type_as(patches)
        plan = plan_attention(self.config.latent, x, documents)
        for layer in self.layers:
            x = layer(x, plan)
        return x


class BLT(nn.Module):
    """A Byte Latent Transformer over bytes that are already cut into patches.

    Parameters carry the names that the published weights have in transformers, less the prefix `model.`, and with them
    it computes the published logits. Documents of a packed row and rows of a batch never see each other. Under
    autocast the residual streams stay in the dtype of the parameters.
    """

    def __init__(self, config: BLTConfig):
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
        byte_patches: bool = False,
    ) -> torch.Tensor:
        """Next-byte logits: [b, i] predicts byte i + 1 from bytes 0 .. i and the patches finished by then.

        Args:
            tokens: [B, N] int32 or int64. Pad with token 0; padding is what lies outside the patches of `layout`.
            layout: the patches of `tokens`, from `segment*` or `PatchLayout.from_*`.
            cu_seqlens: [S+1], B = 1: the same documents that `layout` was made with. N-grams, self-attention and the
                latent transformer stay within them.
            byte_patches: the patches are meant to be single bytes, so that a slot for every byte wastes nothing.

        Returns:
            float32 [B, N, V]. Rows of padding hold finite values without meaning.

        Raises:
            TypeError, ValueError: arguments that do not fit each other; a layout with a slot for every byte, which
                would make the latent transformer several times dearer than its patches (unless `byte_patches`, or
                there are at most 128 slots).
        """
        self._check(tokens, layout, cu_seqlens, byte_patches)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if cu_seqlens is None:
            documents = (positions >= layout.offsets[:, :1]).long()  # left padding is a document of its own
            slot_documents = None
        else:
            documents = document_ids(cu_seqlens, positions)
            # A slot belongs where its last byte does: an empty one to the document before it.
            slot_documents = document_ids(cu_seqlens, (layout.offsets[:, 1:] - 1).clamp(min=0))
        x, patches = self.local_encoder(self.embed(tokens, cu_seqlens), layout, documents)
        patches = self.global_transformer(patches, slot_documents)
        x = self.local_decoder(x, patches, layout, documents)
        return self.lm_head(x).float()

    def loss(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        layout: PatchLayout,
        *,
        cu_seqlens: torch.Tensor | None = None,
        byte_patches: bool = False,
    ) -> NextByteLoss:
        """Loss of targets [B, N] int, the byte after each byte of `tokens`; -100 does not count."""
        return next_byte_loss(self(tokens, layout, cu_seqlens=cu_seqlens, byte_patches=byte_patches), targets)

    def _check(
        self, tokens: torch.Tensor, layout: PatchLayout, cu_seqlens: torch.Tensor | None, byte_patches: bool
    ) -> None:
        op = "BLT"
        check_tensor(op, "tokens", tokens, ndim=2, dtypes=INT_DTYPES)
        check_layout(op, layout, tokens.device, "tokens")
        check_shape(op, "layout.patch_ids", layout.patch_ids, tokens.shape)
        if cu_seqlens is not None:
            check_tensor(op, "cu_seqlens", cu_seqlens, ndim=1, dtypes=INT_DTYPES)
            check_device(op, "cu_seqlens", cu_seqlens, tokens.device, "tokens")
            if tokens.shape[0] != 1:
                raise fail_value(op, "cu_seqlens", "tokens of one row (B = 1)", f"shape {tuple(tokens.shape)}")
        sequences = layout.cu_patches.shape[0] - 1
        if sequences != (tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1):
            got = "none" if cu_seqlens is None else f"{cu_seqlens.shape[0] - 1}"
            raise fail_value(op, "cu_seqlens", f"the {sequences} sequences that the layout was made with", got)
        if not byte_patches and layout.capacity >= layout.num_bytes and layout.capacity > CAPACITY_MULTIPLE:
            raise fail_value(
                op,
                "layout.capacity",
                f"fewer slots than the {layout.num_bytes} bytes of a row: the latent transformer computes every slot. "
                "Segment with capacity=latent_capacity(num_bytes, patch_size), or use layout.trim(), or say "
                "byte_patches=True where patches are single bytes",
                layout.capacity,
            )
