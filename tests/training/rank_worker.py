"""What test_ranks.py runs on several ranks: `python rank_worker.py FOLDER`, once for each rank, with torchrun's
environment. Results go to files in FOLDER, where the tests compare them with those of one process.
"""

from __future__ import annotations

import dataclasses
import resource
import shutil
import sys
from pathlib import Path

import torch

from blt_kernels.data import Corpus
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.training.checkpoint import CheckpointError
from blt_kernels.training.lanes import Lanes
from blt_kernels.training.optim import OptimConfig, Optimizers
from blt_kernels.training.patcher import Patcher, PatcherConfig
from blt_kernels.training.ranks import (
    FirstRankFailedError,
    from_all,
    from_first,
    is_first,
    joined,
    lanes_of_rank,
    world_size,
)
from blt_kernels.training.rows import RowShape
from blt_kernels.training.runs import train_model
from blt_kernels.training.step import training_step
from blt_kernels.training.trainer import TrainConfig

LANES = 2
LOCAL = TransformerConfig(32, 1, 2, 64, window=16)
# 16 columns lie on two ranks of a table group, 8 on one: then there are as many groups as ranks.
MODELS = {
    dim: BLTConfig(LOCAL, TransformerConfig(64, 2, 2, 64), LOCAL, ngram_sizes=(3, 4), hash_rows=97, hash_dim=dim)
    for dim in (16, 8)
}
SHAPE = RowShape(288, 72, 96)
PATCHER = Patcher(PatcherConfig("spaces"))
STEPS = 20
CONFIGS = {
    name: TrainConfig(
        STEPS,
        OptimConfig(1e-2, 1e-2, warmup_steps=3, clip_norm=0.5, table_optimizer=name),
        log_every=1,
        eval_every=STEPS,
        checkpoint_every=10,
        lanes=LANES,
        checkpoint_activations=name == "rowwise_adagrad",
    )
    for name in ("sparse_adam", "rowwise_adagrad")
}


def make_corpus(folder: Path) -> None:
    folder.mkdir()
    for i in range(12):
        text = "".join(f"value_{i}_{j} = {i * j} + {j}\n" for j in range(5 + 7 * i))
        (folder / f"{i:02}.txt").write_text(text)


def begin_again(run: Path, begun: Path) -> None:
    """Makes `begun` the run as it was before its last checkpoint."""
    shutil.copytree(run, begun)
    shutil.rmtree(begun / f"step-{STEPS:08d}")


def make_blt(dim: int) -> BLT:
    """Its tables are not zero, so that every column has its say in what is computed."""
    torch.manual_seed(3)
    model = BLT(MODELS[dim])
    assert model.encoder_hash_tok_embedding is not None
    torch.nn.init.normal_(model.encoder_hash_tok_embedding.weight, std=0.1)
    return model


def train(corpus: Corpus, run: Path, table_optimizer: str, *, resume: bool = False) -> BLT:
    model = make_blt(16)
    config = CONFIGS[table_optimizer]
    held_out = corpus.with_files(corpus.files[:3])
    train_model(model, corpus, held_out, SHAPE, config, run, patcher=PATCHER, resume=resume)
    return model


def gradients(corpus: Corpus, dim: int, *, autocast: bool = False) -> dict[str, torch.Tensor]:
    """The gradients of one step, their norm and the loss: whole, on every rank."""
    model = make_blt(dim)
    sharding = None
    if world_size() > 1:
        from blt_kernels.training.sharding import Sharding

        sharding = Sharding(model, torch.device("cpu"), autocast=autocast)
    optimizers = Optimizers(model, OptimConfig(clip_norm=1e9, table_optimizer="sparse_adam"), 1, sharding)
    kept: dict[str, torch.Tensor] = {}
    finish = optimizers.step

    def step() -> torch.Tensor:
        zero_grad = [optimizer.zero_grad for optimizer in optimizers.optimizers]
        for optimizer in optimizers.optimizers:
            optimizer.zero_grad = lambda set_to_none=True: None
        norm = finish()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            grad = parameter.grad.to_dense()
            grad = grad if sharding is None else sharding.to_save(parameter, grad)
            kept[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
        for optimizer, clear in zip(optimizers.optimizers, zero_grad, strict=True):
            optimizer.zero_grad = clear
        return norm

    optimizers.step = step  # type: ignore[method-assign]
    lanes = Lanes.over(corpus, SHAPE, PATCHER, seed=1, num_lanes=LANES, mine=lanes_of_rank(LANES))
    loss, norm = training_step(model, next(lanes), optimizers, autocast=autocast)
    kept |= {"norm": norm, "loss": loss.mean, "targets": loss.num_targets}
    if sharding is not None:
        state, _ = optimizers.state_dict()
        held = [sum(map(local_bytes, tensors)) for tensors in (model.parameters(), state.values())]
        kept |= {"held": torch.tensor(from_all(held))}
    return kept


def local_bytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def main(folder: Path) -> None:
    corpus = Corpus(folder / "texts")

    def save(name: str, value: object) -> None:
        if is_first():
            torch.save(value, folder / f"{name}.pt")

    for dim in MODELS:
        save(f"gradients-{dim}", gradients(corpus, dim))
    save("gradients-autocast", gradients(corpus, 16, autocast=True))
    if world_size() > 2:
        return
    for name in CONFIGS:
        train(corpus, folder / f"two-{name}", name)
        train(corpus, folder / f"one-then-two-{name}", name, resume=True)
        from_first(lambda name=name: begin_again(folder / f"two-{name}", folder / f"two-again-{name}"))
        train(corpus, folder / f"two-again-{name}", name, resume=True)
    refused = []
    for run, lanes in (("three-lanes", 3), ("two-sparse_adam", LANES)):
        config = dataclasses.replace(CONFIGS["sparse_adam"], lanes=lanes)
        try:
            train_model(make_blt(16), corpus, None, SHAPE, config, folder / run, patcher=PATCHER)
        except (ValueError, FirstRankFailedError) as error:
            refused.append(f"{type(error).__name__}: {error}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not is_first():  # its disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        train(corpus, folder / "full-disk", "sparse_adam")
    except CheckpointError as error:
        refused.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused = from_all(refused)
    save("refused", refused)
    torch.manual_seed(0)
    model = EntropyModel(dataclasses.replace(EntropyModelConfig(LOCAL), ngram_sizes=(3,), hash_rows=50))
    train_model(model, corpus, None, RowShape(128, 64), CONFIGS["sparse_adam"], folder / "entropy")


if __name__ == "__main__":
    with joined():
        main(Path(sys.argv[1]))
