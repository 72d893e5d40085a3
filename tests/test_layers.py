"""Who may import whom: the kernel library stands alone, and nothing imports what is built on top of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "blt_kernels"
# What is built on the kernel library, each with the folders that it may import besides the kernel library and itself.
ABOVE = {
    "data": (),
    "model": (),
    "training": ("data", "model"),
    "generation": ("data", "model", "training"),
    "checkpoints": ("data", "model", "training"),
    "cli": ("checkpoints", "data", "generation", "model", "training"),
}
# `BLT.from_pretrained` is where users look for it, and what it calls stands above. It imports it when it is called.
UPWARDS = {("model/blt.py", "checkpoints.from_pretrained")}


def imported(path: Path) -> Iterator[str]:
    """The dotted names, below `blt_kernels`, of all that a file imports, wherever in the file it does so."""
    package = ("blt_kernels", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("blt_kernels.") for name in names if name.startswith("blt_kernels."))
        yield from (name for name in names if name.partition(".")[0] in ("benchmarks", "tests"))


# `python -m blt_kernels` starts the command line; nothing imports that file.
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__main__.py")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_downwards(file: Path) -> None:
    folder = file.parts[0] if file.parts[0] in ABOVE else None
    allowed = {folder, *ABOVE[folder]} if folder else set()
    wrong = [
        name
        for name in imported(PACKAGE / file)
        if name.split(".")[0] in {*ABOVE, "benchmarks", "tests"} - allowed and (str(file), name) not in UPWARDS
    ]
    assert wrong == []


def test_the_rule_is_seen_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of imports finds each form of an import that the rule forbids."""
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    file = tmp_path / "ops" / "entropy.py"
    file.parent.mkdir()
    file.write_text(
        "import blt_kernels.model.blt\n"
        "from ..training import trainer\n"
        "def f():\n"
        "    from .. import cli, layout\n"
        "    import benchmarks.ops\n"
    )
    assert {name.split(".")[0] for name in imported(file)} == {"model", "training", "cli", "layout", "benchmarks"}
