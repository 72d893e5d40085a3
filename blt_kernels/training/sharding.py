"""A model on many ranks: dense parameters by FSDP2, hash tables by columns, one norm over all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .._checks import fail_value
from ..model import BLT, EntropyModel
from ..model.transformer import FeedForward, SelfAttention
from ..nn import DecoderCrossAttention, EncoderCrossAttention
from ..optim import RowwiseAdagrad, clip_scale
from .ranks import from_all, sum_of_tensor, world_size
from .sharded_files import read_tensors
from .sharded_tables import ShardedRowwiseAdagrad, ShardedTables, shard_tables

# Units of fully_shard: gathered before they compute and dropped after. The rest of a model is one more, which stays.
MATRICES = (SelfAttention, FeedForward)
PLAIN = (EncoderCrossAttention, DecoderCrossAttention)  # norms are among their parameters


class Sharding:
    """Divides a model among the ranks, in place, and knows what of it is where. For a run of more than one rank.

    Afterwards the parameters of layers are DTensors, and a table's weight is the columns of this rank. Before, each
    rank has the whole model, with equal weights.

    Args:
        model: an EntropyModel or a BLT.
        device: where it is trained.
        autocast: matrices travel in bfloat16, which is what autocast makes of them anyway.

    Raises:
        ValueError: some ranks have GPUs and others have none, or tables that ShardedTables refuses.
    """

    def __init__(self, model: EntropyModel | BLT, device: torch.device, *, autocast: bool):
        kinds = sorted(set(from_all(device.type)))
        if len(kinds) > 1:
            raise fail_value("train", "device", "the same kind of device on all ranks", " and ".join(kinds))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        mesh = init_device_mesh(device.type, (world_size(),))
        self.tables = shard_tables(model, device)
        weights = [cast(nn.Parameter, table.weight) for table in self.tables]
        self._table_of: dict[torch.Tensor, ShardedTables] = dict(zip(weights, self.tables, strict=True))
        # Norms are computed in float32 under autocast, so that they must not travel in bfloat16. Inputs are never cast,
        # because rotary positions among them need float32.
        matrices = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if autocast else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        plain = MixedPrecisionPolicy(cast_forward_inputs=False)
        for module in model.modules():
            if isinstance(module, MATRICES):
                fully_shard(module, mesh=mesh, mp_policy=matrices)
            elif isinstance(module, PLAIN):
                fully_shard(module, mesh=mesh, mp_policy=plain)
        fully_shard(model, mesh=mesh, mp_policy=plain, ignored_params=set(weights))
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Gradients are summed and not averaged: each rank divides its loss by the targets of all.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other

    def norm_and_scale(self, parameters: Iterable[nn.Parameter], max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The 2-norm of all gradients on all ranks, and the factor that brings it to at most `max_norm`.

        Call it once after backward, on all ranks: it completes the gradients of the tables before.
        """
        for table in self.tables:
            table.sum_over_groups()
        dense = torch.nn.utils.get_total_norm(local_gradients(p for p in parameters if p not in self._table_of))
        square = dense.square()
        for table in self.tables:
            [values] = local_gradients([table.weight])
            square = square + torch.linalg.vector_norm(values).square() / table.mesh.get_group("group").size()
        norm = sum_of_tensor(square).sqrt()
        return norm, clip_scale(norm, max_norm)

    def scale_gradients(self, parameters: Iterable[nn.Parameter], scale: torch.Tensor) -> None:
        """Multiplies what this rank holds of the gradients by a factor, in place."""
        torch._foreach_mul_(local_gradients(parameters), scale)

    def rowwise_adagrad(self, lr: float) -> RowwiseAdagrad:
        """The optimiser of the tables."""
        return ShardedRowwiseAdagrad(self.tables, lr)

    def to_save(self, parameter: nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that belongs to `parameter` (it, or state of its optimiser) as checkpoints save it."""
        table = self._table_of.get(parameter)
        return tensor if table is None or tensor.shape != parameter.shape else table.whole(tensor.detach())

    def read(self, file: Path, owner: Callable[[str], nn.Parameter | None]) -> dict[str, torch.Tensor]:
        """This rank's part of the tensors in a file of a checkpoint, which any number of ranks may have written.

        Args:
            file: .safetensors with whole tensors.
            owner: from the name of a tensor in it to the parameter it belongs to, or None. Tensors that have not the
                shape of their parameter are read whole.
        """

        def place(name: str) -> torch.Tensor | None:
            parameter = owner(name)
            return None if parameter is None else self.to_save(parameter, torch.empty_like(parameter))

        tensors = read_tensors(file, place)
        for name, tensor in tensors.items():
            parameter = owner(name)
            if parameter in self._table_of and isinstance(tensor, DTensor):
                tensors[name] = self._table_of[parameter].columns(tensor)
        return tensors


def local_gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What this rank holds of the gradients, as tensors that share their memory."""
    gradients = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if grad.is_sparse:
            parameter.grad = grad = grad.coalesce()
            gradients.append(grad._values())
        else:
            gradients.append(grad.to_local() if isinstance(grad, DTensor) else grad)
    return gradients
