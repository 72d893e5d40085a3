"""docs/training.md keeps its word: its commands run, its tables are those of its formulas."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from blt_kernels.cli.main import app
from blt_kernels.model import BLTConfig
from blt_kernels.model.config import BLT_PRESETS
from blt_kernels.training.costs import rank_costs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()
COMMANDS = [shlex.split(line) for line in re.findall(r"^(?:torchrun|blt-kernels) .*$", PAGE, flags=re.M)]
SMALL = {
    "train-entropy": ["--steps", "2", "--row-tokens", "256", "--holdout-bytes", "500"],
    "train": ["--steps", "2", "--row-tokens", "256", "--holdout-bytes", "500", "--patch-size", "3"],
}


def ours(command: list[str]) -> list[str]:
    """The words of `blt-kernels` in a command of the page."""
    return command[command.index("--") + 1 :] if command[0] == "torchrun" else command[1:]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command)[:60])
def test_commands_exist_with_their_options(command: list[str]) -> None:
    name, *arguments = ours(command)
    typer.main.get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_commands_for_one_machine_run_one_after_the_other(tmp_path: Path) -> None:
    """As they are on the page, with fewer steps: two are of two ranks, the third goes on with one."""
    (tmp_path / "texts").mkdir()
    for i in range(8):
        text = "".join(f"def f_{i}_{j}(x):\n    return x + {j}\n" for j in range(60))
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    (tmp_path / "held-out.txt").write_text("def g(x):\n    return x\n" * 20)
    commands = [command for command in COMMANDS if "--nnodes" not in command]
    assert [ours(command)[0] for command in commands] == ["train-entropy", "train", "train", "eval"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in commands:
        name, *arguments = ours(command)
        arguments += [] if "--resume" in arguments else SMALL.get(name, [])
        program = [sys.executable, "-m", "blt_kernels"]
        if command[0] == "torchrun":
            program = [sys.executable, "-m", "torch.distributed.run", *command[1 : command.index("--") + 1]]
        done = subprocess.run(
            [*program, name, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout
    assert len(list(tmp_path.glob("runs/blt/step-*"))) == 1


def test_the_tables_are_those_of_the_formulas() -> None:
    spec = importlib.util.spec_from_file_location("costs", ROOT / "docs" / "costs.py")
    assert spec is not None and spec.loader is not None
    costs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(costs)
    assert costs.page(PAGE) == PAGE, "run python docs/costs.py"
    assert "7B, 64 ranks" in costs.tables()


@pytest.mark.parametrize("preset", ["1B", "7B"])
def test_costs_follow_the_formulas_of_the_page(preset: str) -> None:
    """Worked out once more from the shapes, for 256 ranks, which have two table groups or more, and two lanes each."""
    ranks, tokens, lanes = 256, 8192, 2
    config = BLT_PRESETS[preset]
    columns, rows, latent = config.encoder.dim, 6 * config.hash_rows, config.latent
    costs = rank_costs(config, ranks, row_tokens=tokens, lanes_of_rank=lanes, table_optimizer="sparse_adam")
    size = costs.table_group
    assert columns % size == ranks % size == 0 and columns // size >= 8 and size < ranks
    assert costs.memory["tables"] == 4 * rows * columns // size
    assert costs.memory["optimiser of tables"] == 2 * costs.memory["tables"]
    assert costs.hashed == lanes * size * tokens and costs.sorted == 6 * costs.hashed
    touched = min(rows, costs.sorted)
    assert costs.received["gradients of equal tables"] == (ranks // size - 1) * touched * (4 * columns // size + 8)
    assert costs.received["rows of tables"] == lanes * 2 * 4 * columns * tokens * (size - 1) // size
    matrices = sum(
        part.num_layers * (4 * part.dim**2 + 3 * part.dim * part.ffn_dim)
        for part in (config.encoder, latent, config.decoder)
    )
    cross = (1 + config.decoder.num_layers) * (4 * columns**2 + 2 * columns)
    rest = ranks * costs.memory["layers"] // 4 - matrices - cross
    assert 0 < rest < 0.05 * matrices
    expected = lanes * (2 * (2 * matrices + 4 * cross) + 4 * rest) * (ranks - 1) / ranks
    assert costs.received["layers"] == pytest.approx(expected, rel=1e-6)


def test_one_rank_receives_nothing() -> None:
    costs = rank_costs(BLTConfig.preset("tiny"), 1, row_tokens=8192)
    assert set(costs.received.values()) == {0}
    for wrong in ({"num_ranks": 0}, {"row_tokens": 0}, {"lanes_of_rank": 0}, {"table_optimizer": "adam"}):
        with pytest.raises(ValueError, match=f"rank_costs: {next(iter(wrong))}: expected"):
            rank_costs(**{"config": BLTConfig.preset("tiny"), "num_ranks": 1, "row_tokens": 1} | wrong)  # type: ignore[arg-type]
