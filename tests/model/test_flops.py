"""FLOPs per byte: against the paper's published figures and equations, the masks of attention, and torch's counter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import count_flops, make_layout, random_lengths
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blt_kernels import PatchLayout, decoder_cross_attention, encoder_cross_attention, linear_entropy
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.model.flops import COUNTS, Ledger, blt_flops, entropy_model_flops, equal_token_width, token_flops
from blt_kernels.model.transformer import Sequences, plan_attention

SMALL = BLTConfig(
    encoder=TransformerConfig(32, 1, 2, 88, window=16),
    latent=TransformerConfig(48, 3, 2, 128),
    decoder=TransformerConfig(32, 2, 2, 88, window=16),
    ngram_sizes=(2, 3),
    hash_rows=31,
    sparse_grad=False,
)
SMALL_ENTROPY = EntropyModelConfig(TransformerConfig(32, 2, 2, 88, window=16))


def counted(fn: Callable[[], Any]) -> int:
    return count_flops(fn).get_total_flops()


def cross_attention(ledger: Ledger) -> float:
    """The cross-attentions without their projections, of which our backward has 5 products and not 4."""
    return sum(flops for name, flops in ledger.components.items() if name.endswith("cross-attention"))


# ---- the paper -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "layers", "published"), [(1280, 24, 3.1e8), (3072, 32, 2.1e9)])
def test_token_models_of_the_paper(dim: int, layers: int, published: float) -> None:
    """The two columns of the fixed-inference comparison: Llama 2's tokens, 8192 bytes of context."""
    config = TransformerConfig(dim, layers, dim // 64, 4 * dim)
    assert token_flops(config, 32000, 3.7, context_bytes=8192, count="paper").forward == pytest.approx(
        published, rel=0.02
    )


def paper_equations(config: BLTConfig, patch: float, context: int) -> float:
    """Section 4.5 and the appendix as they stand there: per query, r keys a query."""

    def attention(h: int, layers: int, m: float) -> float:
        return 4 * layers * h * (m + 1) / 2

    def qkvo(h: int, layers: int, r: float) -> float:
        return (r * 2 + 2) * 2 * layers * h**2

    def transformer(h: int, layers: int, m: float, vocab: int) -> float:
        return attention(h, layers, m) + qkvo(h, layers, 1) + 2 * 2 * layers * h * 4 * h + 2 * h * vocab

    def cross(h: int, layers: int, p: float, r: float) -> float:
        return attention(h, layers, p) + qkvo(h, layers, r)

    e, g, d, k = config.encoder, config.latent, config.decoder, config.slots_per_patch
    assert e.window is not None and d.window is not None
    return (
        transformer(g.dim, g.num_layers, context / patch, 0) / patch
        + transformer(e.dim, e.num_layers, e.window, 0)
        + transformer(d.dim, d.num_layers, d.window, 256)
        + cross(e.dim, e.num_layers, patch, patch / k) * k / patch
        + cross(d.dim, d.num_layers, k, k / patch)
    )


@pytest.mark.parametrize("preset", ["400M", "1B", "7B"])
def test_paper_count_is_the_paper_s_equation(preset: str) -> None:
    config = BLTConfig.preset(preset)
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, num_layers=2))
    for patch_size in (4.5, 8):
        ledger = blt_flops(config, patch_size, context_bytes=8192, count="paper")
        assert ledger.forward == pytest.approx(paper_equations(config, patch_size, 8192), rel=1e-12)
        assert ledger.training == pytest.approx(3 * ledger.forward, rel=1e-12)


def test_paper_count_leaves_the_entropy_model_out() -> None:
    config, entropy_model = BLTConfig.preset("1B"), EntropyModelConfig.preset("100M")
    without = blt_flops(config, 4.5, context_bytes=8192, count="paper")
    assert blt_flops(config, 4.5, context_bytes=8192, entropy_model=entropy_model, count="paper") == without
    extra = entropy_model_flops(entropy_model, context_bytes=8192).forward
    assert 0.20e9 < extra < 0.23e9 and 0.2 < extra / without.forward < 0.25


# ---- the inclusive count ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "length"), [(None, 40), (8, 40), (7, 44), (40, 40), (64, 40), (1, 12), (2, 12)])
def test_inclusive_attention_is_what_the_mask_lets_through(window: int | None, length: int) -> None:
    config = TransformerConfig(32, 3, 2, 64, window=window)
    plan = plan_attention(config, torch.zeros(1, length, 32), Sequences(torch.zeros(1, length, dtype=torch.int64)))
    assert plan.mask is not None and (not plan.block or length % plan.block == 0)
    ledger = token_flops(config, 10, 1, context_bytes=length)
    assert ledger.components["attention"] * length == pytest.approx(3 * 4 * 32 * int(plan.mask.sum()), rel=1e-12)


