"""What the tests share: error metrics, ragged layouts, FLOPs, and checks of threads, processors and compilation."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blt_kernels import PatchLayout

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REPOSITORY = Path(__file__).resolve().parent.parent

# ---- errors ----------------------------------------------------------------------------------------------------------
# One number hides too much: a few bad elements vanish in a norm, a small systematic shift vanishes in a maximum. So an
# op's error is looked at in layers, each against the same layer of eager PyTorch in the same dtype.


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of `actual` against `exact` (fp64), over the elements where `exact` is finite in the dtype of `actual`."""

    largest: float  # |actual - exact|
    largest_beyond_ulp: float  # the same, less one ulp of each exact value
    relative_l1: float
    relative_l2: float
    cosine: float  # 1 - cosine similarity
    bias: float  # |mean(actual - exact)| / mean|exact|
    bias_noise: float  # standard error of the bias: what rounding without a preferred direction leaves


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Spacing of the numbers of `dtype` at x, as fp64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent - 1)


def errors(actual: torch.Tensor, exact: torch.Tensor) -> Errors:
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert exact.dtype == torch.float64
    rounded = exact.to(actual.dtype)
    special = ~rounded.isfinite()
    torch.testing.assert_close(actual[special], rounded[special], rtol=0, atol=0, equal_nan=True)
    a, e = actual[~special].double(), exact[~special]
    if a.numel() == 0:
        return Errors(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert a.isfinite().all(), "not finite where the exact value is"
    error = a - e
    tiny = torch.finfo(torch.float64).tiny
    l1, l2 = e.abs().sum().clamp(min=tiny), e.norm().clamp(min=tiny)
    # 1 - cos(a, e) from the unit vectors' difference, which does not cancel.
    unit_difference = a / a.norm().clamp(min=tiny) - e / l2
    return Errors(
        largest=error.abs().max().item(),
        largest_beyond_ulp=(error.abs() - ulp(e, actual.dtype)).clamp(min=0).max().item(),
        relative_l1=(error.abs().sum() / l1).item(),
        relative_l2=(error.norm() / l2).item(),
        cosine=(unit_difference.square().sum() / 2).item(),
        bias=(error.sum().abs() / l1).item(),
        bias_noise=(error.norm() / l1).item(),
    )


def assert_as_accurate(actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, name: str = "") -> None:
    """Every layer of the error of `actual` is at most twice that of `eager` plus one ulp.

    `eager` is PyTorch's result in the dtype of `actual`, `exact` the same in fp64. Where `exact` is NaN or infinite
    (in that dtype), `actual` must be the same. When `actual` is fp64 too, `exact` has errors of its own: there one ulp
    is 1e-12 of the largest value.
    """
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    ours = errors(actual, exact)
    # Eager may overflow where fp64 does not: there it sets no standard.
    theirs = errors(torch.where(eager.isfinite(), eager, exact.to(eager.dtype)), exact)
    eps, scale = torch.finfo(actual.dtype).eps, 0.0
    if actual.dtype == torch.float64 and exact.numel():
        eps, scale = 1e-12, exact.where(exact.isfinite(), 0).abs().max().item()
    limits = {
        "largest_beyond_ulp": 2 * theirs.largest + eps * scale,
        "relative_l1": 2 * theirs.relative_l1 + eps,
        "relative_l2": 2 * theirs.relative_l2 + eps,
        "cosine": 8 * theirs.cosine + eps**2,  # half the square of a relative L2 error
        "bias": 2 * theirs.bias + eps + 4 * ours.bias_noise,
    }
    for layer, limit in limits.items():
        got = getattr(ours, layer)
        assert got <= limit, f"{name}: {layer} {got:.3g}, limit {limit:.3g}\n  ours  {ours}\n  eager {theirs}"


# ---- ragged layouts --------------------------------------------------------------------------------------------------

# Patch lengths [B, P] that have broken such kernels before: name -> rows of equal length.
RAGGED: dict[str, list[list[int]]] = {
    "one_byte": [[1]],
    "ones": [[1] * 9, [1] * 9],
    "typical": [[1, 4, 5, 3, 8, 2], [1, 1, 7, 6, 2, 6]],
    "inner_empty": [[2, 0, 3, 0, 0, 1]],
    "leading_empty": [[0, 0, 3, 2], [0, 5, 0, 0]],
    "trailing_empty": [[3, 2, 0, 0, 0]],
    "empty_row": [[0, 0, 0], [2, 1, 4], [0, 0, 0]],
    "all_empty": [[0, 0]],
    "unequal_rows": [[1, 2, 0, 0], [5, 4, 3, 2], [0, 0, 0, 9]],
    "vector_edges": [[15, 16, 17, 31, 32, 33]],
}
HUGE_PATCH = [[3, 16384, 2]]


def lengths_of(name: str) -> torch.Tensor:
    """One of RAGGED as an int64 tensor [B, P]."""
    return torch.tensor(RAGGED[name])


@st.composite
def ragged_lengths(draw: st.DrawFn, max_batch: int = 3, max_patches: int = 12, max_length: int = 20) -> torch.Tensor:
    """Patch lengths, int64 [B, P]: empty rows and slots anywhere, rows of unequal sums, single bytes, long patches."""
    batch = draw(st.integers(1, max_batch))
    patches = draw(st.integers(1, max_patches))
    length = st.one_of(st.just(0), st.just(1), st.integers(1, 6), st.integers(1, max_length))
    row = st.one_of(
        st.lists(length, min_size=patches, max_size=patches),
        st.just([0] * patches),
        st.just([1] * patches),
    )
    return torch.tensor([draw(row) for _ in range(batch)])


def make_layout(lengths: torch.Tensor, num_bytes: int | None = None) -> PatchLayout:
    """The layout of patches of these lengths; rows shorter than `num_bytes` (default: the longest row) are padded.

    The sum of a row is its number of real bytes, so that its last patch is open.
    """
    sums = lengths.sum(1)
    return PatchLayout.from_lengths(lengths, int(sums.max()) if num_bytes is None else num_bytes, seq_lens=sums)


def random_lengths(num_bytes: int, mean: float, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Patch lengths, int64 [batch, P], that sum to `num_bytes` in every row: geometric, as segmented text has them."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, num_bytes, generator=generator) < 1 / mean
    starts[:, 0] = True
    rows = [torch.diff(row.nonzero().flatten(), append=torch.tensor([num_bytes])) for row in starts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


# ---- views -----------------------------------------------------------------------------------------------------------


def awkward_view(x: torch.Tensor) -> torch.Tensor:
    """The same values at a storage offset, with strides that are not contiguous."""
    wide = x.new_empty((*x.shape[:-1], x.shape[-1] + 3)) if x.dim() else x.new_empty(4)
    view = wide[..., 2:-1] if x.dim() else wide[2]
    return view.copy_(x)


# ---- ops that write in place -----------------------------------------------------------------------------------------


def written(op: str) -> tuple[int, ...]:
    """Which arguments of `torch.ops.blt_kernels.<op>` it changes in place, by its schema."""
    arguments = getattr(torch.ops.blt_kernels, op).default._schema.arguments
    return tuple(i for i, x in enumerate(arguments) if x.alias_info is not None and x.alias_info.is_write)


def results_of(ops: Any, op: str, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors that an op gives: what it returns, then copies of the arguments that it changes, which it keeps."""
    copies = [x.clone() if i in written(op) else x for i, x in enumerate(arguments)]
    returned = pytree.tree_leaves(getattr(ops, op)(*copies))
    return [x for x in returned if x is not None] + [copies[i] for i in written(op)]


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def count_flops(fn: Callable[[], Any]) -> FlopCounterMode:
    """torch's counter after `fn`, which runs without fused self-attention: on the CPU the counter does not see that."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fn()
    return counter


# ---- threads, processors, compilation --------------------------------------------------------------------------------


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_for_any_threads(
    fn: Callable[[], torch.Tensor | Sequence[torch.Tensor]], counts: Sequence[int] = (1, 2, 3)
) -> None:
    """`fn` gives bit-identical results, NaN included, whatever the number of threads."""
    results = []
    for count in counts:
        with num_threads(count):
            result = fn()
        results.append([result] if isinstance(result, torch.Tensor) else list(result))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# Flag in /proc/cpuinfo without which the kernels of a capability cannot run.
CPU_CAPABILITIES = {"default": None, "avx2": "avx2", "avx512": "avx512f"}


def run_with_capability(code: str, capability: str) -> str:
    """Runs Python source in a process whose kernels are those of `capability`; returns what it printed.

    The source can import torch, blt_kernels, helpers and the test files of ops. Skips only a capability whose flag the
    processor lacks.
    """
    flag = CPU_CAPABILITIES[capability]
    if flag is not None and flag not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this processor has no {flag}")
    check = f"""
import blt_kernels, torch
assert torch.ops.blt_kernels.cpu_capability() == {capability!r}, torch.ops.blt_kernels.cpu_capability()
torch.manual_seed(0)
"""
    folders = (REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "ops")
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", check + textwrap.dedent(code)],
        env={**os.environ, "BLT_KERNELS_CPU_CAPABILITY": capability, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{capability}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def assert_no_recompile() -> Iterator[None]:
    """Inside, a function under torch.compile may be compiled for the first time; compiling it again raises."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def opcheck(op: str, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> None:
    """torch.library.opcheck of `torch.ops.blt_kernels.<op>`, every test of it, no exemptions.

    Inputs that require grad have the autograd registration tested too; pass backward ops inputs that do not.
    """
    torch.library.opcheck(getattr(torch.ops.blt_kernels, op).default, tuple(args), kwargs or {})
