"""The counter itself: kernels whose work is known from reading them, and the arithmetic that has no kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emulation
import ptx
import pytest
import torch
from counting import cases, sass
from counting.limits import resident_warps
from counting.numbering import numbered
from counting.work import SECTOR, Line, Work, bytes_in_flight, issued, lines_of, work

from blt_kernels.reference import entropy

KERNELS = Path(__file__).parent / "counting" / "kernels"
LANES = 32

needs_tools = pytest.mark.skipif(
    ptx.nvcc() is None or sass.nvdisasm() is None, reason="not run: no nvcc or no package nvidia-cuda-nvdisasm"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The numbered PTX of the kernels of this test, by name of the file."""
    paths = ptx.compile_ptx(sorted(KERNELS.glob("*.cu")), tmp_path_factory.mktemp("ptx"))
    for path in paths:
        emulation.ops().ptx_load(str(path))
    return {path.stem: path for path in paths}


class Counted:
    """What a kernel did in one launch."""

    def __init__(self, path: Path, kernel: str, *tensors: torch.Tensor, blocks: int = 1, threads: int = LANES) -> None:
        ops: Any = emulation.ops()
        ops.ptx_reset()
        ops.ptx_run(kernel, blocks, threads, 0, list(tensors))
        self.lines, self.blocks = lines_of(ops.ptx_counts(kernel)), sass.blocks(path, kernel)
        self.work = work(self.blocks, self.lines)

    def issued(self, opcode: str) -> float:
        return sum(
            issued(block, self.lines) * sum(i.opcode == opcode for i in block.instructions) for block in self.blocks
        )


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@needs_tools
@pytest.mark.parametrize("turns", [1, 2, 10])
def test_a_loop(compiled: dict[str, Path], turns: int) -> None:
    found = Counted(compiled["checks"], "loop", torch.zeros(LANES * 10, dtype=torch.int32), integers(turns))
    assert found.issued("STG") == turns and found.issued("LDG") == turns + 1
    (body,) = (block for block in found.blocks if any(i.opcode == "STG" for i in block.instructions))
    # Read in SASS: address, load, two additions of indices, one of values, store, comparison, branch.
    assert len(body.instructions) == 8
    assert found.work.instructions == 9 + 8 * turns + 1  # what prepares the loop, and the exit behind it
    assert found.work.alu == 2 * (1 + 3 * turns)  # comparisons and additions that are no IMAD


@needs_tools
@pytest.mark.parametrize("boundary, ways, sectors", [(0, 1, 4), (32, 1, 4), (16, 2, 4), (31, 2, 5)])
def test_lanes_that_part_cost_both_ways(compiled: dict[str, Path], boundary: int, ways: int, sectors: int) -> None:
    found = Counted(compiled["checks"], "branch", torch.zeros(LANES * 12, dtype=torch.int32), integers(boundary))
    assert found.issued("STG") == 1 + 11 * ways  # the first store, of 0 on both ways, stands before the branch
    assert found.work.sectors == 1 + 4 + 11 * sectors  # the boundary, the first store, and both ways of the others


@needs_tools
@pytest.mark.parametrize("pitch, degree", [(1, 1), (2, 2), (4, 4), (8, 8), (32, 32), (33, 1)])
def test_conflicts_of_banks(compiled: dict[str, Path], pitch: int, degree: int) -> None:
    found = Counted(compiled["checks"], "banks", torch.zeros(LANES, dtype=torch.int32), integers(pitch))
    assert found.work.wavefronts == 2 * degree  # of the store and of the load


@needs_tools
@pytest.mark.parametrize("pitch, sectors", [(1, 4), (2, 8), (8, 32), (16, 32)])
def test_sectors(compiled: dict[str, Path], pitch: int, sectors: int) -> None:
    data, out = torch.zeros(LANES * pitch, dtype=torch.int32), torch.zeros(LANES, dtype=torch.int32)
    done = Counted(compiled["checks"], "stride", out, data, integers(pitch)).work
    of_out, of_pitch = 4 * LANES // SECTOR, 1
    assert done.sectors == sectors + of_out + of_pitch
    assert done.touched == 4 * LANES + 4 * LANES + 4


@needs_tools
@pytest.mark.parametrize("kernel, loads", [("one_load", 1), ("six_loads", 6)])
def test_bytes_in_flight(compiled: dict[str, Path], kernel: str, loads: int) -> None:
    found = Counted(compiled["checks"], kernel, torch.zeros(LANES), torch.zeros(LANES * 6 * 10), integers(10))
    assert bytes_in_flight(found.blocks, found.lines) == loads * LANES * 4


def test_a_load_for_the_next_round_is_in_flight() -> None:
    text = """
.L_x_1:
\t//## File "kernels.ptx", line 1
        /*0000*/                   FADD R9, R9, R0 ;
        /*0010*/                   LDG.E R0, desc[UR6][R2.64] ;
        /*0020*/                   FADD R9, R9, R1 ;
        /*0030*/                   LDG.E R1, desc[UR6][R2.64+0x80] ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
"""
    blocks = sass.parsed(text)
    assert [block.label for block in blocks] == [".L_x_1"]
    line = Line(issued=10, sectors=40, touched=1280, wavefronts=0)
    assert bytes_in_flight(blocks, {1: line}) == 2 * 128


