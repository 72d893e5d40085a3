"""The compared models of a scale, with all that their runs need: tokenizer, patcher, rows and FLOPs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from blt_kernels.data import DocumentStream, PackedBatches, Tokenizer
from blt_kernels.model import BLTConfig, EntropyModel, EntropyModelConfig
from blt_kernels.model.flops import Ledger, token_flops
from blt_kernels.training.calibration import entropy_patcher
from blt_kernels.training.patcher import Patcher, PatcherConfig
from blt_kernels.training.rows import RowShape, mean_patch_length

from .jobs import ENTROPY, NGRAM_ENTROPY, Scale, Size
from .models import TOKEN, VARIANTS, Variant, grow_latent, variant_flops
from .texts import Texts, take
from .tokens import BPETokenizer

SAMPLED_BATCHES = 16  # whose mean bytes fix the number of steps
REPORTED_COUNTS = ("paper", "inclusive")


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the compared models.

    Attributes:
        unit_bytes: mean bytes of a token, or of a patch.
        shape: rows and sequences that hold the scale's bytes, whatever the unit.
        batch_bytes: mean bytes of text in a training batch.
        flops: by count ("paper" and "inclusive"), per byte of text.
    """

    name: str
    config: BLTConfig | EntropyModelConfig
    unit_bytes: float
    shape: RowShape
    batch_bytes: float
    flops: dict[str, Ledger]
    cross_attention: bool = True
    patcher: Patcher | None = None
    tokenizer: Tokenizer | None = None

    def batches(self, documents: DocumentStream) -> PackedBatches:
        return self.shape.batches(documents, self.patcher, tokenizer=self.tokenizer)


class Contenders:
    """Makes the models of a scale as they are asked for, each once.

    Args:
        work: folder of the tokenizer.
        entropy_model: gives the trained entropy model of a name, the same for every BLT that is cut by it.
    """

    def __init__(
        self, scale: Scale, texts: Texts, work: Path, console: Console, entropy_model: Callable[[str], EntropyModel]
    ):
        self.scale, self.texts, self.work, self.console = scale, texts, work, console
        self._entropy_model = entropy_model
        self._models: dict[tuple[str, str], Model] = {}
        self._patchers: dict[tuple[str, float | None, bool], tuple[Patcher, float]] = {}

    def model(self, size: Size, name: str) -> Model:
        """A model of the comparison; a BLT is grown to the inclusive FLOPs per byte of the token model."""
        key = size.name, name
        if key not in self._models:
            self._models[key] = self._token_model(size) if name == TOKEN else self._blt(size, VARIANTS[name])
        return self._models[key]

    @functools.cached_property
    def tokenizer(self) -> BPETokenizer:
        path = self.work / "tokenizer.json"
        if not path.exists():
            self.console.print(f"training a BPE tokenizer of {self.scale.vocab_size} tokens")
            documents = take(self.texts.train, self.scale.tokenizer_bytes)
            BPETokenizer.train(documents, self.scale.vocab_size).save(path)
        return BPETokenizer.load(path)

    def patcher(self, variant: Variant) -> tuple[Patcher, float]:
        """The patcher of a BLT, and the mean bytes of its patches on the training text."""
        method, patch_size, _ = key = variant.method, variant.patch_size, variant.ngram_entropy
        if key not in self._patchers:
            if method == "entropy":
                assert patch_size is not None
                patcher = entropy_patcher(
                    self._entropy_model(NGRAM_ENTROPY if variant.ngram_entropy else ENTROPY),
                    self.texts.calibration,
                    threshold=None,
                    patch_size=patch_size,
                    num_bytes=self.scale.calibration_bytes,
                )
            else:
                patcher = Patcher(PatcherConfig(method, patch_size=None if patch_size is None else int(patch_size)))
            self._patchers[key] = patcher, mean_patch_length(self.texts.train, patcher)
        return self._patchers[key]

    def _token_model(self, size: Size) -> Model:
        documents = list(take(self.texts.train, self.scale.calibration_bytes))
        unit = sum(map(len, documents)) / sum(len(self.tokenizer.encode(document)) for document in documents)
        config = EntropyModelConfig(size.token, self.tokenizer.vocab_size)
        longest = round(self.scale.sequence_bytes / unit)
        shape = RowShape(self.scale.batch_size * longest, longest)
        context = self.scale.sequence_bytes
        flops = {
            count: token_flops(size.token, config.vocab_size, unit, context_bytes=context, count=count)
            for count in REPORTED_COUNTS
        }
        batch_bytes = self._batch_bytes(shape, None, self.tokenizer)
        return Model(TOKEN, config, unit, shape, batch_bytes, flops, tokenizer=self.tokenizer)

    def _blt(self, size: Size, variant: Variant) -> Model:
        patcher, unit = self.patcher(variant)
        owner = None if patcher.entropy_model is None else patcher.entropy_model.config
        context = self.scale.sequence_bytes

        def ledger(config: BLTConfig, count: str) -> Ledger:
            return variant_flops(variant, config, unit, context_bytes=context, entropy_model=owner, count=count)

        config = grow_latent(
            size.blt if variant.ngrams else dataclasses.replace(size.blt, ngram_sizes=()),
            self.model(size, TOKEN).flops["inclusive"].forward,
            lambda grown: ledger(grown, "inclusive").forward,
            aspect=size.token.dim / size.token.num_layers,
        )
        row_tokens = self.scale.batch_size * self.scale.sequence_bytes
        shape = RowShape(row_tokens, self.scale.sequence_bytes, round(row_tokens / unit))
        flops = {count: ledger(config, count) for count in REPORTED_COUNTS}
        batch_bytes = self._batch_bytes(shape, patcher, None)
        return Model(
            variant.name,
            config,
            unit,
            shape,
            batch_bytes,
            flops,
            cross_attention=variant.cross_attention,
            patcher=patcher,
        )

    def _batch_bytes(self, shape: RowShape, patcher: Patcher | None, tokenizer: Tokenizer | None) -> float:
        loader = shape.batches(DocumentStream(self.texts.train, seed=0), patcher, tokenizer=tokenizer)
        return sum(next(loader).num_bytes for _ in range(SAMPLED_BATCHES)) / SAMPLED_BATCHES
