"""AdamW and the optimisers of tables under one schedule and one clipping norm."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blt_kernels import reference
from blt_kernels.optim import RowwiseAdagrad, clip_grad_norm, grad_norm_and_scale
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


SPARSE_ADAM = OptimConfig(
    learning_rate=0.1, sparse_learning_rate=0.2, min_ratio=0.1, warmup_steps=4, table_optimizer="sparse_adam"
)
CONFIG = dataclasses.replace(SPARSE_ADAM, table_optimizer="rowwise_adagrad")


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


@pytest.mark.parametrize("config", [CONFIG, SPARSE_ADAM], ids=["rowwise_adagrad", "sparse_adam"])
def test_state_of_another_shape_is_refused(config: OptimConfig) -> None:
    model, optimizers = make(config)
    step(model, optimizers, 0)
    tensors, rest = optimizers.state_dict()
    for name in [name for name, tensor in tensors.items() if tensor.dim() > 0]:
        with pytest.raises(ValueError, match=rf"Optimizers: {name}: expected shape \(.*\), got shape \(1, 1, 1\)"):
            make(config)[1].load_state_dict(tensors | {name: torch.ones(1, 1, 1)}, rest)


def test_matrices_decay_and_vectors_and_tables_do_not() -> None:
    model, optimizers = make(CONFIG)
    decay = {id(p): g["weight_decay"] for g in optimizers.optimizers[0].param_groups for p in g["params"]}
    assert decay == {id(model.out.weight): CONFIG.weight_decay, id(model.out.bias): 0.0}
    assert optimizers.optimizers[1].param_groups[0]["weight_decay"] == 0
    for config, kind in ((CONFIG, RowwiseAdagrad), (SPARSE_ADAM, torch.optim.SparseAdam)):
        model, optimizers = make(config)
        assert type(optimizers.optimizers[1]) is kind
        assert optimizers.optimizers[1].param_groups[0]["params"][0] is model.table.weight


class WithLatentLayers(Model):
    def __init__(self) -> None:
        super().__init__()
        self.global_transformer = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)])})
        self.global_transformer["projection"] = nn.Linear(3, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.global_transformer["layers"][0](self.out(self.table(ids)))
        return self.global_transformer["projection"](x).square().sum()


def test_latent_layers_learn_at_a_rate_of_their_own() -> None:
    """A fraction of the rate of the rest at every step, to the end of the schedule; 1 changes nothing."""
    config = dataclasses.replace(CONFIG, latent_lr_scale=0.25)
    torch.manual_seed(0)
    model = WithLatentLayers()
    optimizers = Optimizers(model, config, 20)
    dense, _, latent = optimizers.optimizers
    layer = model.global_transformer["layers"][0]
    slow = {id(p): group for group in latent.param_groups for p in group["params"]}
    assert {key: group["weight_decay"] for key, group in slow.items()} == {
        id(layer.weight): CONFIG.weight_decay,
        id(layer.bias): 0.0,
    }
    rates = []
    for i in range(20):
        rates.append(dense.param_groups[0]["lr"])
        assert latent.param_groups[0]["lr"] == pytest.approx(0.25 * rates[-1])
        step(model, optimizers, i)
    assert max(rates) == pytest.approx(0.1) and rates[-1] < 0.012
    other = WithLatentLayers()
    again = Optimizers(other, config, 20)
    again.load_state_dict(*optimizers.state_dict())
    assert again.state_dict()[1] == optimizers.state_dict()[1]
    assert len(Optimizers(other, CONFIG, 20).optimizers) == 2


def test_the_gradients_of_tables_are_clipped_like_the_dense_ones() -> None:
    """The factor that RowwiseAdagrad takes does what scaling the gradients would do."""
    config = dataclasses.replace(CONFIG, clip_norm=0.01)
    model, optimizers = make(config)
    model(torch.tensor([1, 1, 3])).backward()
    before, grad = model.table.weight.detach().clone(), model.table.weight.grad.coalesce()
    norm, scale = grad_norm_and_scale(model.parameters(), 0.01)
    assert scale.item() < 1
    state = torch.zeros(10)
    rate = optimizers.optimizers[1].param_groups[0]["lr"]
    reference.rowwise_adagrad_update(before, state, grad.indices()[0], grad.values(), lr=rate, scale=scale)
    assert optimizers.step() == norm
    torch.testing.assert_close(model.table.weight.detach(), before)


@pytest.mark.parametrize("config", [CONFIG, SPARSE_ADAM], ids=["rowwise_adagrad", "sparse_adam"])
def test_resume_is_exact(config: OptimConfig) -> None:
    model, optimizers = make(config)
    full = [step(model, optimizers, i) for i in range(20)]
    model, optimizers = make(config)
    for i in range(9):
        step(model, optimizers, i)
    weights = copy.deepcopy(model.state_dict())
    tensors, rest = optimizers.state_dict()
    tensors, rest = {name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(rest))
    model, optimizers = make(config)
    model.load_state_dict(weights)
    optimizers.load_state_dict(tensors, rest)
    assert [step(model, optimizers, i) for i in range(9, 20)] == full[9:]


# ---- RowwiseAdagrad --------------------------------------------------------------------------------------------------


def train_table(optimizer: torch.optim.Optimizer, table: nn.Parameter, steps: range) -> None:
    for i in steps:
        ids = torch.randint(0, 10, (7,), generator=torch.Generator().manual_seed(i))
        F.embedding(ids, table, sparse=True).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_rowwise_adagrad_is_adagrad_for_rows_of_one_element() -> None:
    """With D = 1 a row is an element, and torch.optim.Adagrad takes the same steps."""
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(10, 1)), None
    theirs = nn.Parameter(ours.detach().clone())
    train_table(RowwiseAdagrad([ours], lr=0.1), ours, range(5))
    train_table(torch.optim.Adagrad([theirs], lr=0.1), theirs, range(5))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rowwise_adagrad_resumes_exactly(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(10, 4).to(dtype))
    optimizer = RowwiseAdagrad([table], lr=0.1, weight_decay=0.1)
    train_table(optimizer, table, range(3))
    copied, state = nn.Parameter(table.detach().clone()), copy.deepcopy(optimizer.state_dict())
    resumed = RowwiseAdagrad([copied], lr=0.5)
    resumed.load_state_dict(state)
    assert resumed.state[copied]["sum"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    train_table(optimizer, table, range(3, 6))
    train_table(resumed, copied, range(3, 6))
    assert torch.equal(table, copied) and torch.equal(optimizer.state[table]["sum"], resumed.state[copied]["sum"])


def test_rowwise_adagrad_refuses_the_state_of_others() -> None:
    """And is left as it was."""
    table, longer = nn.Parameter(torch.randn(10, 4)), nn.Parameter(torch.randn(12, 4))
    ours, adam = RowwiseAdagrad([table], lr=0.1), torch.optim.SparseAdam([table])
    train_table(adam, table, range(1))
    train_table(ours, table, range(1))
    before = copy.deepcopy(ours.state_dict())
    expected = r"RowwiseAdagrad: state_dict: expected the state of this optimiser, sum \[{}\], got {}"
    with pytest.raises(ValueError, match=expected.format(10, r"step \[\], exp_avg \[10, 4\], exp_avg_sq \[10, 4\]")):
        ours.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match=expected.format(12, r"sum \[10\]")):
        RowwiseAdagrad([longer]).load_state_dict(before)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        RowwiseAdagrad([table, longer]).load_state_dict(before)
    assert str(ours.state_dict()) == str(before)


def test_rowwise_adagrad_adds_up_rows_that_come_twice() -> None:
    table = nn.Parameter(torch.ones(5, 2))
    optimizer = RowwiseAdagrad([table], lr=1.0)
    table.grad = torch.sparse_coo_tensor([[3, 1, 1]], torch.tensor([[2.0, 2.0], [1.0, 1.0], [2.0, 2.0]]), (5, 2))
    optimizer.step()
    assert optimizer.state[table]["sum"].tolist() == [0, 9, 0, 4, 0]
    assert table[1].tolist() == table[3].tolist() == [0, 0] and table[0].tolist() == [1, 1]


def test_rowwise_adagrad_takes_a_gradient_of_no_rows() -> None:
    table = nn.Parameter(torch.ones(5, 2))
    table.grad = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 2), (5, 2))
    RowwiseAdagrad([table], weight_decay=0.1).step()
    assert torch.equal(table.detach(), torch.ones(5, 2))


def test_rowwise_adagrad_can_be_copied_with_its_tables() -> None:
    table = nn.Parameter(torch.ones(10, 4))
    optimizer = RowwiseAdagrad([table], lr=0.1)
    train_table(optimizer, table, range(2))
    other, copied = copy.deepcopy((optimizer, table))
    pickled = pickle.loads(pickle.dumps((optimizer, table)))
    train_table(optimizer, table, range(2, 4))
    for step, of in ((other, copied), pickled):
        assert not torch.equal(of, table)
        train_table(step, of, range(2, 4))
        assert torch.equal(of, table)


def test_rowwise_adagrad_keeps_one_number_for_each_row() -> None:
    table = nn.Parameter(torch.randn(10, 4))
    optimizer = RowwiseAdagrad([table])
    train_table(optimizer, table, range(1))
    assert {name: value.shape for name, value in optimizer.state[table].items()} == {"sum": (10,)}


def test_rowwise_adagrad_takes_a_closure_and_skips_what_has_no_gradient() -> None:
    table, unread = nn.Parameter(torch.ones(10, 4)), nn.Parameter(torch.ones(3, 2))
    optimizer = RowwiseAdagrad([{"params": [table], "lr": 0.5}, {"params": [unread]}])

    def closure() -> float:
        loss = F.embedding(torch.tensor([1]), table, sparse=True).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    torch.testing.assert_close(table[1].detach(), torch.full((4,), 0.5))
    assert torch.equal(unread.detach(), torch.ones(3, 2)) and not optimizer.state[unread]


def test_rowwise_adagrad_refuses_dense_gradients_and_wrong_numbers() -> None:
    table = nn.Parameter(torch.ones(10, 4))
    table.sum().backward()
    with pytest.raises(TypeError, match=r"grad: expected a row-sparse gradient, got layout torch\.strided"):
        RowwiseAdagrad([table]).step()
    with pytest.raises(TypeError, match=r"RowwiseAdagrad: scale: expected a torch\.Tensor, got float"):
        RowwiseAdagrad([table]).step(scale=0.5)
    for name, value in (("lr", -1.0), ("eps", 0.0), ("weight_decay", -0.1)):
        with pytest.raises(ValueError, match=f"RowwiseAdagrad: {name}: expected a finite number"):
            RowwiseAdagrad([table], **{name: value})
