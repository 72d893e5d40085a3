"""The README keeps its word: its examples run, its table of ops is true, its commands exist, and it stays short.

test_docs.py checks, for all pages, that the links, files and names on them exist.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import blt_kernels as bk
from blt_kernels.cli.main import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
CODE = re.findall(r"```python\n(.*?)```", README, flags=re.S)
# "| `segment_spaces`, `segment_fixed` | takes | gives | backward |" below the heading "Ops"
SECTION = README.partition("\n## Ops\n")[2].partition("\n## ")[0]
TABLE = {
    op: tuple(map(str.strip, cells))
    for names, *cells in (line.strip("|").split("|") for line in SECTION.splitlines() if line.startswith("| `"))
    for op in re.findall(r"`(\w+)`", names)
}
NOT_OPS = {"available_backends", "build_info", "keep_coalesced", "use_backend", "PatchLayout"}

# The dimensions of the table's shapes: all products differ, so that no two shapes are alike by chance.
SIZES = {"B": 2, "N": 12, "C": 5, "K": 3, "D": 8, "H": 4, "E": 7, "V": 11, "G": 2, "R": 13}
B, N, C, K, D, H, E, V, G, R = SIZES.values()
LAYOUT = bk.segment_fixed(torch.zeros(B, N, dtype=torch.long), 3)  # 1, 3, 3, 3 and 2 bytes
TOKENS = torch.arange(B * N).view(B, N)
NGRAMS = {"ngram_sizes": (3, 4), "num_rows": R}
CASES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "entropy": (bk.entropy, ((B, N, V),)),
    "linear_entropy": (bk.linear_entropy, ((B, N, D), (V, D))),
    "segment": (lambda x: bk.segment(x, 0.0), ((B, N),)),
    "segment_logits": (lambda x: bk.segment_logits(x, 0.0), ((B, N, V),)),
    "segment_spaces": (lambda: bk.segment_spaces(TOKENS), ()),
    "segment_fixed": (lambda: bk.segment_fixed(TOKENS, 3), ()),
    "calibrate_threshold": (lambda x: bk.calibrate_threshold(x, 2.0), ((B, N),)),
    "patch_pool": (lambda x: bk.patch_pool(x, LAYOUT.trim()), ((B, N, D),)),
    "patch_gather": (lambda y: bk.patch_gather(y, LAYOUT.trim()), ((B, C, D),)),
    "encoder_cross_attention": (
        lambda q, k, v: bk.encoder_cross_attention(q, k, v, LAYOUT.trim()),
        ((B, C * K, H, E), (B, N, H, E), (B, N, H, E)),
    ),
    "decoder_cross_attention": (
        lambda q, k, v: bk.decoder_cross_attention(q, k, v, LAYOUT.trim()),
        ((B, N, H, E), (B, C * K, H, E), (B, C * K, H, E)),
    ),
    "hash_ngram_ids": (lambda: bk.hash_ngram_ids(TOKENS, **NGRAMS), ()),
    "hash_ngram_embedding": (
        lambda table, base: bk.hash_ngram_embedding(TOKENS, table, base=base, **NGRAMS),
        ((G * R, D), (B, N, D)),
    ),
    "hash_ngram_embedding_row_grad": (
        lambda grad: bk.hash_ngram_embedding_row_grad(grad, TOKENS, **NGRAMS),
        ((B, N, D),),
    ),
    "rowwise_adagrad_update": (
        lambda table, state: bk.rowwise_adagrad_update(
            table, state.detach().abs(), torch.tensor([1, 4]), torch.ones(2, D), lr=0.1
        ),
        ((G * R, D), (G * R,)),
    ),
}


def test_length() -> None:
    assert len(README.splitlines()) <= 170, "an engineer reads it in two minutes"


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.splitlines()[-1][:40])
def test_example_runs(code: str) -> None:
    assert len(code.splitlines()) <= 12
    exec(compile(code, "README.md", "exec"), {})


def test_table_has_every_op() -> None:
    public = {name for name in bk.__all__ if callable(getattr(bk, name))}
    assert set(TABLE) == set(CASES) == public - NOT_OPS


def shapes(cell: str) -> set[tuple[int, ...]]:
    """The shapes, such as [B, C*K], that a cell of the table names."""
    return {eval(f"({dims},)", dict(SIZES)) for dims in re.findall(r"\[([^\]]*)\]", cell)}


@pytest.mark.parametrize("op", CASES)
def test_table_is_true(op: str) -> None:
    takes, gives, backward = TABLE[op]
    function, inputs = CASES[op]
    tensors = [torch.randn(shape, requires_grad=True) for shape in inputs]
    assert set(inputs) - {(B, N)} == shapes(takes) - {(B, N)}  # tokens [B, N] are not among the inputs
    out = function(*tensors)
    parts = out if isinstance(out, tuple) else (out,)
    leaves = [x for x in parts if isinstance(x, torch.Tensor)]
    assert shapes(gives) <= {tuple(x.shape) for x in leaves}
    assert ("`PatchLayout`" in gives) == any(isinstance(x, bk.PatchLayout) for x in parts)
    differentiable = [x for x in leaves if x.requires_grad]
    if backward == "no":
        for x in differentiable:  # only row_grad, a gradient itself, whose own gradient is an explained error
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(x.sum(), tensors)
    else:
        for x, grad in zip(tensors, torch.autograd.grad(differentiable[0].sum(), tensors), strict=True):
            assert grad.shape == x.shape


def quoted(program: str) -> list[list[str]]:
    """The arguments of every `program ...`, in backticks or on a line of its own, on the pages."""
    spans = re.findall(rf"`{program} ([^`]+)`|^{program} ([^#\n]+)", "\n".join(PAGES), flags=re.M)
    return [shlex.split(inline or line) for inline, line in spans]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {arguments[0] for arguments in quoted("make")}
    assert {"demo", "test"} <= named <= targets


def test_commands_of_the_cli_exist_with_their_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    named = quoted("blt-kernels")
    assert {name for name, *_ in named} >= {"train-entropy", "train", "eval"}
    for name, *arguments in named:
        assert name in commands
        if arguments:
            commands[name].make_context(name, arguments)  # raises for what it does not know


def test_modules_that_are_run_exist() -> None:
    for name in {arguments[1] for arguments in quoted("python") if arguments[0] == "-m"} - {"venv", "pip", "pytest"}:
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_templates_of_paths_match_files() -> None:
    """`csrc/ops/<op>.cpp` names a file for some op at least; and so does the op that docs/adding-an-op.md adds."""
    paths = set(re.findall(r"`((?:blt_kernels|benchmarks|csrc|tests|docs|examples)/[^`\s]*)`", "\n".join(PAGES)))
    paths = {re.sub(r"<\w+>|frobnicate", "*", path) for path in paths}
    assert [path for path in sorted(paths) if not list(ROOT.glob(path))] == []
