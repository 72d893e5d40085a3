"""Shapes of the models, as frozen dataclasses that check themselves and go to and from JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from .._checks import check_bool, check_choice, check_int, check_number, fail_type, fail_value
from ..ops.hash_ngram_embedding import HASH_PRIMES, MAX_TABLES
from ..tokens import VOCAB_SIZE


def _check_counts(owner: str, config: Any, *names: str) -> None:
    for name in names:
        check_int(owner, name, getattr(config, name), 1)


def _checked_ngram_sizes(owner: str, sizes: Any, functions: int) -> tuple[int, ...]:
    """The sizes of the n-grams as a tuple, for which JSON gives a list; `functions` hash functions read each."""
    if not isinstance(sizes, tuple | list):
        raise fail_type(owner, "ngram_sizes", "a tuple of ints", type(sizes).__name__)
    for size in sizes:
        check_int(owner, "ngram_sizes", size, 1)
    if functions * len(sizes) > MAX_TABLES:
        got = f"{functions} * {len(sizes)}"
        raise fail_value(owner, "ngram_sizes", f"at most {MAX_TABLES} (times hash_functions)", got)
    return tuple(sizes)


def _from_dict(cls: Any, values: Any) -> Any:
    """Builds `cls` from a JSON object; unknown and missing fields are errors that name the field.

    This is our own code because a library for it (dacite, pydantic) would be one more dependency in place of these
    lines, and the configs check their values themselves.
    """
    if not isinstance(values, dict):
        raise fail_type(cls.__name__, "config", "a JSON object", type(values).__name__)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise fail_value(cls.__name__, name, "one of the fields " + ", ".join(fields), "an unknown field")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise fail_value(cls.__name__, name, "a value", "none: the field is missing")
    nested: dict[str, Any] = dict.fromkeys(("transformer", "encoder", "latent", "decoder"), TransformerConfig)
    nested["rope_scaling"] = RopeScaling
    made = {
        name: _from_dict(nested[name], value) if name in nested and value is not None else value
        for name, value in values.items()
    }
    return cls(**made)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary positions that turn more slowly, as Llama 3.1 has them ("llama3" in transformers).

    With n the `original_length`, pairs that turn more than `high_freq_factor` times in n positions keep their speed,
    those that turn less than `low_freq_factor` times are `factor` times as slow, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(name, "factor", self.factor, 1)
        check_number(name, "low_freq_factor", self.low_freq_factor, 0, above=True)
        check_number(name, "high_freq_factor", self.high_freq_factor, self.low_freq_factor, above=True)
        _check_counts(name, self, "original_length")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A stack of pre-norm layers. A position sees `window` keys, itself included; with None, all keys up to itself.

    An entropy model may have no layers at all; the stacks of a BLT have at least one.

    `num_kv_heads` heads of keys and values are each shared by num_heads / num_kv_heads heads of queries, in self- and
    in cross-attention; None: every head has its own.
    """

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    window: int | None = None
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    num_kv_heads: int | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check_counts(name, self, "dim", "num_heads", "ffn_dim")
        check_int(name, "num_layers", self.num_layers, 0)
        if self.window is not None:
            _check_counts(name, self, "window")
        if self.dim % (2 * self.num_heads):
            raise fail_value(name, "dim", f"a multiple of 2 * num_heads = {2 * self.num_heads}", self.dim)
        if self.num_kv_heads is not None:
            _check_counts(name, self, "num_kv_heads")
            if self.num_heads % self.num_kv_heads:
                raise fail_value(name, "num_kv_heads", f"a divisor of num_heads = {self.num_heads}", self.num_kv_heads)
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise fail_type(name, "rope_scaling", "a RopeScaling or None", type(self.rope_scaling).__name__)
        check_number(name, "rope_theta", self.rope_theta, 0, above=True)
        check_number(name, "norm_eps", self.norm_eps, 0, above=True)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of the keys of all heads together, and of the values."""
        return self.head_dim * (self.num_kv_heads or self.num_heads)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        return _from_dict(cls, values)


@dataclasses.dataclass(frozen=True)
class EntropyModelConfig:
    """The byte language model whose next-byte entropies cut text into patches.

    Attributes:
        transformer: its layers, of which there may be none: then the last byte and the tables are all it knows.
        ngram_sizes: sizes of the hashed byte n-grams whose table rows are added to the byte embeddings; empty, as
            published, for no tables.
        hash_rows: rows of each table. There is one table per size, as wide as the model. Tables are part of the
            checkpoint of every BLT that is trained on the model's patches, so they are small by default.
    """

    transformer: TransformerConfig
    vocab_size: int = VOCAB_SIZE
    ngram_sizes: tuple[int, ...] = ()
    hash_rows: int = 16381

    def __post_init__(self) -> None:
        if not isinstance(self.transformer, TransformerConfig):
            raise fail_type("EntropyModelConfig", "transformer", "a TransformerConfig", type(self.transformer).__name__)
        _check_counts("EntropyModelConfig", self, "vocab_size", "hash_rows")
        object.__setattr__(self, "ngram_sizes", _checked_ngram_sizes("EntropyModelConfig", self.ngram_sizes, 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `json.dump`."""
        return dataclasses.asdict(self) | {"ngram_sizes": list(self.ngram_sizes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EntropyModelConfig:
        return _from_dict(cls, values)

    @classmethod
    def preset(cls, name: str) -> EntropyModelConfig:
        """`100M` is the published entropy model (99.5 M parameters). `tiny` trains in under a minute on two cores, and
        so does `ngram`: no layers, and tables of n-grams that add 21 MB to a checkpoint."""
        return _preset(cls, name, ENTROPY_PRESETS)


@dataclasses.dataclass(frozen=True)
class BLTConfig:
    """A Byte Latent Transformer.

    Attributes:
        encoder, latent, decoder: the three stacks. Encoder and decoder share their width d; the latent width is D.
        slots_per_patch: K, queries a patch pools its bytes into and keys the decoder reads back (`cross_attn_k`).
        ngram_sizes: sizes of the hashed byte n-grams; empty for no tables.
        hash_rows: rows of each table. There is one table per size and hash function.
        hash_functions: hash functions, each with its own prime, from 1 to 11.
        hash_dim: width of the tables. None, as published, is d; another width is projected to d, which keeps the
            tables of a small model cheap to update.
        sparse_grad: the tables get a coalesced sparse gradient (for `blt_kernels.optim.RowwiseAdagrad`), so that
            a step costs what its bytes cost and not what the tables weigh.
    """

    encoder: TransformerConfig
    latent: TransformerConfig
    decoder: TransformerConfig
    slots_per_patch: int = 2
    ngram_sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    hash_rows: int = 500002
    hash_functions: int = 1
    hash_dim: int | None = None
    sparse_grad: bool = True
    vocab_size: int = VOCAB_SIZE

    def __post_init__(self) -> None:
        for part in ("encoder", "latent", "decoder"):
            value = getattr(self, part)
            if not isinstance(value, TransformerConfig):
                raise fail_type("BLTConfig", part, "a TransformerConfig", type(value).__name__)
            check_int("BLTConfig", f"{part}.num_layers", value.num_layers, 1)
        if self.encoder.dim != self.decoder.dim:
            raise fail_value("BLTConfig", "decoder.dim", f"encoder.dim = {self.encoder.dim}", self.decoder.dim)
        if self.latent.window is not None:
            raise fail_value(
                "BLTConfig", "latent.window", "None: patches see all patches before them", self.latent.window
            )
        _check_counts("BLTConfig", self, "slots_per_patch", "hash_rows", "vocab_size")
        check_int("BLTConfig", "hash_functions", self.hash_functions, 1, len(HASH_PRIMES))
        object.__setattr__(
            self, "ngram_sizes", _checked_ngram_sizes("BLTConfig", self.ngram_sizes, self.hash_functions)
        )
        if self.hash_dim is not None:
            _check_counts("BLTConfig", self, "hash_dim")
        check_bool("BLTConfig", "sparse_grad", self.sparse_grad)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `json.dump`."""
        return dataclasses.asdict(self) | {"ngram_sizes": list(self.ngram_sizes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BLTConfig:
        return _from_dict(cls, values)

    @classmethod
    def preset(cls, name: str) -> BLTConfig:
        """`1B` and `7B` are the released models. `400M` has the paper's published shapes, where the table leaves open
        the feed-forward widths (here 8/3 of the width, rounded up to 256) and lists 10 cross-attention heads, which
        do not divide 768 (here 12, the local layers' own). `tiny` learns source code in minutes on two cores."""
        return _preset(cls, name, BLT_PRESETS)


def _preset(cls: Any, name: str, presets: dict[str, Any]) -> Any:
    check_choice(cls.__name__, "preset", name, tuple(presets))
    return presets[name]


ENTROPY_PRESETS = {
    "tiny": EntropyModelConfig(TransformerConfig(64, 2, 2, 192, window=64, rope_theta=10000.0)),
    "ngram": EntropyModelConfig(TransformerConfig(64, 0, 2, 192), ngram_sizes=(2, 3, 4, 5, 6)),
    "100M": EntropyModelConfig(TransformerConfig(768, 14, 12, 2048, window=512, rope_theta=10000.0)),
}

BLT_PRESETS = {
    "tiny": BLTConfig(
        encoder=TransformerConfig(96, 1, 2, 256, window=64),
        latent=TransformerConfig(192, 2, 3, 512),
        decoder=TransformerConfig(96, 1, 2, 256, window=64),
        hash_rows=131071,
        hash_dim=32,
    ),
    "400M": BLTConfig(
        encoder=TransformerConfig(768, 1, 12, 2048, window=512),
        latent=TransformerConfig(1280, 24, 10, 3584),
        decoder=TransformerConfig(768, 7, 12, 2048, window=512),
    ),
    "1B": BLTConfig(
        encoder=TransformerConfig(1024, 1, 16, 2816, window=512),
        latent=TransformerConfig(2048, 25, 16, 5632),
        decoder=TransformerConfig(1024, 9, 16, 2816, window=512),
    ),
    "7B": BLTConfig(
        encoder=TransformerConfig(1280, 1, 20, 3584, window=512),
        latent=TransformerConfig(4096, 32, 32, 11008),
        decoder=TransformerConfig(1280, 6, 20, 3584, window=512),
        slots_per_patch=4,
    ),
}
