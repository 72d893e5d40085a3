"""The thin BLT: shapes, causality, packing and padding, linear windows, what a step costs, training."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_recompile, count_flops, random_lengths
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from blt_kernels import PatchLayout, segment, segment_fixed, segment_spaces, use_backend
from blt_kernels.model import (
    BLT,
    BLTConfig,
    EntropyModel,
    EntropyModelConfig,
    RopeScaling,
    TransformerConfig,
    next_byte_loss,
)
from blt_kernels.model.config import ENTROPY_PRESETS
from blt_kernels.model.loss import bits_per_byte
from blt_kernels.model.transformer import Sequences, attend, plan_attention, rotate

SMALL = BLTConfig(
    encoder=TransformerConfig(16, 2, 2, 24, window=6),
    latent=TransformerConfig(24, 2, 2, 32),
    decoder=TransformerConfig(16, 2, 2, 24, window=6),
    ngram_sizes=(2, 3),
    hash_rows=31,
    sparse_grad=False,
)
SMALL_ENTROPY = EntropyModelConfig(TransformerConfig(16, 2, 2, 24, window=6))
# Without layers, with an n-gram longer than some sequences; and with layers.
NGRAM_ENTROPY = EntropyModelConfig(TransformerConfig(16, 0, 2, 24), ngram_sizes=(2, 3, 8), hash_rows=31)
NGRAM_LAYERS_ENTROPY = dataclasses.replace(NGRAM_ENTROPY, transformer=SMALL_ENTROPY.transformer)
SEQUENCES = (13, 1, 22, 7)  # bytes of the sequences that tests pack and pad


def make_blt(config: BLTConfig = SMALL, dtype: torch.dtype = torch.float64) -> BLT:
    """A model in which every parameter matters: tables start at zero otherwise."""
    torch.manual_seed(0)
    model = BLT(config).to(dtype)
    if model.encoder_hash_tok_embedding is not None:
        torch.nn.init.normal_(model.encoder_hash_tok_embedding.weight)
    return model


def make_entropy_model(config: EntropyModelConfig, dtype: torch.dtype = torch.float32) -> EntropyModel:
    """A model in which the tables matter too, in eval mode."""
    torch.manual_seed(0)
    model = EntropyModel(config).to(dtype)
    if model.hash_tok_embedding is not None:
        torch.nn.init.normal_(model.hash_tok_embedding.weight)
    return model.eval()


def make_tokens(*shape: int) -> torch.Tensor:
    tokens = torch.randint(4, 260, shape)
    tokens[:, 0] = 1
    return tokens


def make_entropies(tokens: torch.Tensor) -> torch.Tensor:
    """Values that depend on each token alone, so that they are causal and agree between packed and padded batches."""
    return (tokens * 37 % 101).float() / 10


def make_batch(batch: int, num_bytes: int, patch_size: float = 4.5) -> tuple[torch.Tensor, PatchLayout]:
    """Random tokens, and patches of random lengths that fill all rows."""
    return make_tokens(batch, num_bytes), PatchLayout.from_lengths(random_lengths(num_bytes, patch_size, batch))


# ---- shapes ----------------------------------------------------------------------------------------------------------


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        entropy_model = EntropyModel(EntropyModelConfig.preset("100M"))
        models = {name: BLT(BLTConfig.preset(name)) for name in ("tiny", "400M", "1B", "7B")}
    assert count(entropy_model) == pytest.approx(99.5e6, rel=1e-3)
    tables = {name: m.encoder_hash_tok_embedding.weight.numel() for name, m in models.items()}
    assert tables["1B"] == 6 * 500002 * 1024
    assert count(models["1B"]) == pytest.approx(4.5e9, rel=0.01)
    assert tables["7B"] == 6 * 500002 * 1280
    # The paper's table rounds: latent 470M, 1B, 6.4B; decoder 50M, 113M, 120M; encoder 7M, 12M, 20M.
    published = {"400M": (470e6, 50e6, 7e6), "1B": (1.28e9, 113e6, 12e6), "7B": (6.4e9, 120e6, 20e6)}
    for name, (latent, decoder, encoder) in published.items():
        assert count(models[name].global_transformer.layers) == pytest.approx(latent, rel=0.05)
        assert count(models[name].local_decoder.layers) == pytest.approx(decoder, rel=0.05)
        assert count(models[name].local_encoder.layers) == pytest.approx(encoder, rel=0.1)
    assert 1e6 < count(models["tiny"]) - tables["tiny"] < 5e6


def test_state_dict_has_the_published_names() -> None:
    with torch.device("meta"):
        model, entropy_model = BLT(BLTConfig.preset("7B")), EntropyModel(EntropyModelConfig.preset("100M"))
        direct = BLT(BLTConfig.preset("1B"))
    layer = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    layer |= {"input_layernorm", "post_attention_layernorm"}
    cross = {f"{p}_proj" for p in "qkvo"} | {"q_norm", "k_norm"}

    def stack(prefix: str, layers: int, cross_layers: int = 0) -> set[str]:
        names = {f"{prefix}layers.{i}.{n}.weight" for i in range(layers) for n in layer}
        return names | {f"{prefix}cross_attn_layers.{i}.{n}.weight" for i in range(cross_layers) for n in cross}

    expected = stack("local_encoder.", 1, 1) | stack("global_transformer.", 32) | stack("local_decoder.", 6, 6)
    expected |= {f"local_encoder.{n}.weight" for n in ("embed_tokens", "patch_embedding_projection")}
    expected |= {f"local_decoder.{n}.weight" for n in ("norm", "patch_embedding_projection")}
    expected |= {"encoder_hash_tok_embedding.weight", "lm_head.weight"}
    expected |= {"global_transformer.token_embedding_projection.weight"}
    assert set(model.state_dict()) == expected
    assert "global_transformer.token_embedding_projection.weight" not in direct.state_dict()  # K*d = D
    assert set(entropy_model.state_dict()) == stack("", 14) | {
        f"{n}.weight" for n in ("embed_tokens", "norm", "lm_head")
    }
    assert model.local_encoder.patch_embedding_projection.weight.shape == (4 * 1280, 1280)
    assert model.local_decoder.patch_embedding_projection.weight.shape == (4 * 1280, 4096)


SCALED = dataclasses.replace(SMALL.latent, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64))


@pytest.mark.parametrize(
    "config",
    [*map(BLTConfig.preset, ("tiny", "400M", "1B", "7B")), SMALL, dataclasses.replace(SMALL, latent=SCALED)],
)
def test_config_survives_json(config: BLTConfig) -> None:
    assert BLTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("config", [*ENTROPY_PRESETS.values(), EntropyModelConfig(SMALL.encoder, 99, (2, 5), 7)])
def test_entropy_config_survives_json(config: EntropyModelConfig) -> None:
    assert EntropyModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_entropy_config_from_before_there_were_tables() -> None:
    config = EntropyModelConfig.preset("tiny")
    old = {"transformer": config.transformer.to_dict(), "vocab_size": config.vocab_size}
    assert EntropyModelConfig.from_dict(old) == config and config.ngram_sizes == ()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: TransformerConfig(0, 1, 1, 8), ValueError, "dim: expected at least 1, got 0"),
        (lambda: TransformerConfig(8, 1.0, 1, 8), TypeError, "num_layers: expected an int, got float"),
        (lambda: TransformerConfig(8, -1, 1, 8), ValueError, "num_layers: expected at least 0, got -1"),
        (
            lambda: dataclasses.replace(SMALL, encoder=TransformerConfig(16, 0, 2, 24)),
            ValueError,
            "BLTConfig: encoder.num_layers: expected at least 1, got 0",
        ),
        (lambda: TransformerConfig(10, 1, 2, 8), ValueError, r"dim: expected a multiple of 2 \* num_heads = 4, got 10"),
        (lambda: TransformerConfig(8, 1, 2, 8, window=0), ValueError, "window: expected at least 1, got 0"),
        (
            lambda: TransformerConfig(8, 1, 2, 8, norm_eps=math.inf),
            ValueError,
            "norm_eps: expected a finite number above 0",
        ),
        (lambda: TransformerConfig(8, 1, 2, 8, rope_theta="x"), TypeError, "rope_theta: expected a number"),
        (
            lambda: RopeScaling(8.0, 4.0, 4.0, 64),
            ValueError,
            "high_freq_factor: expected a finite number above 4, got 4",
        ),
        (lambda: RopeScaling(0.5, 1.0, 4.0, 64), ValueError, "factor: expected a finite number of at least 1, got 0.5"),
        (lambda: TransformerConfig(8, 1, 2, 8, rope_scaling=8.0), TypeError, "rope_scaling: expected a RopeScaling or"),
        (lambda: TransformerConfig(8, 1, 2, 8, num_kv_heads=0), ValueError, "num_kv_heads: expected at least 1, got 0"),
        (
            lambda: TransformerConfig(8, 1, 4, 8, num_kv_heads=3),
            ValueError,
            "num_kv_heads: expected a divisor of num_heads = 4, got 3",
        ),
        (lambda: EntropyModelConfig(None), TypeError, "transformer: expected a TransformerConfig, got NoneType"),
        (
            lambda: EntropyModelConfig(SMALL.encoder, ngram_sizes=3),
            TypeError,
            "EntropyModelConfig: ngram_sizes: expected",
        ),
        (lambda: EntropyModelConfig(SMALL.encoder, ngram_sizes=(0,)), ValueError, "ngram_sizes: expected at least 1"),
        (lambda: EntropyModelConfig(SMALL.encoder, ngram_sizes=(2,) * 1025), ValueError, "expected at most 1024"),
        (lambda: EntropyModelConfig(SMALL.encoder, hash_rows=0), ValueError, "hash_rows: expected at least 1, got 0"),
        (lambda: dataclasses.replace(SMALL, latent=7), TypeError, "latent: expected a TransformerConfig, got int"),
        (
            lambda: dataclasses.replace(SMALL, decoder=TransformerConfig(32, 1, 2, 24)),
            ValueError,
            "decoder.dim: expected encoder.dim = 16, got 32",
        ),
        (
            lambda: dataclasses.replace(SMALL, latent=TransformerConfig(32, 1, 2, 24, window=4)),
            ValueError,
            "latent.window: expected None",
        ),
        (lambda: dataclasses.replace(SMALL, ngram_sizes=3), TypeError, "ngram_sizes: expected a tuple of ints"),
        (lambda: dataclasses.replace(SMALL, ngram_sizes=(3, 0)), ValueError, "ngram_sizes: expected at least 1, got 0"),
        (lambda: dataclasses.replace(SMALL, ngram_sizes=(3, "a")), TypeError, "ngram_sizes: expected an int, got str"),
        (lambda: dataclasses.replace(SMALL, ngram_sizes=(3,) * 1025), ValueError, "ngram_sizes: expected at most 1024"),
        (lambda: dataclasses.replace(SMALL, hash_functions=12), ValueError, "hash_functions: expected 1 .. 11, got 12"),
        (lambda: dataclasses.replace(SMALL, hash_dim=0), ValueError, "hash_dim: expected at least 1, got 0"),
        (lambda: dataclasses.replace(SMALL, sparse_grad=1), TypeError, "sparse_grad: expected a bool, got int"),
        (lambda: BLTConfig.from_dict([]), TypeError, "config: expected a JSON object, got list"),
        (lambda: BLTConfig.from_dict(SMALL.to_dict() | {"depth": 3}), ValueError, "depth: expected one of the fields"),
        (lambda: BLTConfig.from_dict({}), ValueError, "BLTConfig: encoder: expected a value"),
        (lambda: BLTConfig.preset("3B"), ValueError, "preset: expected one of 'tiny', '400M', '1B', '7B', got '3B'"),
        (lambda: EntropyModelConfig.preset("x"), ValueError, "preset: expected one of 'tiny', 'ngram', '100M'"),
        (lambda: BLTConfig.preset(["1B"]), ValueError, "preset: expected one of 'tiny', '400M', '1B', '7B', got"),
        (lambda: BLT(SMALL_ENTROPY), TypeError, "BLT: config: expected a BLTConfig, got EntropyModelConfig"),
        (lambda: EntropyModel(None), TypeError, "EntropyModel: config: expected an EntropyModelConfig, got NoneType"),
    ],
)
def test_config_errors_name_the_field(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


# ---- self-attention --------------------------------------------------------------------------------------------------


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence_ids: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Every pair of positions, one dense mask."""
    i = torch.arange(q.shape[1])
    distance = i[:, None] - i
    seen = (distance >= 0) & (distance < (window or len(i))) & (sequence_ids[:, :, None] == sequence_ids[:, None])
    scores = torch.einsum("bihe,bjhe->bhij", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhe->bihe", weights, v)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 20, 33])
@pytest.mark.parametrize("window", [1, 2, 5, 6, None])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_equals_a_dense_mask(length: int, window: int | None, packed: bool) -> None:
    config = TransformerConfig(8, 1, 2, 8, window=window)
    q, k, v = torch.randn(3, 2, length, 2, 4, dtype=torch.float64)
    sequence_ids = torch.randint(0, 2, (2, length)).cumsum(1) if packed else None
    plan = plan_attention(config, q.flatten(2), None if sequence_ids is None else Sequences(sequence_ids))
    everything = torch.zeros(2, length) if sequence_ids is None else sequence_ids
    torch.testing.assert_close(attend(q, k, v, plan), naive_attention(q, k, v, everything, window))


@pytest.mark.parametrize("window", [5, None])
@pytest.mark.parametrize("packed", [False, True])
def test_grouped_heads_share_their_keys(window: int | None, packed: bool) -> None:
    """As copies of the keys and values would: one in turn for each head of a group."""
    config = TransformerConfig(24, 1, 6, 8, window=window, num_kv_heads=2)
    assert config.head_dim == 4 and config.kv_dim == 8 and dataclasses.replace(config, num_kv_heads=None).kv_dim == 24
    q, k, v = torch.randn(1, 20, 6, 4), *torch.randn(2, 1, 20, 2, 4)
    sequences = Sequences.packed(torch.tensor([0, 7, 7, 18]), 20, None) if packed else None
    plan = plan_attention(config, q.flatten(2), sequences)
    assert (plan.packed is not None) == (packed and window is None)
    copies = (x[:, :, [0, 0, 0, 1, 1, 1]] for x in (k, v))
    torch.testing.assert_close(attend(q, k, v, plan), attend(q, *copies, plan), rtol=0, atol=0)


def test_rotation_is_the_published_one() -> None:
    config = TransformerConfig(8, 1, 1, 8, rope_theta=100.0)
    x = torch.randn(1, 5, 1, 8)
    plan = plan_attention(config, x.flatten(2), Sequences(torch.tensor([[0, 0, 4, 4, 4]])))
    got = rotate(x, plan.rotation)
    for row, position in enumerate((0, 1, 0, 1, 2)):  # counted from the start of the sequence
        for pair in range(4):
            angle = position * 100.0 ** (-2 * pair / 8)
            a, b = x[0, row, 0, 2 * pair], x[0, row, 0, 2 * pair + 1]
            expected = (a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle))
            torch.testing.assert_close(got[0, row, 0, 2 * pair : 2 * pair + 2], torch.stack(expected))
    assert rotate(x.bfloat16(), plan.rotation).dtype == torch.bfloat16