def test_inclusive_differs_from_the_counter_in_attention_alone() -> None:
    kwargs: dict[str, Any] = {"context_bytes": 100, "entropy_model": SMALL_ENTROPY}
    inclusive, counter = (blt_flops(SMALL, 5, count=count, **kwargs) for count in ("inclusive", "counter"))
    assert inclusive.components.keys() == counter.components.keys()
    differing = {name for name, flops in inclusive.components.items() if flops != counter.components[name]}
    assert differing == {"encoder attention", "latent attention", "decoder attention", "entropy model"}


def test_a_frozen_entropy_model_costs_its_forward_pass() -> None:
    alone = blt_flops(SMALL, 4.5, context_bytes=500)
    ledger = blt_flops(SMALL, 4.5, context_bytes=500, entropy_model=SMALL_ENTROPY)
    extra = entropy_model_flops(SMALL_ENTROPY, context_bytes=500).forward
    assert ledger.components == {**alone.components, "entropy model": extra}
    assert ledger.forward == pytest.approx(alone.forward + extra)
    assert ledger.training == pytest.approx(3 * alone.forward + extra)
    assert entropy_model_flops(SMALL_ENTROPY, context_bytes=500).training == pytest.approx(3 * extra)


def test_an_entropy_model_without_layers_costs_its_head() -> None:
    """Tables are lookups: 2 * 64 * 260 FLOPs a byte by every count, where the published model needs 0.22 G."""
    for count in COUNTS:
        ledger = entropy_model_flops(EntropyModelConfig.preset("ngram"), context_bytes=8192, count=count)
        assert ledger.forward == 2 * 64 * 260


def test_equal_token_width_is_the_inverse() -> None:
    config = TransformerConfig(768, 12, 12, 2048)  # 8/3 of the width: one count
    for count in ("paper", "inclusive"):
        flops = token_flops(config, 32000, 4.4, context_bytes=4096, count=count).forward
        assert equal_token_width(flops, 12, 32000, 4.4, context_bytes=4096) == pytest.approx(768)


# ---- torch's counter -------------------------------------------------------------------------------------------------


def even_layout(batch: int, num_bytes: int, capacity: int) -> PatchLayout:
    lengths = torch.full((batch, capacity), num_bytes // capacity)
    lengths[:, -1] += num_bytes - lengths.sum(1)
    return make_layout(lengths)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hash_dim": 8},  # hash projection
        {"latent": TransformerConfig(64, 2, 2, 128)},  # no projection into the latent width: 2 * 32
        {"slots_per_patch": 3, "ngram_sizes": (), "encoder": TransformerConfig(32, 2, 2, 88)},
        {"decoder": TransformerConfig(32, 3, 2, 80, window=13)},  # blocks of 7, the last one padded
        {
            "encoder": TransformerConfig(32, 1, 4, 88, window=16, num_kv_heads=2),
            "latent": TransformerConfig(48, 3, 6, 128, num_kv_heads=2),
            "decoder": TransformerConfig(32, 2, 4, 88, window=16, num_kv_heads=1),
        },
    ],
    ids=["small", "hash_dim", "equal_width", "no_window", "odd_window", "grouped_heads"],
)
@pytest.mark.parametrize(("batch", "num_bytes", "capacity"), [(2, 100, 25), (1, 97, 41)])
def test_blt_agrees_with_the_counter(change: dict[str, Any], batch: int, num_bytes: int, capacity: int) -> None:
    config = dataclasses.replace(SMALL, **change)
    model, tokens = BLT(config), torch.randint(4, 260, (batch, num_bytes))
    layout = even_layout(batch, num_bytes, capacity)
    ledger = blt_flops(config, num_bytes / capacity, context_bytes=num_bytes, count="counter")
    assert counted(lambda: model(tokens, layout)) / tokens.numel() == pytest.approx(ledger.forward, rel=1e-9)
    training = ledger.training + cross_attention(ledger) / 2
    assert training == pytest.approx(ledger.training, rel=0.01)
    step = counted(lambda: model.loss(tokens, tokens, layout).mean.backward())
    assert step / tokens.numel() == pytest.approx(training, rel=1e-9)


def test_empty_slots_count_as_bytes_per_slot() -> None:
    lengths = random_lengths(120, 4.5)
    layout = make_layout(torch.nn.functional.pad(lengths, (0, 9)))
    ledger = blt_flops(SMALL, 120 / layout.capacity, context_bytes=120, count="counter")
    tokens = torch.randint(4, 260, (1, 120))
    assert counted(lambda: BLT(SMALL)(tokens, layout)) / 120 == pytest.approx(ledger.forward, rel=1e-9)


