"""What a batch of rows remembers between bytes, and the step that adds one byte to each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from .._checks import INT_DTYPES, check_int, check_range, check_shape, check_tensor, fail_type, fail_value
from ..data import encode
from ..model import BLT
from ..tokens import VOCAB_SIZE
from ..training.patcher import Patcher
from .boundaries import Boundaries
from .caches import LocalStack, Ring
from .cross_attention import pool
from .decoder import DecoderStepper
from .entropies import EntropyStepper
from .history import History
from .latent import LatentStack

_OPEN_PATCH = 16  # bytes of an open patch that there is room for at first


class GenerationState:
    """What B rows have seen, so that one more byte of each costs a step and not the whole prefix again.

    A row begins with a prompt (`admit`), and then every call of `step` adds one token to all rows. Keys and values of
    the entropy model, the encoder and the decoder are kept as far back as their windows reach; those of the latent
    transformer are all kept, one for each closed patch. Predictions equal those of `model(tokens, layout)` up to
    rounding, and so do the patches, where no entropy is as close to the threshold as its rounding.

    Args:
        model: a BLT. Small layers are copied, so that a change of its parameters needs a new state.
        patcher: decides where patches end.
        prompts: the bytes that each row begins with.
        exact_entropies: the entropies of a row are those of one pass over all of it to the bit, as long as that pass is
            longer than the window of the entropy model. It costs a block of queries where one would do.
        max_patches: patches of a row that there is room for at first; default: a few. Room doubles when it is full.

    Attributes:
        logits: float32 [B, V], what is predicted to follow the latest token of each row.
        num_patches: int [B], the closed patches of each row.

    Raises:
        TypeError, ValueError: wrong argument.

    Source: Byte Latent Transformer (arXiv 2412.09871), whose text describes training; what a cache must keep follows
        from its architecture.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: BLT,
        patcher: Patcher,
        prompts: Sequence[bytes],
        *,
        exact_entropies: bool = False,
        max_patches: int | None = None,
    ):
        op = "GenerationState"
        if not isinstance(model, BLT):
            raise fail_type(op, "model", "a BLT", type(model).__name__)
        if not isinstance(patcher, Patcher):
            raise fail_type(op, "patcher", "a Patcher", type(patcher).__name__)
        if max_patches is not None:
            check_int(op, "max_patches", max_patches, 1)
        check_prompts(op, prompts)
        for part in (model, patcher.entropy_model):
            if part is not None and part.config.vocab_size < VOCAB_SIZE:
                expected = f"at least {VOCAB_SIZE} tokens, so that there is one for each byte"
                raise fail_value(op, f"vocab_size of {type(part).__name__}", expected, part.config.vocab_size)
        rows = len(prompts)
        self.model, self.patcher = model, patcher
        self.device = model.lm_head.weight.device
        config = model.config
        self._history = History(rows, max((1, *config.ngram_sizes)), self.device)
        self._entropies = None
        if patcher.entropy_model is not None:
            resets = patcher.config.reset_at_newline
            if exact_entropies and resets:
                expected = "False for a patcher that resets at newlines, whose full pass has another geometry a line"
                raise fail_value(op, "exact_entropies", expected, True)
            layers, window = patcher.entropy_model.layers, patcher.entropy_model.config.transformer.window
            if exact_entropies and layers and window is None:
                expected = "False for an entropy model without a window, whose full pass has no blocks to keep to"
                raise fail_value(op, "exact_entropies", expected, True)
            self._entropies = EntropyStepper(
                patcher.entropy_model, rows, exact=exact_entropies, reset_at_newline=resets
            )
        self._encoder = LocalStack(model.local_encoder.layers, config.encoder, rows, self.device)
        self._open_patch = Ring(rows, _OPEN_PATCH)  # states of the bytes whose patch is not closed
        self._latent = LatentStack(model.global_transformer, rows, self.device, max_patches)
        self._decoder = DecoderStepper(model.local_decoder, rows, self.device)
        self._boundaries = Boundaries(patcher.config, rows)
        self._x = torch.empty(0)  # states of the latest byte, between the two halves of a step
        self.logits = torch.zeros(rows, config.vocab_size, device=self.device)
        self.admit(range(rows), prompts)

    @property
    def num_rows(self) -> int:
        return len(self.logits)

    @property
    def num_patches(self) -> list[int]:
        return list(self._latent.lengths)

    @torch.inference_mode()
    def admit(self, rows: Sequence[int], prompts: Sequence[bytes]) -> None:
        """Begins new sequences in `rows`, whose own are forgotten, with one pass over all of their prompts.

        Args:
            rows: different numbers in 0 .. B-1.
            prompts: what each of them begins with.
        """
        op = "GenerationState.admit"
        check_prompts(op, prompts)
        for row in rows:
            check_int(op, "rows", row, 0, self.num_rows - 1)
        if len(rows) != len(prompts) or len(set(rows)) != len(rows):
            raise fail_value(op, "rows", f"{len(prompts)} different rows, one a prompt", list(rows))
        if not prompts:
            return
        encoded = [torch.from_numpy(encode(prompt, eos=False)) for prompt in prompts]
        tokens = pad_sequence(encoded, batch_first=True)  # with token 0, on the right
        self._prefill(list(rows), tokens.to(self.device), [len(row) for row in encoded])

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Adds a token to every row.

        Args:
            tokens: int64 or int32 [B]: byte b is token b + 4.

        Returns:
            `logits`, float32 [B, V].
        """
        op = "GenerationState.step"
        check_tensor(op, "tokens", tokens, dtypes=INT_DTYPES)
        check_shape(op, "tokens", tokens, (self.num_rows,))
        check_range(op, "tokens", tokens, 0, self.model.config.vocab_size - 1)
        return self.decode(*self.encode(tokens))

    @torch.inference_mode()
    def encode(self, tokens: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The first half of a step, up to the only wait for the device: entropy model and encoder.

        Returns:
            The tokens [B] and their entropies [B] (0 without an entropy model) on the host.
        """
        history = self._history.add(tokens)
        known = tokens.double()[None]
        if self._entropies is not None:
            known = torch.stack((known[0], self._entropies.step(tokens).double()))
        self._x = self._encoder.step(self.model.embed(history)[:, -1:])
        read = known.cpu().numpy()
        entropies = read[1] if len(read) == 2 else np.zeros(self.num_rows)
        return read[0].astype(np.int64), entropies.astype(np.float32)

    @torch.inference_mode()
    def decode(self, tokens: NDArray[np.int64], entropies: NDArray[np.float32]) -> torch.Tensor:
        """The second half: the latent transformer for the rows whose patch closes, and the decoder: `logits`."""
        x = self._x
        lengths = self._boundaries.open_lengths + 1
        self._open_patch.grow(int(lengths.max()))
        self._open_patch.add(x[:, 0])
        if self._entropies is not None:
            self._entropies.after(tokens)
        closing = np.flatnonzero(self._boundaries.add(tokens, entropies)).tolist()
        if closing:
            self._close(closing, lengths[closing].tolist())
        self.logits = self._predict(self._decoder.step(x)[:, 0])
        return self.logits

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these, which become rows 0, 1, ... in this order."""
        rows = list(rows)
        for part in (
            self._history,
            self._encoder,
            self._open_patch,
            self._latent,
            self._decoder,
            self._boundaries,
        ):
            part.keep(rows)
        if self._entropies is not None:
            self._entropies.keep(rows)
        self.logits = self.logits[rows]

    def _close(self, rows: list[int], lengths: list[int]) -> None:
        """The open patches of `rows`, of so many bytes, become patches that their bytes read from now on."""
        x = pad_sequence([self._open_patch.last(*patch) for patch in zip(rows, lengths, strict=True)], batch_first=True)
        patches = pool(self.model.local_encoder, x, lengths)
        self._decoder.show(rows, self._latent.step(rows, patches), x)

    def _prefill(self, rows: list[int], tokens: torch.Tensor, lengths: list[int]) -> None:
        """tokens [R, N], padded on the right, of which `lengths` [R] are real."""
        seq_lens = torch.tensor(lengths, device=self.device)
        entropies = None if self._entropies is None else self._entropies.prefill(rows, tokens, lengths)
        layout = self.patcher.segment(tokens, entropies, seq_lens=seq_lens).trim()
        each, last = torch.arange(len(rows), device=self.device), seq_lens - 1
        closed = layout.visible_ids[each, last] + 1
        open_lengths = (seq_lens - layout.offsets[each, closed]).tolist()

        x = self._encoder.prefill(rows, self.model.embed(tokens), lengths)
        patches = self._latent.prefill(rows, self.model.local_encoder.pool(x, layout), closed.tolist())
        self._decoder.show(rows, patches[each, closed.long() - 1][:, None], x)
        states = self._decoder.prefill(rows, x, patches, layout, lengths)
        self.logits[rows] = self._predict(states[each, last])

        self._open_patch.grow(max(open_lengths))
        for i, (row, length, open_length) in enumerate(zip(rows, lengths, open_lengths, strict=True)):
            self._history.fill(row, tokens[i, :length])
            self._open_patch.fill(row, x[i, length - open_length : length])
            entropy = 0.0 if entropies is None else float(entropies[i, length - 1])
            self._boundaries.set_row(row, length, open_length, int(tokens[i, length - 1]), entropy)

    def _predict(self, states: torch.Tensor) -> torch.Tensor:
        """Normalised states [B, d] of the decoder -> float32 [B, V]."""
        return self.model.lm_head(states).float()


def check_prompts(op: str, prompts: Sequence[bytes]) -> None:
    """`prompts` is a sequence of bytes objects."""
    if isinstance(prompts, (bytes, str)) or not isinstance(prompts, Sequence):
        raise fail_type(op, "prompts", "a sequence of bytes objects", type(prompts).__name__)
    for prompt in prompts:
        if not isinstance(prompt, bytes):
            raise fail_type(op, "prompts", "bytes objects", type(prompt).__name__)