class Memory(TorchDispatchMode):
    """Sums and maximises the elements of every tensor that an operator makes; views count, which does no harm here."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.total += tensor.numel()
        return out


def test_windowed_training_step_is_linear_in_bytes() -> None:
    model = EntropyModel(dataclasses.replace(SMALL_ENTROPY, transformer=TransformerConfig(16, 2, 2, 24, window=32)))
    cost = {}
    for num_bytes in (1024, 4096):
        tokens = make_tokens(1, num_bytes)
        with Memory() as memory:
            model.loss(tokens, tokens).mean.backward()
        flops = count_flops(lambda tokens=tokens: model.loss(tokens, tokens).mean.backward())
        cost[num_bytes] = memory.largest, memory.total, flops.get_total_flops()
    for small, large in zip(cost[1024], cost[4096], strict=True):
        assert 3.9 * small < large < 4.1 * small


# ---- the entropy model -----------------------------------------------------------------------------------------------


def pack(rows: list[torch.Tensor], tail: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens as one row [1, N] and cu_seqlens; `tail` bytes of padding after the last."""
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    return torch.cat([*rows, torch.zeros(tail, dtype=torch.int64)])[None], lengths.cumsum(0).int()


@pytest.mark.parametrize("config", [SMALL_ENTROPY, NGRAM_ENTROPY, NGRAM_LAYERS_ENTROPY])
def test_entropy_model_packed_equals_padded_equals_alone(config: EntropyModelConfig) -> None:
    model = make_entropy_model(config, torch.float64)
    rows = [make_tokens(1, n)[0] for n in SEQUENCES]
    tokens, cu_seqlens = pack(rows, tail=5)
    packed = model(tokens, cu_seqlens=cu_seqlens)[0, : sum(SEQUENCES)].split(SEQUENCES)
    padded = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    for i, row in enumerate(rows):
        alone = model(row[None])[0]
        torch.testing.assert_close(packed[i], alone)
        torch.testing.assert_close(padded[i, : len(row)], alone)