@pytest.mark.parametrize("ngram_sizes", [(), (2, 3)])
@pytest.mark.parametrize(("layers", "window"), [(2, None), (2, 16), (2, 7), (2, 200), (0, None)])
def test_entropy_model_agrees_with_the_counter(layers: int, window: int | None, ngram_sizes: tuple[int, ...]) -> None:
    shape = dataclasses.replace(SMALL_ENTROPY.transformer, num_layers=layers, window=window)
    config = EntropyModelConfig(shape, ngram_sizes=ngram_sizes, hash_rows=31)
    model, tokens = EntropyModel(config), torch.randint(4, 260, (2, 90))
    ledger = entropy_model_flops(config, context_bytes=90, count="counter")
    for forward in (model, model.entropies):
        assert counted(lambda f=forward: f(tokens)) / tokens.numel() == pytest.approx(ledger.forward, rel=1e-9)
    step = counted(lambda: model.loss(tokens, tokens).mean.backward())
    assert step / tokens.numel() == pytest.approx(ledger.training, rel=1e-9)


def attention_operands(capacity: int, num_bytes: int, *, slots_first: bool) -> list[torch.Tensor]:
    """q [2, ., 4, 8] and k, v with 2 heads, of 3 slots a patch on one side and bytes on the other."""
    rows = (3 * capacity, num_bytes) if slots_first else (num_bytes, 3 * capacity)
    shapes = ((2, rows[0], 4, 8), (2, rows[1], 2, 8), (2, rows[1], 2, 8))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("op", [encoder_cross_attention, decoder_cross_attention])
def test_cross_attention_ops(op: Callable[..., torch.Tensor]) -> None:
    layout = even_layout(2, 50, 10)
    operands = attention_operands(10, 50, slots_first=op is encoder_cross_attention)
    # A byte meets 3 slots of one patch: per head and pair of query and key, a product is 8 multiplications.
    product = 2 * 8 * 4 * (2 * 50 * 3)
    assert counted(lambda: op(*operands, layout)) == 2 * product
    assert counted(lambda: op(*operands, layout, scale=0.5, window=3)) == 3 * 2 * product
    assert counted(lambda: op(*operands, layout, window=99)) == 10 * 2 * product  # no more patches than there are
    for needed, products in (((0, 1, 2), 5), ((0,), 3), ((2,), 2)):
        for i, x in enumerate(operands):
            x.requires_grad_(i in needed)
        assert counted(lambda: op(*operands, layout).sum().backward()) == (2 + products) * product
    empty = PatchLayout.from_lengths(torch.zeros(2, 0, dtype=torch.int64), 50)
    rest = attention_operands(0, 50, slots_first=op is encoder_cross_attention)
    assert counted(lambda: op(*rest, empty)) == 0


def test_linear_entropy() -> None:
    hidden, weight = torch.randn(2, 9, 16, requires_grad=True), torch.randn(260, 16, requires_grad=True)
    product = 2 * 2 * 9 * 16 * 260
    assert counted(lambda: linear_entropy(hidden, weight)) == product
    assert counted(lambda: linear_entropy(hidden, weight).sum().backward()) == 4 * product
    assert counted(lambda: linear_entropy(hidden, weight.detach()).sum().backward()) == 3 * product


def test_fake_tensors_are_counted() -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        linear_entropy(torch.empty(3, 7, 16), torch.empty(260, 16))
    assert counter.get_total_flops() == 2 * 3 * 7 * 16 * 260


# ---- errors ----------------------------------------------------------------------------------------------------------

TRANSFORMER = SMALL.latent


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: blt_flops(TRANSFORMER, 4.5, context_bytes=9), TypeError, "blt_flops: config: expected BLTConfig"),
        (lambda: blt_flops(SMALL, 0.5, context_bytes=9), ValueError, "patch_size: .* at least 1, got 0.5"),
        (lambda: blt_flops(SMALL, float("nan"), context_bytes=9), ValueError, "patch_size: .*, got nan"),
        (lambda: blt_flops(SMALL, 4.5, context_bytes=4), ValueError, "context_bytes: .* at least 4.5, got 4"),
        (lambda: blt_flops(SMALL, "4", context_bytes=9), TypeError, "patch_size: expected a number, got str"),
        (lambda: blt_flops(SMALL, 4, context_bytes=9, count="all"), ValueError, "count: expected one of 'paper'"),
        (lambda: blt_flops(SMALL, 4, context_bytes=9, entropy_model=SMALL), TypeError, "EntropyModelConfig, got BLT"),
        (
            lambda: token_flops(SMALL, 9, 1, context_bytes=9),
            TypeError,
            "token_flops: config: expected TransformerConfig",
        ),
        (lambda: token_flops(TRANSFORMER, 0, 1, context_bytes=9), ValueError, "vocab_size: expected at least 1, got 0"),
        (lambda: token_flops(TRANSFORMER, 9, 0, context_bytes=9), ValueError, "bytes_per_token"),
        (lambda: entropy_model_flops(SMALL, context_bytes=9), TypeError, "entropy_model_flops: config"),
        (lambda: equal_token_width(-1, 2, 9, 1, context_bytes=9), ValueError, "flops_per_byte: .* 0, got -1"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_counts() -> None:
    forward = {c: blt_flops(SMALL, 4.5, context_bytes=500, count=c).forward for c in COUNTS}
    assert forward["paper"] < forward["inclusive"] < forward["counter"]
