"""Attention within the sequences of a packed row: each way to compute it against the dense mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from blt_kernels.layout import PatchLayout
from blt_kernels.model import (
    BLT,
    BLTConfig,
    EntropyModel,
    EntropyModelConfig,
    TransformerConfig,
    packed_attention,
    transformer,
)
from blt_kernels.model.packed_attention import MOST_SLOTS, Buckets, Varlen, call_varlen, plan_packed
from blt_kernels.model.transformer import Sequences, attend, plan_attention

SHORT_BESIDE_LONG = [*[1 + i % 7 for i in range(200)], 700]
ROWS = {
    "one": ([9], 9),
    "tail": ([5, 3, 8], 23),
    "empty sequences": ([0, 4, 0, 0, 7, 0], 11),
    "far more places than sequences": ([3, 5, *[0] * 500], 9),
    "one position": ([1], 1),
    "one sequence is the row": ([64], 64),
    "alike": ([16, 15, 16, 14, 3], 70),
    "short beside long": (SHORT_BESIDE_LONG, sum(SHORT_BESIDE_LONG) + 9),
}
CONFIG = TransformerConfig(32, 1, 2, 32)


def cu_of(sizes: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(sizes).cumsum(0), (1, 0)).int()


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """By the mask, which knows the tail as one more sequence; 0 there, as the others have it."""
    sequences = Sequences(Sequences.packed(cu_seqlens, q.shape[1], None).ids)
    y = attend(q, k, v, plan_attention(CONFIG, q.flatten(2), sequences))
    return y * (torch.arange(q.shape[1]) < cu_seqlens[-1])[:, None, None]


def with_gradients(
    attention: Callable[..., torch.Tensor], operands: tuple[torch.Tensor, ...], used: int
) -> list[torch.Tensor]:
    """The result, and the gradients of q, k and v for a gradient that is not 0 in the tail either."""
    leaves = [x.clone().requires_grad_() for x in operands]
    y = attention(*leaves)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weight).sum(), leaves)]


def faulty_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size):
    """varlen_attn as its kernels are: memory that was never written, in the tail, both ways."""
    assert window_size == (-1, 0) and cu_q is cu_k and cu_q.dtype == torch.int32
    assert max_q == max_k >= int(cu_q.diff().max())
    return _Faulty.apply(q, k, v, cu_q)


class _Faulty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, cu)
        return _Faulty.attention(q, k, v, cu)

    @staticmethod
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        y = dense(q[None], k[None], v[None], cu)[0]
        return torch.cat((y[: int(cu[-1])], torch.full_like(y[int(cu[-1]) :], torch.nan)))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        *operands, cu = ctx.saved_tensors
        used = int(cu[-1])
        with torch.enable_grad():
            leaves = [x.detach()[:used].requires_grad_() for x in operands]
            grads = torch.autograd.grad(_Faulty.attention(*leaves, cu), leaves, grad[:used])
        return (
            *(torch.cat((g, torch.full_like(x[used:], torch.nan))) for g, x in zip(grads, operands, strict=True)),
            None,
        )


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("how", ["buckets", "varlen"])
def test_packed_attention_equals_a_dense_mask(how: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, length = ROWS[name]
    cu_seqlens, used = cu_of(sizes), sum(sizes)
    operands = tuple(torch.randn(3, 1, length, 2, 16, dtype=torch.float64))
    if how == "buckets":
        plan: Buckets | Varlen | None = plan_packed(torch.zeros(1, length, 32), cu_seqlens, None, 16)
        assert isinstance(plan, Buckets)
    else:
        monkeypatch.setattr(packed_attention, "_varlen_attn", faulty_varlen)
        is_tail = torch.arange(length) >= used
        plan = Varlen(cu_seqlens, is_tail[:, None, None], max(sizes))
    got = with_gradients(plan.attend, operands, used)
    expected = with_gradients(lambda q, k, v: dense(q, k, v, cu_seqlens), operands, used)
    for a, b in zip(got, expected, strict=True):
        assert (a[:, used:] == 0).all()
        torch.testing.assert_close(a[:, :used], b[:, :used])


@pytest.mark.parametrize("name", ROWS)
def test_buckets_hold_little_padding(name: str) -> None:
    sizes, length = ROWS[name]
    buckets = Buckets.of(cu_of(sizes).tolist(), length)
    assert sum(sizes) <= buckets.num_slots <= MOST_SLOTS * sum(sizes)
    assert len(buckets.shapes) <= 12


def test_buckets_hold_little_padding_whatever_the_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scale = 2 ** int(torch.randint(0, 11, (), generator=generator))
        sizes = torch.randint(0, scale + 1, (60,), generator=generator).tolist()
        assert Buckets.of(cu_of(sizes).tolist(), sum(sizes)).num_slots <= MOST_SLOTS * sum(sizes)


def test_a_plan_without_values_is_the_dense_mask() -> None:
    """Under torch.compile the lengths are no numbers; on CUDA in fp32 no kernel takes them."""
    cu_seqlens = cu_of([5, 3])
    model = EntropyModel(EntropyModelConfig(CONFIG)).eval()
    tokens = torch.randint(4, 260, (1, 10))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, expected = (m(tokens, cu_seqlens=cu_seqlens, longest_sequence=8) for m in (compiled, model))
    torch.testing.assert_close(got[:, :8], expected[:, :8])
    assert plan_packed(torch.zeros(1, 10, 32, device="meta"), cu_seqlens, None, 16) is None
    assert plan_packed(torch.zeros(1, 10, 32), cu_of([0, 0]), None, 16) is None  # there is no sequence


@pytest.mark.parametrize("argument", ["is_causal", "window_size"])
def test_varlen_is_causal_in_every_version(argument: str) -> None:
    """torch 2.10 has a flag, later versions have a window, and neither has the other."""
    seen: dict[str, Any] = {}

    def flag(q, k, v, cu_q, cu_k, max_q, max_k, *, is_causal=False):
        seen.update(is_causal=is_causal)
        return q

    def window(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        seen.update(window_size=window_size)
        return q

    x = torch.zeros(4, 2, 16)
    call_varlen({"is_causal": flag, "window_size": window}[argument], x, x, x, cu_of([4]), 4)
    assert seen == {"is_causal": {"is_causal": True}, "window_size": {"window_size": (-1, 0)}}[argument]


def test_varlen_of_this_torch_has_one_of_the_two() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    assert {"is_causal", "window_size"} & inspect.signature(varlen).parameters.keys()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("slack", [0, 3])
def test_a_known_longest_sequence_bounds_the_mask(name: str, slack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there must be a mask, a window as long as the longest sequence replaces that of all pairs."""
    sizes, length = ROWS[name]
    cu_seqlens = cu_of(sizes)
    operands = tuple(torch.randn(3, 1, length, 2, 16, dtype=torch.float64))
    monkeypatch.setattr(transformer, "plan_packed", lambda *arguments: None)
    sequences = Sequences.packed(cu_seqlens, length, max(sizes) + slack)
    plan = plan_attention(CONFIG, operands[0].flatten(2), sequences)
    assert (plan.block > 0) == (1.5 * (max(sizes) + slack) < length)
    got = with_gradients(lambda q, k, v: attend(q, k, v, plan), operands, sum(sizes))
    # The tail sees only as far as the window reaches, and nothing reads it.
    expected = with_gradients(lambda q, k, v: dense(q, k, v, cu_seqlens), operands, sum(sizes))
    torch.testing.assert_close(got[0][:, : sum(sizes)], expected[0][:, : sum(sizes)])


def test_sequences_longer_than_promised_are_refused() -> None:
    model = EntropyModel(EntropyModelConfig(CONFIG)).eval()
    tokens = torch.randint(4, 260, (1, 10))
    with pytest.raises(ValueError, match=r"EntropyModel: longest_sequence: expected at least 5, as .* got 4"):
        model(tokens, cu_seqlens=cu_of([5, 3]), longest_sequence=4)
    with pytest.raises(ValueError, match=r"EntropyModel: longest_sequence: expected .*>= 1|at least 1"):
        model(tokens, cu_seqlens=cu_of([5, 3]), longest_sequence=0)
    layout = PatchLayout.from_lengths(torch.tensor([[2, 2, 1, 3]]), 10, cu_seqlens=cu_of([5, 3]))
    with pytest.raises(ValueError, match=r"BLT: longest_patches: expected at least 3, as .* got 2"):
        BLT(BLTConfig(CONFIG, CONFIG, CONFIG, hash_rows=7))(
            tokens, layout, cu_seqlens=cu_of([5, 3]), longest_sequence=5, longest_patches=2
        )