def test_entropies_without_layers_depend_on_the_sequence_alone() -> None:
    """To the last bit, whatever stands beside it, before it and after it: patches are those of the text."""
    model = make_entropy_model(NGRAM_ENTROPY)
    rows = [make_tokens(1, n)[0] for n in SEQUENCES]
    tokens, cu_seqlens = pack(rows, tail=5)
    packed = model.entropies(tokens, cu_seqlens=cu_seqlens)[0, : sum(SEQUENCES)].split(SEQUENCES)
    padded = model.entropies(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    left_padded = model.entropies(torch.stack([F.pad(row, (22 - len(row), 0)) for row in rows]))
    for i, row in enumerate(rows):
        alone = model.entropies(row[None])[0]
        for same in (packed[i], padded[i, : len(row)], left_padded[i, 22 - len(row) :]):
            assert torch.equal(same, alone)
        for prefix in range(1, len(row)):  # causal, and a loop over bytes gives what one pass gives
            assert torch.equal(model.entropies(row[None, :prefix])[0], alone[:prefix])


def test_ngrams_reach_no_further_than_their_size() -> None:
    """A byte changes the entropies of the longest n-gram's bytes from its own on, and no others."""
    model = make_entropy_model(NGRAM_ENTROPY)
    tokens = make_tokens(1, 40)
    changed = tokens.clone()
    changed[0, 11] = (tokens[0, 11] + 50) % 256 + 4
    differ = (model.entropies(tokens) != model.entropies(changed))[0].nonzero().flatten().tolist()
    assert differ == list(range(11, 11 + 8))
    cut = torch.tensor([0, 14, 40], dtype=torch.int32)  # a sequence ends behind the byte
    packed = (model.entropies(tokens, cu_seqlens=cut) != model.entropies(changed, cu_seqlens=cut))[0]
    assert packed.nonzero().flatten().tolist() == [11, 12, 13]


def test_tables_of_the_entropy_model_have_sparse_gradients() -> None:
    for config in (NGRAM_ENTROPY, NGRAM_LAYERS_ENTROPY):
        model = EntropyModel(config)
        assert not model.hash_tok_embedding.weight.any()  # an n-gram never seen is without effect
        tokens = make_tokens(2, 40)
        model.loss(tokens, tokens.roll(-1, 1)).mean.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.is_sparse == (name == "hash_tok_embedding.weight")
            assert parameter.grad.to_dense().any(), name
        assert model.hash_tok_embedding.weight.grad.is_coalesced()


@pytest.mark.parametrize("config", [SMALL_ENTROPY, NGRAM_ENTROPY])
def test_entropies_are_those_of_the_logits(config: EntropyModelConfig) -> None:
    model = make_entropy_model(config)
    tokens = make_tokens(2, 40)
    entropies = model.entropies(tokens)
    log_p = model(tokens).log_softmax(-1)
    torch.testing.assert_close(entropies, -(log_p.exp() * log_p).sum(-1))
    assert entropies.dtype == torch.float32 and not entropies.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert model.entropies(tokens).dtype == torch.float32


# ---- the whole model -------------------------------------------------------------------------------------------------


def packed_and_padded(rows: list[torch.Tensor]) -> tuple[tuple, tuple]:
    """(tokens, layout, cu_seqlens) of the sequences packed in one row, and the same with one a row."""
    tokens, cu_seqlens = pack(rows, tail=4)
    packed = segment(make_entropies(tokens), 5.0, cu_seqlens=cu_seqlens)
    padded_tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    seq_lens = torch.tensor([len(row) for row in rows])
    padded = segment(make_entropies(padded_tokens), 5.0, seq_lens=seq_lens)
    return (tokens, packed, cu_seqlens), (padded_tokens, padded, None)


@pytest.mark.parametrize(("hash_dim", "num_kv_heads"), [(None, None), (5, 1)])
def test_packed_equals_padded_equals_alone(hash_dim: int | None, num_kv_heads: int | None) -> None:
    grouped = {
        part: dataclasses.replace(getattr(SMALL, part), num_kv_heads=num_kv_heads)
        for part in ("encoder", "latent", "decoder")
    }
    model = make_blt(dataclasses.replace(SMALL, hash_dim=hash_dim, **grouped))
    rows = [make_tokens(1, n)[0] for n in SEQUENCES]
    (tokens, layout, cu_seqlens), (padded_tokens, padded_layout, _) = packed_and_padded(rows)
    packed = model(tokens.int(), layout, cu_seqlens=cu_seqlens)[0, : sum(SEQUENCES)].split(SEQUENCES)
    padded = model(padded_tokens, padded_layout)
    for i, row in enumerate(rows):
        alone = model(row[None], segment(make_entropies(row[None]), 5.0).trim())[0]
        torch.testing.assert_close(packed[i], alone)
        torch.testing.assert_close(padded[i, : len(row)], alone)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 0])])
