"""SASS of numbered PTX: for each kernel what it needs and its basic blocks, whose instructions know their PTX line."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import ptx

_ENDS_BLOCK = ("BRA", "BRX", "JMP", "EXIT", "RET", "BREAK", "BSYNC")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One SASS instruction.

    Attributes:
        text: without its guard and the semicolon, such as "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]".
        line: the number of the PTX instruction it was made from; 0 where the assembler does not say.
    """

    text: str
    line: int

    @property
    def opcode(self) -> str:
        """Such as "LDG", without modifiers."""
        return self.text.split()[0].split(".")[0]


@dataclasses.dataclass
class Block:
    """Instructions that are issued equally often.

    Attributes:
        label: where branches to this block point; empty if none does.
        cold: whether it is left out of counts, because it belongs to a slow path that is taken for odd values only.
    """

    label: str = ""
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    cold: bool = False


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a kernel needs of a multiprocessor.

    Attributes:
        registers: of a thread.
        spilled: bytes stored to and loaded from local memory for want of registers.
        shared: bytes of static shared memory of a block.
    """

    registers: int
    spilled: int
    shared: int


def ptxas() -> str:
    """The assembler that lies beside nvcc."""
    compiler = ptx.nvcc()
    assert compiler is not None, "ptxas: expected an nvcc beside it, got none"
    return str(Path(compiler).resolve().parent / "ptxas")


def nvdisasm() -> Path | None:
    """The disassembler of the package nvidia-cuda-nvdisasm, if that is installed."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name in ("nvdisasm", "nvdisasm.exe")), None)


def nvdisasm_version() -> str:
    return importlib.metadata.version("nvidia-cuda-nvdisasm")


@functools.cache
def assembled(path: Path, lines: bool = True) -> tuple[Path, str]:
    """`(cubin, what ptxas -v says)` of a PTX file. They lie beside it, and are made where they are missing.

    Args:
        lines: whether the cubin says from which line an instruction comes.
    """
    cubin = path.with_suffix(".cubin" if lines else ".without_lines.cubin")
    report = cubin.with_suffix(".txt")
    if not report.exists():
        command = [ptxas(), "-arch", ptx.SM, "-O3", "-v", *(["-lineinfo"] if lines else [])]
        done = subprocess.run([*command, "-o", str(cubin), str(path)], capture_output=True, text=True)
        assert done.returncode == 0, f"ptxas {path.name}: {done.stderr}"
        report.write_text(done.stderr)
    return cubin, report.read_text()


@functools.cache
def resources(path: Path) -> dict[str, Resources]:
    """What each kernel of a numbered PTX file needs, by mangled name, as ptxas reports it."""
    _, report = assembled(path)
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers([^\n]*)", part)
        assert spills is not None and used is not None, f"ptxas -v: expected spills and registers, got {part!r}"
        shared = re.search(r"(\d+) bytes smem", used[2])
        found[name] = Resources(
            registers=int(used[1]),
            spilled=int(spills[1]) + int(spills[2]),
            shared=int(shared[1]) if shared else 0,
        )
    return found


def disassembled(cubin: Path) -> str:
    """What nvdisasm prints for a cubin, with the lines that its instructions come from. It lies beside the cubin."""
    tool = nvdisasm()
    assert tool is not None, "nvdisasm: expected the package nvidia-cuda-nvdisasm, got none"
    path = cubin.with_suffix(f".{nvdisasm_version()}.sass")
    if not path.exists():
        done = subprocess.run([str(tool), "-g", "-c", str(cubin)], capture_output=True, text=True)
        assert done.returncode == 0, f"nvdisasm {cubin.name}: {done.stderr}"
        path.write_text(done.stdout)
    return path.read_text()


@functools.cache
def _sections(path: Path) -> dict[str, str]:
    """The disassembly of each kernel, by mangled name."""
    text = disassembled(assembled(path)[0])
    return dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\t\.section|\Z)", text, re.MULTILINE | re.DOTALL))


@functools.cache
def blocks(path: Path, kernel: str) -> list[Block]:
    """The blocks of a kernel, by its mangled name, in the order of their addresses."""
    return parsed(_sections(path)[kernel])


def parsed(section: str) -> list[Block]:
    """The blocks of a kernel from its part of what nvdisasm -g -c prints."""
    found, line, slow = [Block()], 0, False
    # Where warps go that have diverged before a shuffle. This code stands behind all other code of the kernel.
    fallbacks = set(re.findall(r"BRA\.DIV .*`\((\S+)\)", section))
    for text in section.splitlines():
        if match := re.match(r'\s*//## File ".*?", line (\d+)', text):
            line = int(match[1])
        elif match := re.match(r"(\.L_x_\d+|\$\S+):", text):
            slow = slow or "__internal" in match[1] or match[1] in fallbacks
            if not _only_joins(found[-1]):
                found.append(Block(match[1], cold=slow))
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", text):
            instruction = Instruction(match[1], line)
            if instruction.opcode == "NOP":
                continue
            block = found[-1]
            block.instructions.append(instruction)
            # A call returns and ends no block. What calls a slow path, such as that of a division, is cold itself.
            block.cold |= instruction.opcode == "CALL" and "slowpath" in instruction.text
            if instruction.opcode in _ENDS_BLOCK and not _only_joins(block):
                found.append(Block(cold=slow))
    # Behind the last instruction stands a branch to itself, which is never reached.
    return [block for block in found if block.instructions and not _is_branch_to_itself(block)]


def _only_joins(block: Block) -> bool:
    """Whether nothing but the end of a divergence is in it, whose line says nothing: it belongs to what follows."""
    return bool(block.instructions) and all(instruction.opcode == "BSYNC" for instruction in block.instructions)


def _is_branch_to_itself(block: Block) -> bool:
    return bool(block.label) and block.instructions[0].text == f"BRA `({block.label})"


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """`entropy_kernel<float>` for each mangled name: without namespaces, return type and parameters."""
    names = list(mangled)
    return {
        name: re.sub(r"blt::(cuda::)?|^void |\([^()]*\)$", "", text)
        for name, text in zip(names, ptx.readable(names), strict=True)
    }
