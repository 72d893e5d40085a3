"""Single instructions in the interpreter of PTX: those whose semantics are easy to get wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch

LANES = 32
ALL = 0xFFFFFFFF
HEADER = ".version 8.0\n.target sm_90a\n.address_size 64\n"

Run = Callable[..., torch.Tensor]


def bits(*values: int) -> torch.Tensor:
    """int32 with these bits."""
    return torch.tensor([v - (1 << 32) if v >= 1 << 31 else v for v in values], dtype=torch.int32)


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def pairs(values: torch.Tensor) -> torch.Tensor:
    """16-bit floats [2 n] as n registers, the first of each two in the low half."""
    return values.contiguous().view(torch.int32)


def lanes(values: torch.Tensor) -> torch.Tensor:
    """The values, repeated to 32."""
    return values.repeat(math.ceil(LANES / len(values)))[:LANES].contiguous()


class Machine:
    """Runs pieces of PTX."""

    def __init__(self, ops: Any, folder: Path) -> None:
        self.ops, self.folder, self.numbers = ops, folder, itertools.count()

    def load(self, name: str, text: str) -> None:
        path = self.folder / f"{name}.ptx"
        path.write_text(HEADER + text)
        self.ops.ptx_load(str(path))

    def kernel(self, body: str, num_tensors: int = 1) -> str:
        """Loads a kernel with parameters p0, p1, ... whose registers are named %r, %rd, %f, %p and %h."""
        name = f"piece_{next(self.numbers)}"
        parameters = ", ".join(f".param .u64 p{i}" for i in range(num_tensors))
        registers = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .b64 %rd<99>;"
        self.load(name, f".visible .entry {name}({parameters})\n{{\n{registers}\n{body}\nret;\n}}\n")
        return name

    def run(self, name: str, *tensors: torch.Tensor, blocks: int = 1, threads: int = LANES, shared: int = 0) -> None:
        self.ops.ptx_run(name, blocks, threads, shared, list(tensors))

    def evaluate(self, instructions: str, result: torch.dtype, **inputs: torch.Tensor) -> torch.Tensor:
        """What register `d` is after these instructions, whose other registers are named like the inputs.

        A lane has an element of each input; the first lanes' results come back.
        """
        count = max(map(len, inputs.values()))
        out = torch.zeros(LANES, dtype=result)
        wide = {name: lanes(value) for name, value in inputs.items()} | {"d": out}
        text = ["mov.u32 %r0, %tid.x;"]
        for i, (name, value) in enumerate(wide.items()):
            size = value.element_size()
            text.append(f".reg .b{8 * size} {name}; ld.param.u64 %rd1, [p{i}];")
            text.append(f"mul.wide.u32 %rd0, %r0, {size}; add.s64 %rd{10 + i}, %rd1, %rd0;")
            if name != "d":
                text.append(f"ld.global.b{8 * size} {name}, [%rd{10 + i}];")
        text += [instructions, f"st.global.b{8 * out.element_size()} [%rd{9 + len(wide)}], d;"]
        self.run(self.kernel("\n".join(text), len(wide)), *wide.values())
        return out[:count]


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(emulation.ops(), tmp_path_factory.mktemp("ptx"))


@pytest.mark.parametrize(
    ("instruction", "dtype", "operands", "expected"),
    [
        ("add.s32 d, a, b;", torch.int32, (0x7FFFFFFF, 1), 0x80000000),
        ("mul.hi.s32 d, a, b;", torch.int32, (0xFFFFFFFF, 2), 0xFFFFFFFF),
        ("mul.hi.u32 d, a, b;", torch.int32, (0xFFFFFFFF, 2), 1),
        ("mul.wide.s32 d, a, b;", torch.int64, (0xFFFFFFFF, 2), -2),
        ("mul.wide.u32 d, a, b;", torch.int64, (0xFFFFFFFF, 2), 0x1FFFFFFFE),
        ("shl.b32 d, a, b;", torch.int32, (1, 32), 0),
        ("shr.u32 d, a, b;", torch.int32, (0x80000000, 32), 0),
        ("shr.s32 d, a, b;", torch.int32, (0x80000000, 40), 0xFFFFFFFF),
        ("shf.l.wrap.b32 d, a, b, 36;", torch.int32, (0x80000000, 1), 0x18),
        ("shf.r.clamp.b32 d, a, b, 36;", torch.int32, (5, 7), 7),
        ("prmt.b32 d, a, b, 0x7A40;", torch.int32, (0x00800011, 0x44332255), 0x44FF5511),
        ("lop3.b32 d, a, b, 0xff, 0x96;", torch.int32, (0xF0F0, 0xFF00), 0x0F0F),
        ("bfe.s32 d, a, 4, b;", torch.int32, (0xF0, 4), 0xFFFFFFFF),
        ("bfe.u32 d, a, 28, b;", torch.int32, (0xF0000000, 9), 0xF),
        ("bfi.b32 d, a, b, 8, 4;", torch.int32, (0x1AB, 0x11111111), 0x11111B11),
        ("brev.b32 d, a; add.s32 d, d, b;", torch.int32, (1, 0), 0x80000000),
        ("bfind.shiftamt.u32 d, a; add.s32 d, d, b;", torch.int32, (0x8000, 0), 16),
        ("bfind.s32 d, a; add.s32 d, d, b;", torch.int32, (0xFFFFFFFF, 0), 0xFFFFFFFF),
        ("bfind.u32 d, a; add.s32 d, d, b;", torch.int32, (0x8000, 0), 15),
        ("clz.b32 d, a; add.s32 d, d, b;", torch.int32, (0, 0), 32),
        ("mad.lo.s32 d, a, b, a;", torch.int32, (0x10001, 0x10000), 0x20001),
        ("rem.s32 d, a, b;", torch.int32, (0xFFFFFFF9, 4), 0xFFFFFFFD),
        ("cvt.s8.s32 d, a; add.s32 d, d, b;", torch.int32, (0x1FF, 0), 0xFFFFFFFF),
        ("cvt.u8.u32 d, a; add.s32 d, d, b;", torch.int32, (0x1FF, 0), 0xFF),
        ("mov.b32 {%h1, %h2}, a; mov.b32 d, {%h2, %h1};", torch.int32, (0x12345678, 0), 0x56781234),
    ],
)  # fmt: skip
def test_integers(
    machine: Machine, instruction: str, dtype: torch.dtype, operands: tuple[int, int], expected: int
) -> None:
    a, b = operands
    got = machine.evaluate(instruction, dtype, a=bits(a), b=bits(b))
    assert got.tolist() == (bits(expected).tolist() if dtype == torch.int32 else [expected])


def test_a_conversion_reads_the_low_half_of_a_wider_register(machine: Machine) -> None:
    a = torch.tensor([0x7_FFFF_FFFE, 5], dtype=torch.int64)
    assert machine.evaluate("cvt.s64.s32 d, a;", torch.int64, a=a).tolist() == [-2, 5]
    assert machine.evaluate("cvt.u64.u32 d, a;", torch.int64, a=a).tolist() == [0xFFFFFFFE, 5]


def test_other_registers_of_the_wrong_width_are_refused(machine: Machine) -> None:
    with pytest.raises(RuntimeError, match=r"`add.s32 d, a, a` .* has 8 bytes instead of 4"):
        machine.evaluate("add.s32 d, a, a;", torch.int32, a=torch.zeros(1, dtype=torch.int64))


def test_fma_rounds_once(machine: Machine) -> None:
    a = floats(1 + 2**-12)
    c = floats(-1 - 2**-11)
    assert machine.evaluate("fma.rn.f32 d, a, a, c;", torch.float32, a=a, c=c).item() == 2**-24
    assert machine.evaluate("mul.f32 d, a, a; add.f32 d, d, c;", torch.float32, a=a, c=c).item() == 0


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_fma_of_16_bits_rounds_once(machine: Machine, dtype: torch.dtype, name: str) -> None:
    # The product, 1.5 + 1.5 eps, lies half way between two numbers, and a double would lose what is added.
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    a, b, c = (torch.tensor(x, dtype=dtype) for x in ([1.5, 1.5], [1 + eps, 1 + eps], [tiny, -tiny]))
    got = machine.evaluate(f"fma.rn.{name}x2 d, a, b, c;", torch.int32, a=pairs(a), b=pairs(b), c=pairs(c))
    assert got.view(dtype).tolist() == [1.5 + 2 * eps, 1.5 + eps]


def test_flush_to_zero(machine: Machine) -> None:
    a = floats(-130, 1e-40, -1e-40, 2.0)
    inf = math.inf
    assert machine.evaluate("ex2.approx.ftz.f32 d, a;", torch.float32, a=a).tolist() == [0, 1, 1, 4]
    assert machine.evaluate("ex2.approx.f32 d, a;", torch.float32, a=a).tolist() == [2.0**-130, 1, 1, 4]
    assert machine.evaluate("rcp.approx.ftz.f32 d, a;", torch.float32, a=a).tolist()[1:] == [inf, -inf, 0.5]
    got = machine.evaluate("lg2.approx.ftz.f32 d, a;", torch.float32, a=a)
    assert math.isnan(got[0]) and got.tolist()[1:] == [-inf, -inf, 1]


def test_maxima_of_nan_and_zeros(machine: Machine) -> None:
    a, b = floats(math.nan, 1, -0.0, 0.0), floats(1, math.nan, 0.0, -0.0)
    assert machine.evaluate("max.f32 d, a, b;", torch.float32, a=a, b=b).tolist()[:2] == [1, 1]
    for op, zero in (("max", 0), ("min", 0x80000000)):
        got = machine.evaluate(f"{op}.NaN.f32 d, a, b;", torch.int32, a=a, b=b)
        assert torch.equal(got[2:], bits(zero, zero))
        assert got[:2].view(torch.float32).isnan().all()


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16x2"), (torch.float16, "f16x2")])
def test_pairs(machine: Machine, dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 2 * LANES).to(dtype)
    a[3] = b[6] = math.nan
    b[9] = a[9]
    a[12], b[12] = 0.0, -0.0
    comparisons = {"eq": a == b, "neu": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    for comparison, holds in comparisons.items():
        got = machine.evaluate(f"set.{comparison}.{name}.{name} d, a, b;", torch.int32, a=pairs(a), b=pairs(b))
        assert torch.equal(got.view(dtype), holds.to(dtype))
    for op, expected in (
        ("max.NaN", torch.maximum(a, b)),
        ("min.NaN", torch.minimum(a, b)),
        ("add.rn", (a.double() + b.double()).to(dtype)),
        ("mul.rn", (a.double() * b.double()).to(dtype)),
    ):
        got = machine.evaluate(f"{op}.{name} d, a, b;", torch.int32, a=pairs(a), b=pairs(b)).view(dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    got = machine.evaluate(f"fma.rn.{name} d, a, b, c;", torch.int32, a=pairs(a), b=pairs(b), c=pairs(c)).view(dtype)
    torch.testing.assert_close(got, (a.double() * b.double() + c.double()).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_conversions_of_16_bits(machine: Machine, dtype: torch.dtype, name: str) -> None:
    eps = torch.finfo(dtype).eps
    x = floats(1 + eps / 2, 1 + 1.5 * eps, -1 - eps / 2 - 2**-20, math.inf, 1e-40, 3.1415)  # ties go to even
    got = machine.evaluate(f"{{ .reg .b16 h; cvt.rn.{name}.f32 h, a; cvt.f32.{name} d, h; }}", torch.float32, a=x)
    assert torch.equal(got, x.to(dtype).float())
    # The first source is the high half.
    got = machine.evaluate(f"cvt.rn.{name}x2.f32 d, a, b;", torch.int32, a=floats(1), b=floats(2)).view(dtype)
    assert got.tolist() == [2, 1]


def test_rounding_to_integers_saturates(machine: Machine) -> None:
    a = floats(2.5, -2.5, 3e9, -3e9, math.nan)
    assert machine.evaluate("cvt.rni.s32.f32 d, a;", torch.int32, a=a).tolist() == [2, -2, 2**31 - 1, -(2**31), 0]
    assert machine.evaluate("cvt.rzi.u32.f32 d, a;", torch.int32, a=a).tolist() == [2, 0, -1294967296, 0, 0]


def test_the_rough_reciprocal_has_no_low_half(machine: Machine) -> None:
    a = torch.tensor([3.0, 1e-310], dtype=torch.float64)
    got = machine.evaluate("rcp.approx.ftz.f64 d, a;", torch.float64, a=a)
    assert got[0].item() == pytest.approx(1 / 3, rel=2**-20) and got[0].view(torch.int64).item() % 2**32 == 0
    assert got[1].item() == math.inf


def test_comparisons(machine: Machine) -> None:
    a, b = floats(1, 2, math.nan), floats(2, 2, 1)
    for name, expected in (("lt", [1, 0, 0]), ("geu", [0, 1, 1]), ("ne", [1, 0, 0]), ("neu", [1, 0, 1]),
                           ("nan", [0, 0, 1]), ("equ", [0, 1, 1])):  # fmt: skip
        got = machine.evaluate(f"setp.{name}.f32 %p1, a, b; selp.b32 d, 1, 0, %p1;", torch.int32, a=a, b=b)
        assert got.tolist() == expected, name


def test_comparisons_with_two_destinations_and_a_combination(machine: Machine) -> None:
    a = torch.arange(4, dtype=torch.int32)
    text = """
        setp.gt.u32 %p0, a, 0;
        setp.lt.and.s32 %p1|%p2, a, 2, %p0;
        selp.b32 %r1, 1, 0, %p1;
        selp.b32 %r2, 2, 0, %p2;
        or.b32 d, %r1, %r2;
    """
    assert machine.evaluate(text, torch.int32, a=a).tolist() == [0, 1, 2, 2]


def test_guards(machine: Machine) -> None:
    text = "setp.eq.s32 %p1, a, 1; mov.u32 d, 7; @%p1 mov.u32 d, 8; @!%p1 add.s32 d, d, 10;"
    assert machine.evaluate(text, torch.int32, a=torch.arange(3, dtype=torch.int32)).tolist() == [17, 8, 17]


@pytest.mark.parametrize(
    ("mode", "which", "limits", "source"),
    [
        ("idx", 5, 0x1F, lambda lane: 5),
        ("idx", 2, 0x181F, lambda lane: lane // 8 * 8 + 2),  # segments of 8 lanes
        ("bfly", 16, 0x1F, lambda lane: lane ^ 16),
        ("bfly", 4, 0x181F, lambda lane: lane ^ 4),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else None),
        ("up", 3, 0x1800, lambda lane: lane - 3 if lane % 8 >= 3 else None),
        ("down", 3, 0x1F, lambda lane: lane + 3 if lane < 29 else None),
        ("down", 3, 0x181F, lambda lane: lane + 3 if lane % 8 < 5 else None),
    ],
)
def test_shuffles(machine: Machine, mode: str, which: int, limits: int, source: Callable[[int], int | None]) -> None:
    a = torch.arange(LANES, dtype=torch.int32) * 10
    text = f"shfl.sync.{mode}.b32 d|%p1, a, {which}, {limits}, -1; @!%p1 add.s32 d, d, 1;"
    expected = [10 * lane + 1 if source(lane) is None else 10 * source(lane) for lane in range(LANES)]
    assert machine.evaluate(text, torch.int32, a=a).tolist() == expected


def test_votes(machine: Machine) -> None:
    a = torch.arange(LANES, dtype=torch.int32)
    text = "setp.lt.s32 %p1, a, 4; vote.sync.ballot.b32 d, %p1, -1;"
    assert machine.evaluate(text, torch.int32, a=a).unique().tolist() == [0xF]
    text = "setp.lt.s32 %p1, a, 4; vote.sync.any.pred %p2, !%p1, -1; vote.sync.all.pred %p3, %p1, -1;"
    text += "selp.b32 d, 1, 0, %p2; @%p3 add.s32 d, d, 2;"
    assert machine.evaluate(text, torch.int32, a=a).unique().tolist() == [1]


def test_lanes_meet_again_after_a_loop(machine: Machine) -> None:
    """Lane l goes round l + 1 times; behind the loop all 32 vote together."""
    text = """
        mov.u32 %r1, 0;
        again:
        add.s32 %r1, %r1, 1;
        setp.le.s32 %p1, %r1, a;
        @%p1 bra again;
        setp.ne.s32 %p2, %r1, 0;
        vote.sync.ballot.b32 %r2, %p2, -1;
        popc.b32 %r3, %r2;
        mad.lo.s32 d, %r3, 100, %r1;
    """
    a = torch.arange(LANES, dtype=torch.int32)
    assert machine.evaluate(text, torch.int32, a=a).tolist() == [3200 + lane + 1 for lane in range(LANES)]


def test_both_sides_of_a_branch_run_by_themselves(machine: Machine) -> None:
    text = """
        setp.lt.s32 %p1, a, 10;
        @%p1 bra low;
        activemask.b32 d;
        bra.uni meet;
        low:
        activemask.b32 d;
        meet:
        activemask.b32 %r1;
        setp.ne.s32 %p2, %r1, -1;
        @%p2 mov.u32 d, 0;
    """
    a = torch.arange(LANES, dtype=torch.int32)
    low, high = bits(0x3FF).item(), bits(ALL ^ 0x3FF).item()
    assert machine.evaluate(text, torch.int32, a=a).tolist() == [low] * 10 + [high] * 22


def test_atomics_return_what_was_there(machine: Machine) -> None:
    name = machine.kernel("""
        ld.param.u64 %rd1, [p0];
        ld.param.u64 %rd2, [p1];
        mov.u32 %r0, %tid.x;
        atom.global.add.u32 %r1, [%rd1], 2;
        red.global.max.u32 [%rd1+4], %r0;
        mul.wide.u32 %rd3, %r0, 4;
        add.s64 %rd2, %rd2, %rd3;
        st.global.u32 [%rd2], %r1;
    """, 2)  # fmt: skip
    total, old = torch.tensor([5, 3], dtype=torch.int32), torch.zeros(LANES, dtype=torch.int32)
    machine.run(name, total, old)
    assert total.tolist() == [5 + 2 * LANES, LANES - 1]
    assert old.tolist() == [5 + 2 * lane for lane in range(LANES)]


def test_counts_of_global_memory(machine: Machine) -> None:
    name = machine.kernel("""
        .loc 1 7 0
        ld.param.u64 %rd1, [p0];
        mov.u32 %r0, %tid.x;
        mul.wide.u32 %rd2, %r0, 16;
        .loc 1 8 0
        add.s64 %rd2, %rd1, %rd2;
        ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd2];
        setp.lt.u32 %p1, %r0, 8;
        @%p1 ld.global.u32 %r1, [%rd2];
        ld.global.u32 %r1, [%rd1];
    """)  # fmt: skip
    machine.ops.ptx_reset()
    data = torch.zeros(4096, dtype=torch.int32)
    data = data[(-data.data_ptr() // 4) % 8 :]
    machine.run(name, data, blocks=3)
    counts = machine.ops.ptx_counts(name)
    assert machine.ops.ptx_text(name).splitlines()[4] == "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd2]"
    assert counts[:, 0].tolist() == [7, 7, 7, 8, 8, 8, 8, 8, 8]
    # warps, lanes, sectors, distinct bytes, wavefronts, bytes of one lane
    assert counts[4, 1:].tolist() == [3, 96, 3 * 16, 3 * 512, 0, 16]
    assert counts[6, 1:].tolist() == [3, 24, 3 * 4, 3 * 32, 0, 4]
    assert counts[7, 1:].tolist() == [3, 96, 3, 3 * 4, 0, 4]


@pytest.mark.parametrize(
    ("bytes_", "stride", "wavefronts"),
    [(4, 4, 1), (4, 8, 2), (4, 128, 32), (4, 0, 1), (8, 8, 2), (8, 16, 4), (16, 16, 4), (16, 32, 8), (2, 2, 1)],
)
def test_bank_conflicts(machine: Machine, bytes_: int, stride: int, wavefronts: int) -> None:
    access, registers = {2: ("u16", "%h1"), 4: ("u32", "%r1"), 8: ("v2.u32", "{%r1, %r2}"),
                         16: ("v4.u32", "{%r1, %r2, %r3, %r4}")}[bytes_]  # fmt: skip
    name = machine.kernel(f"""
        .shared .align 16 .b8 memory[4096];
        mov.u32 %r0, %tid.x;
        mov.u32 %r5, memory;
        shl.b32 %r6, %r0, 2;
        add.s32 %r6, %r5, %r6;
        mov.u32 %r7, 0;
        fill:
        st.shared.u32 [%r6], %r7;
        add.s32 %r6, %r6, 128;
        add.s32 %r7, %r7, 1;
        setp.lt.u32 %p1, %r7, 32;
        @%p1 bra fill;
        bar.warp.sync -1;
        mad.lo.s32 %r6, %r0, {stride}, %r5;
        ld.shared.{access} {registers}, [%r6];
    """)
    machine.ops.ptx_reset()
    machine.run(name, torch.zeros(1))
    lines = machine.ops.ptx_text(name).splitlines()
    (row,) = (i for i, line in enumerate(lines) if line.startswith("ld.shared"))
    assert machine.ops.ptx_counts(name)[row, 5:].tolist() == [wavefronts, bytes_]


def test_unknown_things_are_refused_by_name(machine: Machine) -> None:
    for text, message in (
        ("add.cc.s32 %r1, %r2, %r3;", "unknown opcode add.cc.s32"),
        ("ld.u32 %r1, [%rd1];", "unknown opcode ld.u32"),
        ("bar.sync 1, 64;", "unknown kind of barrier"),
        ("mov.u32 %r1, %clock;", "unknown register %clock"),
        ("bra nowhere;", "unknown label"),
        (".local .b8 memory[16];", "local memory"),
    ):
        with pytest.raises(RuntimeError, match=message):
            machine.run(machine.kernel(text), torch.zeros(1))


def test_arguments_must_fit(machine: Machine) -> None:
    with pytest.raises(RuntimeError, match="expected 2 arguments, got 1"):
        machine.run(machine.kernel("", num_tensors=2), torch.zeros(1))
    with pytest.raises(RuntimeError, match="no kernel nothing is loaded"):
        machine.run("nothing", torch.zeros(1))
