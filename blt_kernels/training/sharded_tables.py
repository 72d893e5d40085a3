"""Hash tables on many ranks: each rank of a table group holds all rows and some of the columns.

So every rank looks up each token once, whatever the text is, and an update is local: there is no all-reduce of sparse
gradients, and no rank has more rows to serve than another. What travels are the tokens of the group, which are small,
and the columns that were read, once in forward and once in backward.

A table of D columns over a group of T ranks has D / T columns on each. Below 8 fp32 columns a row is less than the 32
bytes that a GPU reads at once, so a group is no larger than keeps 8. Where the run has more ranks than that, there are
several groups with equal tables, and their gradients are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .._checks import fail_value
from ..nn import HashNgramEmbedding
from ..ops.hash_ngram_embedding import hash_ngram_embedding
from ..ops.rowwise_adagrad_update import state_dtype
from ..optim import RowwiseAdagrad

MIN_COLUMNS = 8


def table_group_size(dim: int, num_ranks: int) -> int:
    """T, the ranks that share a table of `dim` columns: the most that divide both numbers and keep 8 columns each."""
    sizes = (size for size in range(1, num_ranks + 1) if num_ranks % size == 0 and dim % size == 0)
    return max(size for size in sizes if size == 1 or dim // size >= MIN_COLUMNS)


class ShardedTables(HashNgramEmbedding):
    """The columns of a HashNgramEmbedding that this rank holds. It computes what the whole one does.

    `weight` is [G * num_rows, D / T]: columns t * D / T to (t + 1) * D / T on rank t of the group. All ranks call
    forward together, with rows of one shape.

    Args:
        whole: the tables, equal on all ranks; its values are copied.
        device: where the columns lie.

    Raises:
        ValueError: tables that are normalised or have dense gradients, which no model here asks for.
    """

    def __init__(self, whole: HashNgramEmbedding, device: torch.device):
        if whole.normalize or not whole.sparse:
            got = f"normalize={whole.normalize}, sparse_grad={whole.sparse}"
            raise fail_value("train", "tables", "sparse gradients and no normalisation on many ranks", got)
        dim = whole.weight.shape[1]
        size = table_group_size(dim, dist.get_world_size())
        super().__init__(
            whole.num_rows, dim // size, whole.ngram_sizes, num_functions=len(whole.primes), sparse_grad=True
        )
        shape = (dist.get_world_size() // size, size)
        self.mesh: DeviceMesh = init_device_mesh(device.type, shape, mesh_dim_names=("group", "columns"))
        first = self.mesh.get_local_rank("columns") * (dim // size)
        with torch.no_grad():
            self.weight.copy_(whole.weight[:, first : first + dim // size])
        self.to(device)

    def forward(  # type: ignore[override]
        self, tokens: torch.Tensor, base: torch.Tensor | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """tokens [1, N] of a packed row, base [1, N, D] or None -> [1, N, D]."""
        if cu_seqlens is None:
            raise fail_value("ShardedTables", "cu_seqlens", "the sequences of a packed row", None)
        group = self.mesh.get_group("columns")
        size, num_tokens = group.size(), tokens.shape[1]
        # One collective for tokens and sequences. The row of rank t begins at token t * N of the row of all.
        mine = torch.cat((tokens[0], cu_seqlens.to(tokens.dtype)))
        gathered = mine.new_empty(size * len(mine))
        dist.all_gather_into_tensor(gathered, mine, group=group)
        all_tokens, ends = gathered.view(size, -1).split((num_tokens, len(cu_seqlens)), dim=1)
        ends = ends + num_tokens * torch.arange(size, device=ends.device)[:, None]
        read = hash_ngram_embedding(
            all_tokens.reshape(1, -1),
            self.weight,
            ngram_sizes=self.ngram_sizes,
            num_rows=self.num_rows,
            primes=self.primes,
            cu_seqlens=ends.flatten(),
            sparse_grad=True,
        )
        columns = _Exchange.apply(read.view(size, num_tokens, -1), group)  # [T, N, D / T]
        rows = columns.transpose(0, 1).reshape(1, num_tokens, -1)
        return rows if base is None else base + rows

    def sum_over_groups(self) -> None:
        """Makes the gradient of the weight that of the tokens of all ranks, where several groups have equal tables."""
        group = self.mesh.get_group("group")
        if group.size() == 1:
            return
        assert self.weight.grad is not None
        grad = self.weight.grad.coalesce()
        rows, values = grad.indices()[0], grad.values()
        counts = rows.new_empty(group.size())
        dist.all_gather_into_tensor(counts, rows.new_tensor([len(rows)]), group=group)
        most = int(counts.max())
        all_rows = rows.new_empty(group.size() * most)
        all_values = values.new_empty(group.size() * most, values.shape[1])
        dist.all_gather_into_tensor(all_rows, _padded(rows, most), group=group)
        dist.all_gather_into_tensor(all_values, _padded(values, most), group=group)
        wanted = (torch.arange(most, device=rows.device) < counts[:, None]).flatten()
        self.weight.grad = torch.sparse_coo_tensor(
            all_rows[wanted][None], all_values[wanted], grad.shape, check_invariants=False
        ).coalesce()

    def whole(self, columns: torch.Tensor) -> DTensor:
        """The whole of which `columns` [G * num_rows, D / T] are this rank's, with rows on ranks instead of columns.

        It is for checkpoints: files hold rows, and a rank writes and reads them in one piece.
        """
        by_columns = DTensor.from_local(columns, self.mesh, (Replicate(), Shard(1)), run_check=False)
        return by_columns.redistribute(placements=(Replicate(), Shard(0)))

    def columns(self, whole: DTensor) -> torch.Tensor:
        """The inverse of `whole`."""
        return whole.redistribute(placements=(Replicate(), Shard(1))).to_local()


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    padded = tensor.new_zeros(length, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded


class _Exchange(torch.autograd.Function):
    """x [T, ...] -> y [T, ...]: x[t] goes to rank t, and y[t] is what came from there. It is its own inverse.

    torch.distributed.nn has this function, but says that it will go.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        y = torch.empty_like(x)
        dist.all_to_all_single(y, x.contiguous(), group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _Exchange.apply(grad.contiguous(), ctx.group), None


class ShardedRowwiseAdagrad(RowwiseAdagrad):
    """RowwiseAdagrad of a table of which this rank holds some columns; the state of a row is that of all its columns.

    The update adds the mean square of the columns that it sees to the state of a row. So before it the state gets what
    the mean square over all columns is more than that: a sum over the group of one number for each row that was read.
    The two additions round otherwise on each rank. After the update the state is therefore set to the one sum, so that
    all ranks have what a checkpoint keeps of them, and a resumed run goes on exactly.

    Args:
        tables: whose weights are updated.
        lr: as for RowwiseAdagrad.
    """

    def __init__(self, tables: Iterable[ShardedTables], lr: float):
        self._tables = list(tables)
        super().__init__([table.weight for table in self._tables], lr)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, scale: torch.Tensor | None = None
    ) -> float | None:
        sums = []  # the state of each table with its rows that change, and what they become
        for table in self._tables:
            weight, group = table.weight, table.mesh.get_group("columns")
            assert weight.grad is not None
            weight.grad = weight.grad.coalesce()
            rows, values = weight.grad.indices()[0], weight.grad.values()
            state = self.state[weight]
            if not state:
                state["sum"] = torch.zeros(weight.shape[0], dtype=state_dtype(weight), device=weight.device)
            mine = values.to(state["sum"].dtype).square().mean(1)
            if scale is not None:
                mine *= scale.square()
            of_all = mine.clone()
            dist.all_reduce(of_all, group=group)
            sums.append((state["sum"], rows, state["sum"][rows] + of_all / group.size()))
            state["sum"][rows] = sums[-1][2] - mine
        loss = super().step(closure, scale=scale)
        for whole, rows, values in sums:
            whole[rows] = values
        return loss


def shard_tables(model: nn.Module, device: torch.device) -> list[ShardedTables]:
    """Puts ShardedTables in place of every HashNgramEmbedding of a model; returns them."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, HashNgramEmbedding)]
    sharded = []
    for name, module in found:
        sharded.append(ShardedTables(module, device))
        model.set_submodule(name, sharded[-1])
    return sharded
