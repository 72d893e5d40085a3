"""What a rank of a run holds and receives, on paper: see docs/training.md for the formulas in words."""

from __future__ import annotations

import dataclasses

import torch

from .._checks import check_choice, check_int, fail_type
from ..model import BLT, BLTConfig
from .optim import TABLE_OPTIMIZERS
from .sharded_tables import table_group_size
from .sharding import MATRICES, PLAIN

FP32, BF16, INT64 = 4, 2, 8  # bytes


@dataclasses.dataclass(frozen=True)
class RankCosts:
    """Bytes, as integers.

    Attributes:
        memory: what a rank holds in a step, by part; activations are left out.
        received: what a rank receives in a step, by part. It sends as much.
        table_group: T, the ranks among which the columns of the tables are divided.
        hashed: tokens that a rank hashes in a step.
        sorted: rows of tables that it reads, which are sorted to add up their gradients.
    """

    memory: dict[str, int]
    received: dict[str, int]
    table_group: int
    hashed: int
    sorted: int


def rank_costs(
    config: BLTConfig,
    num_ranks: int,
    *,
    row_tokens: int,
    lanes_of_rank: int = 1,
    autocast: bool = True,
    table_optimizer: str = "rowwise_adagrad",
) -> RankCosts:
    """The costs of a rank in the training of a BLT.

    Args:
        config: its shapes.
        num_ranks: R, at least 1.
        row_tokens: N, the tokens of a batch.
        lanes_of_rank: batches of a step that a rank runs.
        autocast: whether matrices travel in bfloat16.
        table_optimizer: one of `TABLE_OPTIMIZERS`.

    Raises:
        TypeError, ValueError: wrong argument.
    """
    op = "rank_costs"
    if not isinstance(config, BLTConfig):
        raise fail_type(op, "config", "a BLTConfig", type(config).__name__)
    for name, value in {"num_ranks": num_ranks, "row_tokens": row_tokens, "lanes_of_rank": lanes_of_rank}.items():
        check_int(op, name, value, 1)
    check_choice(op, "table_optimizer", table_optimizer, TABLE_OPTIMIZERS)
    with torch.device("meta"):
        model = BLT(config)
    table = None if model.encoder_hash_tok_embedding is None else model.encoder_hash_tok_embedding.weight
    rows, columns = (0, 1) if table is None else table.shape
    matrices = [_size(module) for module in model.modules() if isinstance(module, MATRICES)]
    plain = [_size(module) for module in model.modules() if isinstance(module, PLAIN)]
    dense = _size(model) - rows * columns
    root = dense - sum(matrices) - sum(plain)
    size = table_group_size(columns, num_ranks)
    groups, width = num_ranks // size, columns // size
    reads = 0 if table is None else len(config.ngram_sizes) * config.hash_functions * size * row_tokens
    touched = min(rows, reads * lanes_of_rank)  # at most
    matrix = BF16 if autocast else FP32
    largest = max([matrix * unit for unit in matrices] + [FP32 * unit for unit in plain])
    reduced = FP32 * max(matrices + plain)
    adam = 2 * FP32
    table_state = adam * rows * width if table_optimizer == "sparse_adam" else FP32 * rows
    memory = {
        "layers": FP32 * dense // num_ranks,
        "gradients of layers": FP32 * dense // num_ranks,
        "optimiser of layers": adam * dense // num_ranks,
        "gathered layers": 2 * largest + FP32 * root,
        "gradients on their way": largest + reduced + FP32 * root,
        "tables": FP32 * rows * width,
        "optimiser of tables": table_state,
        "gradients of tables": touched * (FP32 * width + INT64),
    }
    others = (num_ranks - 1) / num_ranks
    gathers = 2 * (matrix * sum(matrices) + FP32 * sum(plain)) + FP32 * root  # the root stays between the two passes
    row_bytes = FP32 * columns * row_tokens * (size - 1) // size if rows else 0
    received = {
        "layers": int(lanes_of_rank * gathers * others),
        "gradients of layers": int(lanes_of_rank * FP32 * dense * others),
        "tokens": lanes_of_rank * INT64 * row_tokens * (size - 1) if rows else 0,
        "rows of tables": lanes_of_rank * 2 * row_bytes,
        "gradients of equal tables": (groups - 1) * touched * (FP32 * width + INT64),
        "squares of rows": 2 * FP32 * touched * (size - 1) // size if table_optimizer == "rowwise_adagrad" else 0,
    }
    return RankCosts(memory, received, size, lanes_of_rank * size * row_tokens if rows else 0, lanes_of_rank * reads)


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
