"""What the pages and docstrings name exists: names, files, links and parameters. `make docs` checks the rest."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import blt_kernels

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
SOURCES = sorted((ROOT / "blt_kernels").rglob("*.py"))
# The op that docs/adding-an-op.md adds.
IMAGINARY = "frobnicate"
FOLDERS = "benchmarks|blt_kernels|csrc|docs|examples|tests"


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_backticks_exist(path: Path) -> None:
    names = set(re.findall(r"`(blt_kernels(?:\.\w+)+)(?:\(\))?`", path.read_text()))
    assert [name for name in sorted(names) if not exists(name)] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_page_names_exist(path: Path) -> None:
    text = path.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    files = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [file for file in files if not (ROOT / file).exists() and IMAGINARY not in file]
    assert missing == []


def public() -> Iterator[tuple[str, Any]]:
    for module in ("blt_kernels", "blt_kernels.nn", "blt_kernels.model", "blt_kernels.data", "blt_kernels.generation"):
        namespace = importlib.import_module(module)
        for name in getattr(namespace, "__all__", vars(namespace)):
            value = getattr(namespace, name)
            if not callable(value) or not value.__module__.startswith(module) or name.startswith("_"):
                continue
            yield f"{module}.{name}", value
            for method, function in inspect.getmembers(value, callable) if inspect.isclass(value) else ():
                if not method.startswith("_") and (getattr(function, "__module__", "") or "").startswith("blt_kernels"):
                    yield f"{module}.{name}.{method}", function


PUBLIC = dict(public())


def documented_parameters(doc: str) -> list[str]:
    """The names of a Google-style Args section; "a, b: text" are two."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", doc, flags=re.M)
    heads = re.findall(r"^    (\w[\w, ]*):", section[1], flags=re.M) if section else []
    return [name for head in heads for name in re.split(r", *", head)]


@pytest.mark.parametrize("name", PUBLIC)
def test_documented_parameters_are_those_of_the_signature(name: str) -> None:
    parameters = inspect.signature(PUBLIC[name]).parameters
    wrong = [p for p in documented_parameters(inspect.getdoc(PUBLIC[name]) or "") if p not in parameters]
    assert wrong == []


def test_everything_public_in_the_package_has_a_docstring() -> None:
    values = {name: getattr(blt_kernels, name) for name in blt_kernels.__all__}
    assert [name for name, value in values.items() if callable(value) and not inspect.getdoc(value)] == []


def test_a_stale_name_is_found() -> None:
    """The checks above see what they are there for."""
    assert exists("blt_kernels.nn.HashNgramEmbedding") and not exists("blt_kernels.nn.NoSuchThing")
    doc = "One line.\n\nArgs:\n    a, b: two of them\n        and more.\n    c: one.\n"
    assert documented_parameters(doc) == ["a", "b", "c"]
