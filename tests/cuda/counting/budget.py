"""csrc/cuda/budget.json: what every kernel may need, and what every op at its central shapes may cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ptx
from emulation import REPOSITORY

from . import sass
from .cases import Case, cases
from .limits import resident_warps
from .work import SECTOR, Work, bytes_in_flight, lines_of, work

PATH = REPOSITORY / "csrc" / "cuda" / "budget.json"
Figures = dict[str, Any]

# Figures that may not fall; all others may not rise.
MORE_IS_BETTER = ("resident_warps", "bytes_in_flight", "sector_efficiency")


def read() -> dict[str, Any]:
    return json.loads(PATH.read_text())


def found() -> dict[str, Any]:
    """What the budget would be if it were written now."""
    return {
        "nvcc": ptx.nvcc_version(),
        "nvdisasm": sass.nvdisasm_version(),
        "sm": ptx.SM,
        "kernels": {path.stem: kernels(path) for path in ptx.library_ptx()},
        "ops": {case.name: figures for case, figures in measured()},
    }


def kernels(path: Path) -> dict[str, Figures]:
    """Registers, spilled bytes and static shared memory of every kernel of a PTX file."""
    needs = sass.resources(path)
    names = sass.short_names(needs)
    return {
        names[name]: {"registers": of.registers, "spilled": of.spilled, "shared": of.shared}
        for name, of in sorted(needs.items(), key=lambda item: names[item[0]])
    }


class Interpreted:
    """The ops, whose kernels the interpreter runs."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: ptx.interpret(name, args)


def measured() -> Iterator[tuple[Case, Figures]]:
    """Each case with what it costs: a byte that must move, for all its kernels together, and kernel by kernel."""
    ops = ptx.interpreter()
    sources = {kernel: path for path in ptx.library_ptx() for kernel in sass.resources(path)}
    names = sass.short_names(sources)
    for case in cases(Interpreted()):
        ops.ptx_reset()
        case.call()
        total, parts = Work(), {}
        for kernel in sorted(sources.keys() & ops.ptx_launched().split(), key=lambda kernel: names[kernel]):
            lines = lines_of(ops.ptx_counts(kernel))
            if not any(line.issued for line in lines.values()):
                continue  # launched by an earlier case
            blocks, needs = sass.blocks(sources[kernel], kernel), sass.resources(sources[kernel])[kernel]
            done = work(blocks, lines)
            warps = resident_warps(needs.registers, *ops.ptx_block(kernel).tolist())
            total += done
            parts[names[kernel]] = {
                **costs(done, case.moved),
                "resident_warps": warps,
                "bytes_in_flight": round(warps * bytes_in_flight(blocks, lines)),
            }
        yield case, {"moves": case.moves, "bytes": case.moved, "all": costs(total, case.moved), "kernels": parts}


def costs(done: Work, moved: int) -> Figures:
    """Figures a byte that must move, to four digits, which is as exact as anybody reads them."""
    each = {
        "instructions": done.instructions, "alu_cycles": done.alu, "special_cycles": done.special,
        "shuffles": done.shuffles, "shared_wavefronts": done.wavefronts, "accessed": done.touched,
    }  # fmt: skip
    rounded = {name: float(f"{count / moved:.4g}") for name, count in each.items()}
    efficiency = done.touched / (SECTOR * done.sectors) if done.sectors else 1.0
    return {**rounded, "sector_efficiency": float(f"{efficiency:.4g}")}


def worse(found: Figures, allowed: Figures, name: str) -> Iterator[str]:
    """A line for each figure that is worse than the budget allows, and for kernels that came or went."""
    if found.keys() != allowed.keys():
        yield f"{name}: expected {', '.join(allowed)}, got {', '.join(found)}"
        return
    for figure, now in found.items():
        limit = allowed[figure]
        if isinstance(now, dict):
            yield from worse(now, limit, f"{name}: {figure}")
        elif isinstance(now, str) or figure == "bytes":
            if now != limit:
                yield f"{name}: {figure} {now}, budget {limit}"
        elif now < limit if figure in MORE_IS_BETTER else now > limit:
            yield f"{name}: {figure} {now}, budget {limit}"


def write(found: dict[str, Any]) -> None:
    """Writes the budget with a line for each kernel, so that a change of one is a change of a line."""

    def text(value: Any, indent: int) -> str:
        if not isinstance(value, dict) or not any(isinstance(inner, dict) for inner in value.values()):
            return json.dumps(value)
        pad = " " * (indent + 1)
        lines = (f"{pad}{json.dumps(key)}: {text(inner, indent + 1)}" for key, inner in value.items())
        return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"

    PATH.write_text(text(found, 0) + "\n")