def test_no_bytes(cu_seqlens: torch.Tensor | None) -> None:
    tokens = torch.zeros(1, 0, dtype=torch.int64)
    layout = PatchLayout.from_starts(tokens.bool(), cu_seqlens=cu_seqlens, capacity=4)
    assert make_blt()(tokens, layout, cu_seqlens=cu_seqlens).shape == (1, 0, 260)
    for config in (SMALL_ENTROPY, NGRAM_ENTROPY):
        assert EntropyModel(config)(tokens, cu_seqlens=cu_seqlens).shape == (1, 0, 260)


def test_empty_rows_and_empty_sequences() -> None:
    model = make_blt()
    rows = [make_tokens(1, n)[0] if n else torch.zeros(0, dtype=torch.int64) for n in (0, 9, 0, 0, 14, 0)]
    (tokens, layout, cu_seqlens), (padded_tokens, padded_layout, _) = packed_and_padded(rows)
    packed = model(tokens, layout, cu_seqlens=cu_seqlens)
    padded = model(padded_tokens, padded_layout)
    assert packed.isfinite().all() and padded.isfinite().all()
    (packed.square().mean() + padded.square().mean()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(packed[0, :9], padded[1, :9])
    torch.testing.assert_close(packed[0, 9:23], padded[4, :14])


def test_left_padding_changes_nothing() -> None:
    model = make_blt()
    tokens = make_tokens(1, 30)
    layout = PatchLayout.from_lengths(torch.tensor([[1, 4, 6, 3, 9, 7]]))
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, 10 + layout.offsets[0, :-1]] = True
    padded_layout = PatchLayout.from_starts(starts, capacity=8)
    padded = model(F.pad(tokens, (10, 0)), padded_layout)
    torch.testing.assert_close(padded[:, 10:], model(tokens, layout))


