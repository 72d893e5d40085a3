"""AdamW and SparseAdam under one schedule and one clipping norm."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blt_kernels.optim import clip_grad_norm
from blt_kernels.training.optim import OptimConfig, Optimizers


class Table(nn.Module):
    def __init__(self, sparse: bool = True):
        super().__init__()
        self.sparse = sparse
        self.weight = nn.Parameter(torch.randn(10, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight, sparse=self.sparse)


class Model(nn.Module):
    def __init__(self, sparse: bool = True):
        super().__init__()
        self.table = Table(sparse)
        self.out = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids)).square().sum()


def make(config: OptimConfig, steps: int = 20) -> tuple[Model, Optimizers]:
    torch.manual_seed(0)
    model = Model()
    return model, Optimizers(model, config, steps)


def step(model: Model, optimizers: Optimizers, seed: int) -> tuple[float, float, float]:
    ids = torch.randint(0, 10, (7,), generator=torch.Generator().manual_seed(seed))
    loss = model(ids)
    loss.backward()
    rate = optimizers.learning_rate
    return loss.item(), optimizers.step().item(), rate


CONFIG = OptimConfig(learning_rate=0.1, sparse_learning_rate=0.2, min_ratio=0.1, warmup_steps=4)


def test_one_norm_over_both_kinds_of_gradients() -> None:
    torch.manual_seed(0)
    sparse = Model(sparse=True)
    dense = Model(sparse=False)
    dense.load_state_dict(sparse.state_dict())
    ids = torch.tensor([1, 1, 3, 9])
    for model in (sparse, dense):
        model(ids).backward()
    expected = nn.utils.clip_grad_norm_(dense.parameters(), 0.5)
    assert torch.allclose(clip_grad_norm(sparse.parameters(), 0.5), expected)
    assert sparse.table.weight.grad.is_sparse
    for ours, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
        assert torch.allclose(ours.grad.to_dense(), theirs.grad, atol=1e-7)


def test_small_gradients_are_not_scaled() -> None:
    model = Model()
    model(torch.tensor([2])).backward()
    before = [p.grad.to_dense().clone() for p in model.parameters()]
    clip_grad_norm(model.parameters(), 1e9)
    assert all(torch.equal(a, p.grad.to_dense()) for a, p in zip(before, model.parameters(), strict=True))


def test_schedule_rises_then_falls_by_a_cosine() -> None:
    model, optimizers = make(CONFIG)
    rates = [step(model, optimizers, i)[2] for i in range(20)]
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    middle = 0.1 * (0.1 + 0.9 * 0.5)
    assert rates[4 + 8] == pytest.approx(middle)
    assert rates[-1] < 0.012
    assert rates[4:] == sorted(rates[4:], reverse=True)
    sparse_rate = optimizers.optimizers[1].param_groups[0]["lr"]
    assert sparse_rate == pytest.approx(2 * optimizers.learning_rate)


def test_no_warm_up_starts_at_the_peak() -> None:
    model, optimizers = make(dataclasses.replace(CONFIG, warmup_steps=0))
    rates = [step(model, optimizers, i)[2] for i in range(20)]
    assert rates[0] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    assert rates[10] == pytest.approx(0.1 * (0.1 + 0.9 * 0.5))
    for steps in (1, 2, 3):  # shorter than any warm-up
        model, optimizers = make(CONFIG, steps)
        assert all(0 < step(model, optimizers, i)[2] <= 0.1 for i in range(steps))


def test_state_of_another_shape_is_refused() -> None:
    model, optimizers = make(CONFIG)
    step(model, optimizers, 0)
    tensors, rest = optimizers.state_dict()
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    with pytest.raises(ValueError, match=rf"Optimizers: {name}: expected shape \(.*\), got shape \(1,\)"):
        make(CONFIG)[1].load_state_dict(tensors | {name: torch.ones(1)}, rest)


def test_matrices_decay_and_vectors_and_tables_do_not() -> None:
    model, optimizers = make(CONFIG)
    decay = {id(p): g["weight_decay"] for g in optimizers.optimizers[0].param_groups for p in g["params"]}
    assert decay == {id(model.out.weight): CONFIG.weight_decay, id(model.out.bias): 0.0}
    assert isinstance(optimizers.optimizers[1], torch.optim.SparseAdam)
    assert optimizers.optimizers[1].param_groups[0]["params"][0] is model.table.weight


def test_resume_is_exact() -> None:
    model, optimizers = make(CONFIG)
    full = [step(model, optimizers, i) for i in range(20)]
    model, optimizers = make(CONFIG)
    for i in range(9):
        step(model, optimizers, i)
    weights = copy.deepcopy(model.state_dict())
    tensors, rest = optimizers.state_dict()
    tensors, rest = {name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(rest))
    model, optimizers = make(CONFIG)
    model.load_state_dict(weights)
    optimizers.load_state_dict(tensors, rest)
    assert [step(model, optimizers, i) for i in range(9, 20)] == full[9:]