@needs_tools
def test_the_entropy_kernel_that_was_counted_by_hand(compiled: dict[str, Path]) -> None:
    rows, vocabulary = 64, cases.VOCABULARY
    logits = cases.values(rows, vocabulary, dtype=torch.bfloat16)
    out = torch.zeros(rows)
    sizes = torch.tensor([rows, vocabulary, 4])
    found = Counted(compiled["old_entropy"], "old_entropy", logits, out, sizes, blocks=rows // 8, threads=256)
    assert found.work.instructions / rows == pytest.approx(472, rel=0.02)
    torch.testing.assert_close(out, entropy(logits))


@needs_tools
@pytest.mark.parametrize("name", ["entropy", "patch_gather"])
def test_line_numbers_do_not_change_the_code(name: str) -> None:
    (path,) = (path for path in ptx.library_ptx() if path.stem == name)
    with_lines, without_lines = (
        [line for line in sass.disassembled(sass.assembled(path, lines)[0]).splitlines() if "##" not in line]
        for lines in (True, False)
    )
    assert len(with_lines) > 1000 and with_lines == without_lines


@needs_tools
def test_every_instruction_of_the_library_has_a_number() -> None:
    for path in ptx.library_ptx():
        for kernel in sass.resources(path):
            assert 0 not in lines_of(ptx.interpreter().ptx_counts(kernel))


def test_numbers_of_lines() -> None:
    text = """.visible .entry k(\n\t.param .u64 p\n)\n{\n\t.reg .b32 %r<9>; // two; words
\tld.global.v2.u32 {%r1,%r2}, [%rd1];\n$L__BB0_1:\n\t{add.u32 %r3,%r1,%r2; not.b32 %r4,%r3;}
\t@!%p1 bra $L__BB0_1;\n\tret;\n}\n"""
    instructions = [line.strip() for line in numbered(text).splitlines() if line.strip()]
    found = {line: instructions[i + 1] for i, line in enumerate(instructions) if line.startswith(".loc")}
    assert found == {
        ".loc 1 1 0": "ld.global.v2.u32 {%r1,%r2}, [%rd1];",
        ".loc 1 2 0": "add.u32 %r3,%r1,%r2;",
        ".loc 1 3 0": "not.b32 %r4,%r3;}",
        ".loc 1 4 0": "@!%p1 bra $L__BB0_1;",
        ".loc 1 5 0": "ret;",
    }


def test_what_only_odd_values_reach_is_cold() -> None:
    text = """
        /*0000*/                   BRA.DIV UR4, `(.L_x_9) ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath) ;
        /*0030*/                   MOV R1, R2 ;
.L_x_1:
        /*0040*/                   EXIT ;
.L_x_9:
        /*0050*/                   WARPSYNC.COLLECTIVE R3, `(.L_x_10) ;
.L_x_10:
        /*0060*/                   BRA `(.L_x_1) ;
$__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:
        /*0070*/                   RET.REL.NODEC R2 `(k) ;
.L_x_11:
        /*0080*/                   BRA `(.L_x_11) ;
"""
    found = [(block.instructions[0].opcode, block.cold) for block in sass.parsed(text)]
    assert found == [
        ("BRA", False), ("BRA", False), ("CALL", True), ("EXIT", False),
        ("WARPSYNC", True), ("BRA", True), ("RET", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "registers, threads, shared, warps",
    [
        (32, 256, 0, 64),  # the most there are
        (64, 256, 0, 32),  # 8 warps a quarter
        (80, 256, 0, 24),  # 6 warps a quarter
        (81, 256, 0, 16),  # 88 registers: 5 warps a quarter, 20 in all, of which blocks of 8 take 16
        (81, 128, 0, 20),
        (255, 256, 0, 8),
        (32, 32, 0, 32),  # the most blocks there are
        (32, 256, 48 * 1024, 32),  # 4 blocks of 49 KB
        (32, 100, 0, 64),  # a warp is whole
    ],
)
def test_resident_warps(registers: int, threads: int, shared: int, warps: int) -> None:
    assert resident_warps(registers, threads, shared) == warps


def test_work_adds_up() -> None:
    assert Work(1, 2, 3, 4, 5, 6, 7) + Work(10, 20, 30, 40, 50, 60, 70) == Work(11, 22, 33, 44, 55, 66, 77)


def test_the_central_row() -> None:
    layout = cases.layout_of_central_row()
    assert layout.num_bytes == cases.BYTES and cases.BYTES / layout.capacity == pytest.approx(4.3, abs=0.05)
    x = cases.values(1000, 50)
    assert x.unique().numel() > 40000 and float(x.min()) < -1.99 and float(x.max()) > 1.99
