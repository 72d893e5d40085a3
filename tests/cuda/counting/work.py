"""What a kernel did in an op: how often its SASS instructions were issued, and what its accesses moved.

A SASS instruction knows the PTX instruction that it was made from, and the interpreter knows how often that one ran.
The compiler moves instructions between blocks and makes several of one, so that single ones mislead: a block of SASS
was issued as often as the median of its instructions says. Slow paths (`sass.Block.cold`) are left out.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Iterable, Sequence

import torch

from .sass import Block, Instruction

# The pipes of a quarter of a multiprocessor that take a warp instruction for more than one cycle: the ALU has 16 lanes
# (logic, comparisons, integer addition, minima, packed conversions), the special function unit 4 (exponentials,
# reciprocals, conversions that are not packed, counts of bits). Other pipes are not modelled. Those of floating-point
# multiplication and IMAD take one or two cycles, and the compiler balances them against the ALU.
ALU = frozenset((
    "F2FP", "FMNMX", "FSEL", "FSET", "FSETP", "HMNMX2", "HSET2", "HSETP2", "I2FP", "IABS", "IADD3", "IMNMX", "ISETP",
    "LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SEL", "SGXT", "SHF", "VHMNMX", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3",
))  # fmt: skip
ALU_CYCLES = 2
SPECIAL = frozenset(("BREV", "F2F", "F2I", "FLO", "FRND", "I2F", "MUFU", "POPC"))
SPECIAL_CYCLES = 8

SECTOR = 32  # bytes: the least that a multiprocessor fetches


@dataclasses.dataclass(frozen=True)
class Line:
    """What a PTX instruction did in all launches of an op.

    Attributes:
        issued: warp executions.
        sectors: of global memory, counted anew for each warp execution.
        touched: distinct bytes of global memory, counted likewise.
        wavefronts: of shared memory, the cycles for which an access occupies it.
    """

    issued: int
    sectors: int
    touched: int
    wavefronts: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What one or more kernels did in an op.

    Attributes:
        instructions: SASS warp instructions.
        alu: cycles of the ALU pipe of a quarter of a multiprocessor.
        special: likewise of the special function unit.
        shuffles: warp instructions that exchange registers between lanes.
        wavefronts: of shared memory.
        sectors: of global memory.
        touched: distinct bytes of global memory of each access.
    """

    instructions: float = 0
    alu: float = 0
    special: float = 0
    shuffles: float = 0
    wavefronts: int = 0
    sectors: int = 0
    touched: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def lines_of(counts: torch.Tensor) -> dict[int, Line]:
    """By number of the PTX line, from what the interpreter counted, int64 [instructions, 7]."""
    lines = {
        number: Line(issued, sectors, touched, wavefronts)
        for number, issued, _lanes, sectors, touched, wavefronts, _size in counts.tolist()
    }
    assert len(lines) == len(counts), "expected a number of its own for every PTX instruction"
    return lines


def issued(block: Block, lines: dict[int, Line]) -> float:
    """How often a block was issued."""
    if block.cold:
        return 0
    known = [lines[i.line].issued for i in block.instructions if i.line in lines]
    return statistics.median(known) if known else 0


def work(blocks: Iterable[Block], lines: dict[int, Line]) -> Work:
    """The work of a kernel with these blocks of SASS."""
    instructions = alu = special = shuffles = 0.0
    for block in blocks:
        times = issued(block, lines)
        opcodes = [instruction.opcode for instruction in block.instructions]
        instructions += times * len(opcodes)
        alu += times * ALU_CYCLES * sum(opcode in ALU for opcode in opcodes)
        special += times * SPECIAL_CYCLES * sum(opcode in SPECIAL for opcode in opcodes)
        shuffles += times * opcodes.count("SHFL")
    return Work(
        instructions,
        alu,
        special,
        shuffles,
        wavefronts=sum(line.wavefronts for line in lines.values()),
        sectors=sum(line.sectors for line in lines.values()),
        touched=sum(line.touched for line in lines.values()),
    )


def _registers(text: str) -> set[int]:
    """The registers that an instruction names, as operands or result: R4 and R5 in `R4.64`, 4 in a 128-bit access."""
    opcode, _, operands = text.partition(" ")
    width = max((bits // 32 for bits in (64, 128) if f".{bits}" in opcode), default=1)
    named = set()
    for number, wide in re.findall(r"\bR(\d+)(\.64)?", operands):
        # The data of a wide access is several registers, the address in brackets at most two.
        named |= set(range(int(number), int(number) + (2 if wide else 1)))
    for number in re.findall(r"\bR(\d+)\b", re.sub(r"\[.*?\]", "", operands)):
        named |= set(range(int(number), int(number) + width))
    return named


def _hot_path(blocks: Sequence[Block], lines: dict[int, Line]) -> list[tuple[Instruction, float]]:
    """The instructions of the hottest straight line, in the order of addresses, and how often each was issued.

    The line consists of the blocks that were issued at least half as often as the block that loads the most bytes. If
    they end with a branch back to one of them, the loop is appended once more, so that what is loaded in one round and
    needed in the next is seen as under way between the two.
    """
    times = [issued(block, lines) for block in blocks]
    loaded = [
        t * sum(bytes_of_load(i, lines) for i in block.instructions) for t, block in zip(times, blocks, strict=True)
    ]
    if not any(loaded):
        return []
    least = times[loaded.index(max(loaded))] / 2
    hot = [index for index, t in enumerate(times) if t >= least and not blocks[index].cold]
    path = list(hot)
    for at in hot:
        if match := re.search(r"BRA.*`\((\S+)\)", blocks[at].instructions[-1].text):
            begin = next((index for index in hot if blocks[index].label == match[1]), at + 1)
            if begin <= at:
                path += [index for index in hot if begin <= index <= at]
    return [(instruction, times[index]) for index in path for instruction in blocks[index].instructions]


def bytes_of_load(instruction: Instruction, lines: dict[int, Line]) -> float:
    """Distinct bytes that a warp loads from global memory into registers with this instruction, on average."""
    line = lines.get(instruction.line)
    return line.touched / line.issued if instruction.opcode == "LDG" and line is not None and line.issued else 0


def bytes_in_flight(blocks: Sequence[Block], lines: dict[int, Line]) -> float:
    """The bytes that a warp has asked of global memory when it first waits for one of them.

    A warp issues in order. Along the hottest straight line (`_hot_path`) it issues loads until an instruction names a
    register that is being loaded; there it waits, and that load and those before it have arrived. Each load has seen
    under way what was under way at the first wait behind it. The result is the mean of this over all loads, weighted by
    their bytes, so that a few indices that are read first count for little.
    """
    waiting: list[tuple[float, set[int]]] = []  # bytes and registers of the loads under way, the oldest first
    unseen = 0.0  # bytes of loads since the last wait, times how often they were issued
    seen = total = 0.0
    path = _hot_path(blocks, lines)
    for instruction, times in path:
        named = _registers(instruction.text)
        needed = [i for i, (_, registers) in enumerate(waiting) if registers & named]
        if needed:
            seen += unseen * sum(size for size, _ in waiting)
            unseen = 0
            del waiting[: needed[-1] + 1]
        if size := bytes_of_load(instruction, lines):
            target = instruction.text.partition(" ")[2].split(",")[0]
            waiting.append((size, _registers(f"{instruction.text.split()[0]} {target}")))
            unseen += size * times
            total += size * times
    seen += unseen * sum(size for size, _ in waiting)
    return seen / total if total else 0