def test_a_byte_changes_no_earlier_logits() -> None:
    """Through n-grams, pooling, patches and patching itself: the decision about a byte is made before it."""
    model = make_blt()
    tokens = make_tokens(1, 40)
    logits = model(tokens, segment(make_entropies(tokens), 5.0))
    for j in range(1, 40):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 50) % 256 + 4
        other = model(changed, segment(make_entropies(changed), 5.0))
        torch.testing.assert_close(other[:, :j], logits[:, :j])
        assert (other[:, j] - logits[:, j]).abs().max() > 1e-6


def test_a_prefix_gives_the_prefix_of_the_logits() -> None:
    model = make_blt()
    tokens = make_tokens(1, 40)
    logits = model(tokens, segment(make_entropies(tokens), 5.0))
    for n in range(1, 40):
        prefix = tokens[:, :n]
        got = model(prefix, segment(make_entropies(prefix), 5.0).trim())
        torch.testing.assert_close(got, logits[:, :n])


def fill(model: BLT) -> None:
    """Parameters made by a formula, in the order of their names."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = torch.sin(index**2 * 0.37 + i).view(parameter.shape)
            parameter.copy_(1 + wave / 4 if "norm" in name else wave / 3)


def test_published_model() -> None:
    """Logits of BltForCausalLM of transformers 5.23.0, fp64, eager attention, with these parameters and patch lengths.

    The shape has what can go wrong: a window shorter than the text, K*d != D, two decoder layers, long patches.
    """
    local = TransformerConfig(16, 1, 2, 24, window=8)
    config = BLTConfig(
        local,
        TransformerConfig(24, 2, 2, 32),
        dataclasses.replace(local, num_layers=2),
        ngram_sizes=(3, 4, 5),
        hash_rows=50,
    )
    model = BLT(config).double()
    fill(model)
    tokens = (torch.arange(60) ** 2 * 7 % 256 + 4)[None]
    tokens[0, 0] = 1
    layout = PatchLayout.from_lengths(torch.tensor([[1, 1, 4, 7, 3, 1, 1, 9, 6, 2, 11, 5, 9]]))
    logits = model(tokens, layout)
    published = {
        0: [-1.50817, -0.39694, 0.94525, -0.3865, 0.8287],
        1: [-1.09847, 0.71514, 0.95146, -0.78519, -0.53456],
        2: [-0.04541, -1.24831, -0.34822, -0.75733, 1.02089],
        13: [-0.08991, 0.79755, 1.4882, -0.62966, 0.68133],
        30: [-1.51344, 0.59942, -0.04344, -0.94783, 0.35937],
        59: [-2.04557, 0.18334, 0.23572, 0.77634, 0.32986],
    }
    for byte, values in published.items():
        torch.testing.assert_close(logits[0, byte, ::60], torch.tensor(values), rtol=0, atol=2e-5)
    assert logits.norm().item() == pytest.approx(119.8644, abs=1e-3)


def test_double_residual() -> None:
    """out = 2x + wo(attention), in encoder and decoder, as the published weights need it."""
    model = make_blt()
    for cross in (*model.local_encoder.cross_attn_layers, *model.local_decoder.cross_attn_layers):
        torch.nn.init.zeros_(cross.o_proj.weight)
    tokens, layout = make_batch(1, 20)
    x = model.embed(tokens)
    sequences = Sequences(torch.ones(1, 20, dtype=torch.int64))
    states, patches = model.local_encoder(x, layout, sequences)
    plan = plan_attention(SMALL.encoder, x, sequences)
    for layer in model.local_encoder.layers:
        x = layer(x, plan)
    torch.testing.assert_close(states, x)
    lengths = layout.lengths()[0].tolist()
    pooled = torch.stack([part.amax(0) for part in x[0].split(lengths)])[None]
    torch.testing.assert_close(patches, 2 * model.local_encoder.patch_embedding_projection(pooled))
    for layer in model.local_decoder.layers:
        x = layer(2 * x, plan)
    latent = torch.randn(1, layout.capacity, SMALL.latent.dim, dtype=torch.float64)
    torch.testing.assert_close(model.local_decoder(states, latent, layout, sequences), model.local_decoder.norm(x))


def test_gradients_reach_every_parameter() -> None:
    model = make_blt(dataclasses.replace(SMALL, hash_dim=5, sparse_grad=True), torch.float32)
    tokens, layout = make_batch(2, 64)
    model.loss(tokens, tokens.roll(-1, 1), layout).mean.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.is_sparse == (name == "encoder_hash_tok_embedding.weight")
        dense = parameter.grad.to_dense()
        assert dense.isfinite().all() and dense.abs().max() > 0, name


def test_tables_start_at_zero_and_learn() -> None:
    model = BLT(SMALL)
    tokens, layout = make_batch(1, 40)
    assert not model.encoder_hash_tok_embedding.weight.any()
    model.loss(tokens, tokens.roll(-1, 1), layout).mean.backward()
    assert model.encoder_hash_tok_embedding.weight.grad.any()


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_reference_backend_gives_the_same_loss_and_gradients(sparse_grad: bool) -> None:
    model = make_blt(dataclasses.replace(SMALL, sparse_grad=sparse_grad), torch.float32)
    rows = [make_tokens(1, n)[0] for n in SEQUENCES]
    for tokens, layout, cu_seqlens in packed_and_padded(rows):
        results = []
        for backend in ("cpu", "reference"):
            model.zero_grad()
            with use_backend(backend):
                loss = model.loss(tokens, tokens.roll(-1, 1), layout, cu_seqlens=cu_seqlens).mean
                loss.backward()
            results.append([loss.detach(), *(p.grad.to_dense() for p in model.parameters())])
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_bf16_autocast() -> None:
    model = make_blt(dtype=torch.float32)
    tokens, layout = make_batch(2, 64)
    exact = model.loss(tokens, tokens.roll(-1, 1), layout).mean
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, layout)
        loss = next_byte_loss(logits, tokens.roll(-1, 1)).mean
    loss.backward()
    assert logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_once_for_any_raggedness(packed: bool) -> None:
    local, latent = TransformerConfig(16, 1, 2, 24, window=6), TransformerConfig(24, 1, 2, 32)
    model = make_blt(dataclasses.replace(SMALL, encoder=local, latent=latent, decoder=local), torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with assert_no_recompile():
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            tokens = make_tokens(1 if packed else 2, 48)
            starts = torch.rand(tokens.shape, generator=generator) < 0.2
            starts[:, 0] = True
            inner = torch.randint(0, 49, (3,), generator=generator).sort().values
            cu_seqlens = F.pad(F.pad(inner, (1, 0)), (0, 1), value=48) if packed else None
            layout = PatchLayout.from_starts(starts, capacity=24, cu_seqlens=cu_seqlens)
            model.zero_grad()
            logits = compiled(tokens, layout, cu_seqlens=cu_seqlens)
            logits.square().mean().backward()
            gradients = [p.grad for p in model.parameters()]
            model.zero_grad()
            expected = model(tokens, layout, cu_seqlens=cu_seqlens)
            expected.square().mean().backward()
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            for got, parameter in zip(gradients, model.parameters(), strict=True):
                torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-6)


def make_optimizers(model: BLT) -> list[torch.optim.Optimizer]:
    """SparseAdam for the tables, and AdamW for the rest."""
    tables = [model.encoder_hash_tok_embedding.weight]
    dense = [p for p in model.parameters() if p is not tables[0]]
    return [torch.optim.AdamW(dense, lr=1e-2), torch.optim.SparseAdam(tables, lr=1e-2)]


@pytest.mark.parametrize("options", [{}, {"dynamic": True, "backend": "aot_eager"}], ids=["default", "dynamic"])
def test_compiled_training_is_eager_training(options: dict) -> None:
    """With the default backend and sparse gradients of the tables, as a user has them who changes no default."""
    local, latent = TransformerConfig(16, 1, 2, 24), TransformerConfig(24, 1, 2, 32)
    config = dataclasses.replace(SMALL, encoder=local, latent=latent, decoder=local, sparse_grad=True)
    models = [make_blt(config, torch.float32) for _ in range(2)]
    optimizers = [make_optimizers(model) for model in models]
    forward = torch.compile(models[0].forward, fullgraph=True, **options)
    for _ in range(3):
        tokens, layout = make_tokens(2, 48), PatchLayout.from_lengths(random_lengths(48, 4.5, 2))
        layout = layout.trim(multiple_of=24)
        losses, targets = [], tokens.roll(-1, 1)
        for model, run, optimizer in zip(models, (forward, models[1]), optimizers, strict=True):
            for part in optimizer:
                part.zero_grad()
            losses.append(next_byte_loss(run(tokens, layout), targets).mean)
            losses[-1].backward()
            gradient = model.encoder_hash_tok_embedding.weight.grad
            assert gradient.is_sparse and gradient.is_coalesced()
            for part in optimizer:
                part.step()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for compiled, eager in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-4)


def test_learns() -> None:
    """A repeated text is soon learnt, with the tables under SparseAdam and the rest under AdamW."""
    model = BLT(dataclasses.replace(SMALL, sparse_grad=True))
    optimizers = make_optimizers(model)
    text = torch.tensor(list(b"the cat sat on the mat and the dog sat on the log. " * 4)) + 4
    tokens = torch.cat([torch.tensor([1]), text])[None]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    layout = segment(make_entropies(inputs), 5.0).trim()
    for _ in range(40):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model.loss(inputs, targets, layout).mean
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss < 0.5


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_loss_counts_what_it_should() -> None:
    logits = torch.randn(2, 5, 260, dtype=torch.bfloat16)
    targets = torch.randint(0, 260, (2, 5), dtype=torch.int32)
    targets[1, 2:] = -100
    loss = next_byte_loss(logits, targets)
    log_p = logits.float().log_softmax(-1)
    expected = -sum(log_p[b, i, targets[b, i]] for b, i in (targets >= 0).nonzero().tolist())
    assert loss.num_targets == 7
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.mean, expected / 7)
    text = -sum(log_p[b, i, targets[b, i]] for b, i in (targets >= 4).nonzero().tolist())
    torch.testing.assert_close(loss.text_total, text)
    nothing = next_byte_loss(logits, torch.full((2, 5), -100))
    assert nothing.num_targets == 0 and nothing.mean == 0


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(256) * 3, 3) == pytest.approx(8)
    with pytest.raises(ValueError, match="bits_per_byte: num_bytes: expected at least one byte of text, got 0"):
        bits_per_byte(1.0, 0)


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        (torch.tensor([[3, 260]]), ValueError, r"targets: expected values in 0 .. 259, or -100, got 260"),
        (torch.tensor([[3, -1]]), ValueError, r"targets: expected values in 0 .. 259, or -100, got -1"),
        (torch.tensor([[3.0, 1.0]]), TypeError, "targets: expected dtype int32 or int64, got float32"),
        (torch.tensor([[3, 1, 2]]), ValueError, r"targets: expected shape \(1, 2\), got shape \(1, 3\)"),
        (torch.tensor([3, 1]), ValueError, "targets: expected 2 dimensions"),
        (torch.zeros(1, 2, dtype=int, device="meta"), ValueError, "targets: expected device cpu"),
    ],
)
def test_loss_errors(targets: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match="next_byte_loss: " + words):
        next_byte_loss(torch.zeros(1, 2, 260), targets)


# ---- capacity --------------------------------------------------------------------------------------------------------


def latent_flops(model: BLT, tokens: torch.Tensor, layout: PatchLayout, **kwargs) -> int:
    """Matrix-product FLOPs of the latent transformer in one training step."""
    model.zero_grad()
    counter = count_flops(lambda: model.loss(tokens, tokens, layout, **kwargs).mean.backward())
    return sum(counter.get_flop_counts()["BLT.global_transformer"].values())


def test_latent_flops_are_those_of_the_used_patches() -> None:
    """Rows of a constant number of patches (a) waste nothing; trim(multiple_of=128) (c) less than a tenth;
    a capacity of 1.25 * N / patch_size, rounded up to 128, (b) as much more as that says."""
    local = TransformerConfig(16, 1, 2, 24, window=64)
    latent = TransformerConfig(128, 1, 2, 1024)
    model = BLT(dataclasses.replace(SMALL, encoder=local, latent=latent, decoder=local))
    patch_size, num_patches = 4.5, 512

    # (a) Rows end where their patches do, and bytes are padded.
    lengths = random_lengths(4096, patch_size, batch=2)[:, :num_patches]
    num_bytes = int(1.3 * num_patches * patch_size)
    cut = PatchLayout.from_lengths(lengths, num_bytes, seq_lens=lengths.sum(1))
    assert (cut.lengths() > 0).all() and cut.num_bytes > lengths.sum(1).max()
    alone = sum(
        latent_flops(model, make_tokens(1, int(row.sum())), PatchLayout.from_lengths(row[None])) for row in lengths
    )
    assert latent_flops(model, make_tokens(2, num_bytes), cut) <= 1.1 * alone

    tokens, lengths = make_tokens(1, 8192), random_lengths(8192, patch_size)
    exact = PatchLayout.from_lengths(lengths)
    assert exact.num_patches.item() == exact.capacity
    needed = latent_flops(model, tokens, exact)
    starts = torch.zeros(1, 8192, dtype=torch.bool)
    starts[0, exact.offsets[0, :-1]] = True
    assert latent_flops(model, tokens, PatchLayout.from_starts(starts).trim(multiple_of=128)) <= 1.1 * needed
    inside = PatchLayout.from_starts(starts, capacity=2304)  # 1.25 * 8192 / 4.5 = 2275.6
    assert not inside.overflow.any()
    ratio = inside.capacity / exact.capacity
    assert ratio < 1.35 and latent_flops(model, tokens, inside) <= ratio**2 * needed


def test_refuses_a_slot_for_every_byte() -> None:
    model = make_blt()
    tokens = make_tokens(1, 300)
    layout = segment(make_entropies(tokens), 9.0)
    assert 2 < layout.num_patches < 100
    with pytest.raises(
        ValueError, match=r"layout.capacity: expected at most 128 slots for rows of at most .*layout.trim\(\).*got 300"
    ):
        model(tokens, layout)
    model(tokens, layout.trim())
    assert model(tokens[:0], segment(torch.zeros(0, 300), 9.0)).shape == (0, 300, 260)


@pytest.mark.parametrize("patch_size", [1, 1.3])
def test_takes_a_slot_for_every_byte_where_patches_need_them(patch_size: float) -> None:
    model = make_blt()
    tokens = make_tokens(1, 300)
    starts = torch.zeros(1, 300, dtype=torch.bool)
    starts[0, (torch.arange(int(300 / patch_size)) * patch_size).long()] = True
    layout = PatchLayout.from_starts(starts)
    torch.testing.assert_close(model(tokens, layout), model(tokens, layout.trim()))


def test_takes_a_slot_for_every_byte_of_a_row_that_is_not_full() -> None:
    """As the last batch of a loader has it, with patches of single bytes."""
    lengths = torch.ones(1, 300, dtype=torch.int64)
    lengths[0, 100:] = 0
    cu_seqlens = torch.tensor([0, 60, 100])
    layout = PatchLayout.from_lengths(lengths, 300, cu_seqlens=cu_seqlens)
    assert make_blt()(make_tokens(1, 300), layout, cu_seqlens=cu_seqlens).shape == (1, 300, 260)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokens": torch.zeros(1, 20)}, TypeError, "tokens: expected dtype int32 or int64, got float32"),
        ({"tokens": torch.zeros(20, dtype=torch.int64)}, ValueError, "tokens: expected 2 dimensions"),
        ({"tokens": torch.zeros(1, 21, dtype=torch.int64)}, ValueError, r"patch_ids: expected shape \(1, 21\)"),
        ({"layout": None}, TypeError, "layout: expected a PatchLayout, got NoneType"),
        ({"cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens: expected dtype int32 or int64"),
        ({"cu_seqlens": [0, 20]}, TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
        (
            {"cu_seqlens": torch.tensor([0, 21])},
            ValueError,
            "cu_seqlens: expected values that rise from 0 to at most 20",
        ),
        ({"cu_seqlens": torch.tensor([1, 20])}, ValueError, "cu_seqlens: expected values that rise from 0"),
        ({"tokens": torch.full((1, 20), 260)}, ValueError, r"tokens: expected values in 0 .. 259, got 260"),
        ({"tokens": torch.full((1, 20), -1)}, ValueError, r"tokens: expected values in 0 .. 259, got -1"),
    ],
)
def test_forward_errors(change: dict, error: type[Exception], words: str) -> None:
    tokens, layout = make_batch(1, 20)
    with pytest.raises(error, match=words):
        make_blt()(**({"tokens": tokens, "layout": layout} | change))


def test_packing_needs_one_row() -> None:
    tokens, layout = make_batch(2, 20)
    with pytest.raises(ValueError, match=r"BLT: tokens: expected one row \(B = 1\) with cu_seqlens, got B = 2"):
        make_blt()(tokens, layout, cu_seqlens=torch.tensor([0, 20]))


def test_blt_refuses_sequences_that_the_layout_does_not_have():
    model = BLT(BLTConfig.preset("tiny"))
    tokens, cu_seqlens = torch.randint(4, 260, (1, 40)), torch.tensor([0, 20, 40])
    layout = segment_fixed(tokens, 4, cu_seqlens=cu_seqlens).trim()
    model(tokens, layout, cu_seqlens=cu_seqlens)
    with pytest.raises(
        ValueError, match="cu_seqlens: expected the 2 sequences that the layout was made with, got none"
    ):
        model(tokens, layout)
    with pytest.raises(ValueError, match="expected the 2 sequences that the layout was made with, got 3"):
        model(tokens, layout, cu_seqlens=torch.tensor([0, 7, 13, 40]))


def test_entropy_model_refuses_packed_rows_of_a_batch():
    model = EntropyModel(EntropyModelConfig.preset("tiny"))
    with pytest.raises(ValueError, match=r"EntropyModel: tokens: expected one row \(B = 1\) with cu_seqlens"):
        model.entropies(torch.randint(4, 260, (2, 8)), cu_seqlens=torch.tensor([0, 4, 8]))


@pytest.mark.parametrize(
    ("made_with", "given"),
    [
        ([0, 20, 40], [0, 13, 40]),
        ([0, 20, 40], [0, 20, 39]),
        ([0, 0, 40], [0, 40, 40]),
        ([0, 40, 40], [0, 0, 40]),
        ([0, 9, 9, 30], [0, 9, 12, 30]),
    ],
)
def test_blt_takes_the_sequences_of_its_layout_alone(made_with, given):
    model, tokens, made_with = make_blt(), make_tokens(1, 40), torch.tensor(made_with, dtype=torch.int32)
    layout = segment_fixed(tokens, 4, cu_seqlens=made_with).trim()
    model(tokens, layout, cu_seqlens=made_with)
    with pytest.raises(ValueError, match="cu_seqlens: expected the sequences that the layout was made with, which"):
        model(tokens, layout, cu_seqlens=torch.tensor(given))


def test_sequences_may_go_on_after_the_last_patch():
    """Lengths that cover less than the row leave the last bytes in no patch, and the layout does not know them."""
    tokens, cu_seqlens = make_tokens(1, 40), torch.tensor([0, 10, 25, 40])
    for lengths in ([[4, 6, 15, 5]], [[4, 6, 7]], [[10]]):
        layout = PatchLayout.from_lengths(torch.tensor(lengths), 40, cu_seqlens=cu_seqlens)
        assert make_blt()(tokens, layout, cu_seqlens=cu_seqlens).isfinite().all()


@pytest.mark.parametrize("cu_seqlens", [[60, 40], [0, 60, 30], [0, 70], [0, -1], [5, 60]])
def test_entropy_model_refuses_what_the_ops_refuse(cu_seqlens):
    model, tokens = EntropyModel(SMALL_ENTROPY), make_tokens(1, 60)
    with pytest.raises(ValueError, match="EntropyModel: cu_seqlens: expected values that rise from 0 to at most 60"):
        model.entropies(tokens, cu_seqlens=torch.tensor(cu_seqlens))
    with pytest.raises((ValueError, RuntimeError), match="cu_seqlens: expected"):
        segment_fixed(tokens, 4, cu_seqlens=torch.tensor(cu_seqlens))


@pytest.mark.parametrize("token", [-1, 260])
def test_entropy_model_refuses_tokens_outside_the_vocabulary(token):
    with pytest.raises(ValueError, match=f"EntropyModel: tokens: expected values in 0 .. 259, got {token}"):
        EntropyModel(SMALL_ENTROPY)(torch.full((1, 4), token))


# ---- without values --------------------------------------------------------------------------------------------------


def train_without_values(device: str) -> None:
    """A training step of both models on tensors that have shapes alone."""
    model, entropy_model = BLT(dataclasses.replace(SMALL, sparse_grad=True)), EntropyModel(NGRAM_LAYERS_ENTROPY)
    for batch in (2, 1):
        tokens = torch.zeros(batch, 200, dtype=torch.int64, device=device)
        cu_seqlens = torch.zeros(4, dtype=torch.int32, device=device) if batch == 1 else None
        entropies = entropy_model.entropies(tokens, cu_seqlens=cu_seqlens)
        assert entropies.shape == (batch, 200) and entropies.dtype == torch.float32
        entropy_model.loss(tokens, tokens, cu_seqlens=cu_seqlens).mean.backward()
        lengths = torch.ones(batch, 50, dtype=torch.int64, device=device)
        for layout in (
            segment(entropies, 1.0, cu_seqlens=cu_seqlens, capacity=50),
            segment_spaces(tokens, cu_seqlens=cu_seqlens, capacity=50),
            PatchLayout.from_lengths(lengths, 200, cu_seqlens=cu_seqlens),
            segment_fixed(tokens, 4, cu_seqlens=cu_seqlens),  # a slot for every byte: nobody can say how many are used
        ):
            assert model(tokens, layout, cu_seqlens=cu_seqlens).shape == (batch, 200, 260)
            model.loss(tokens, tokens, layout, cu_seqlens=cu_seqlens).mean.backward()
    assert all(p.grad.shape == p.shape for p in (*model.parameters(), *entropy_model.parameters()))


def test_meta_tensors() -> None:
    with torch.device("meta"):
        train_without_values("meta")


def test_fake_tensors() -> None:
    with FakeTensorMode():
        train_without_values("cpu")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_checks_leave_alone_what_has_no_values_to_read() -> None:
    """Values that vmap batches, that make_fx traces, and that a FakeTensorMode stands for."""
    model, entropy_model = make_blt(dtype=torch.float32), EntropyModel(SMALL_ENTROPY)
    tokens = make_tokens(2, 200)

    def run(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # The layout has a slot for every byte, whose number of patches is looked at too.
        layout = segment_fixed(tokens, 1)
        return entropy_model.entropies(tokens), model(tokens, layout), model.loss(tokens, tokens, layout).total

    rows = [run(row[None]) for row in tokens]
    expected = tuple(map(torch.stack, zip(*rows, strict=True)))
    torch.testing.assert_close(torch.func.vmap(lambda row: run(row[None]))(tokens), expected)
    torch.testing.assert_close(make_fx(run)(tokens)(tokens), run(tokens))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert [out.shape for out in run(tokens)] == [(2, 200), (2, 200, 260), ()]


def test_meta_models_become_real_ones() -> None:
    with torch.device("meta"):
        model = BLT(dataclasses.replace(SMALL, sparse_grad=True))
    tokens, layout = make_batch(1, 40)
    model = model.to_empty(device="cpu")
    model.load_state_dict(make_blt(dtype=torch.float32).state_dict())
    torch.testing.assert_close(model(tokens, layout), make_blt(dtype=torch.float32)(tokens, layout))
    model.loss(tokens, tokens, layout).mean.backward()
    assert model.encoder_hash_tok_embedding.weight.grad.is_coalesced()
