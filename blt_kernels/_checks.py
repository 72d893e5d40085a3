"""Argument checks shared by every op.

Each message names the op, the argument, what was expected and what came, so that a user can mend
the call without reading our source. `TypeError`: wrong type or dtype. `ValueError`: everything else.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._C import _functorch as functorch

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INT_DTYPES = (torch.int32, torch.int64)
INT64_MAX = 2**63 - 1
CPU = torch.device("cpu")  # to compare with: device.type makes a new string, which takes five times as long


def fail_type(op: str, argument: str, expected: str, got: Any) -> TypeError:
    return TypeError(f"{op}: {argument}: expected {expected}, got {got}")


def fail_value(op: str, argument: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def _type_name(value: Any) -> str:
    """Tells NumPy's types, which the checks of plain numbers refuse, from Python's of the same name."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def describe(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(
    op: str,
    argument: str,
    value: Any,
    *,
    ndim: int | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """`value` is a dense tensor with `ndim` dimensions and one of `dtypes`."""
    if not isinstance(value, torch.Tensor):
        raise fail_type(op, argument, "a torch.Tensor", type(value).__name__)
    if value.layout != torch.strided:
        raise fail_type(op, argument, "a dense (strided) tensor", f"layout {value.layout}")
    if dtypes is not None and value.dtype not in dtypes:
        raise fail_type(op, argument, f"dtype {describe(dtypes)}", str(value.dtype).removeprefix("torch."))
    if ndim is not None and value.dim() != ndim:
        raise fail_value(op, argument, f"{ndim} dimensions", f"shape {tuple(value.shape)}")


def check_shape(op: str, argument: str, value: torch.Tensor, expected: Sequence[int | None]) -> None:
    """`value.shape` equals `expected`, where None stands for any size."""
    shape = value.shape
    fits = len(shape) == len(expected)
    for size, wanted in zip(shape, expected):  # noqa: B905 - a loop, because any() of a generator takes twice as long
        if wanted is not None and size != wanted:
            fits = False
    if not fits:
        sizes = ", ".join("*" if e is None else str(e) for e in expected)
        raise fail_value(op, argument, f"shape ({sizes})", f"shape {tuple(shape)}")


def check_device(op: str, argument: str, value: torch.Tensor, device: torch.device, owner: str) -> None:
    """`value` lies on `device`, where the argument named `owner` lies."""
    if value.device != device:
        raise fail_value(op, argument, f"device {device} (where {owner} is)", f"device {value.device}")


def check_values(op: str, argument: str, value: torch.Tensor) -> None:
    """`value` is no meta tensor, which has a shape and no values."""
    if value.is_meta:
        raise fail_value(op, argument, "a tensor with values", "a tensor on the meta device")


def check_choice(op: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise fail_value(op, argument, "one of " + ", ".join(repr(c) for c in choices), repr(value))


def check_int(op: str, argument: str, value: Any, low: int, high: int | None = None) -> None:
    """`value` is a Python int in `low` .. `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise fail_type(op, argument, "an int", _type_name(value))
    if value < low or (high is not None and value > high):
        raise fail_value(op, argument, f"at least {low}" if high is None else f"{low} .. {high}", value)


def check_number(
    op: str, argument: str, value: Any, low: float, high: float = math.inf, *, above: bool = False
) -> None:
    """`value` is a finite number in `low` .. `high`; with `above`, `low` itself is left out."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fail_type(op, argument, "a number", _type_name(value))
    if not (low < value if above else low <= value) or value > high or abs(value) > sys.float_info.max:
        expected = "a finite number"
        if low != -math.inf:
            expected += f" above {low:g}" if above else f" of at least {low:g}"
        if high != math.inf:
            expected += f" and at most {high:g}"
        raise fail_value(op, argument, expected, value)


def check_real(op: str, argument: str, value: Any) -> None:
    """`value` is a Python number that a float can hold, infinite perhaps, but not NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise fail_type(op, argument, "a float", _type_name(value))
    if value != value:
        raise fail_value(op, argument, "a number", value)
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise fail_value(op, argument, "a number in the range of floats", value)


def check_ints(op: str, argument: str, values: Any, low: int, high: int | None = None) -> None:
    """`values` is a sequence of at least one Python int, all in `low` .. `high`."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise fail_type(op, argument, "a sequence of ints", type(values).__name__)
    if not values:
        raise fail_value(op, argument, "at least one", "none")
    for value in values:
        check_int(op, argument, value, low, high)


def check_bool(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise fail_type(op, argument, "a bool", _type_name(value))


# While one of these modes is on, values are being traced or do not exist, and reading them is an error.
_MODES_WITHOUT_VALUES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def can_look_at(tensor: torch.Tensor, *, may_wait: bool = False) -> bool:
    """Whether checks may read the values of `tensor`: it has values, and reading them does not wait for a device.

    `may_wait` or `BLT_KERNELS_DEBUG=1` lets the check wait for the device too.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (torch.Tensor, nn.Parameter):
        return False  # such as a FakeTensor
    if functorch.is_functorch_wrapped_tensor(tensor):
        return False  # torch.func.vmap gives values to nobody
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES_WITHOUT_VALUES):
        return False
    if tensor.device.type == "cpu":
        return True
    return tensor.device.type != "meta" and (may_wait or os.environ.get("BLT_KERNELS_DEBUG") == "1")


def check_range(op: str, argument: str, value: torch.Tensor, low: int, high: int) -> None:
    """Every element of the integer tensor `value` lies in `low` .. `high`, where checks may look at it."""
    if can_look_at(value) and value.numel():
        least, most = (int(x) for x in value.aminmax())
        if least < low or most > high:
            raise fail_value(op, argument, f"values in {low} .. {high}", least if least < low else most)


def check_sequence_values(
    op: str, num_bytes: int, seq_lens: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> None:
    """The values fit rows of `num_bytes` bytes, where checks may look at them; types and shapes fit already."""
    if seq_lens is not None:
        check_range(op, "seq_lens", seq_lens, 0, num_bytes)
    if cu_seqlens is not None and can_look_at(cu_seqlens):
        cu = cu_seqlens.tolist()
        if cu[0] != 0 or cu[-1] > num_bytes or cu != sorted(cu):
            raise fail_value(op, "cu_seqlens", f"values that rise from 0 to at most {num_bytes}", cu)


def check_longest(op: str, argument: str, longest: int | None, cu_seqlens: torch.Tensor) -> None:
    """`longest` is at least 1 and no sequence between `cu_seqlens` is longer, where checks may look at them."""
    if longest is None:
        return
    check_int(op, argument, longest, 1)
    if can_look_at(cu_seqlens) and cu_seqlens.numel() > 1:
        found = int(cu_seqlens.diff().max())
        if found > longest:
            raise fail_value(op, argument, f"at least {found}, as the longest sequence has", longest)


def check_sequences(
    op: str,
    batch: int,
    device: torch.device,
    owner: str,
    seq_lens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_bytes: int,
) -> int:
    """Checks the two ways to say which bytes are real (at most one is given) and returns the number of sequences.

    Values on the CPU are left to the kernels, which check them anyway. On another device they are checked here, with
    BLT_KERNELS_DEBUG=1 alone.
    """
    if seq_lens is not None and cu_seqlens is not None:
        raise fail_value(op, "cu_seqlens", "either seq_lens or cu_seqlens", "both")
    if seq_lens is not None:
        check_tensor(op, "seq_lens", seq_lens, dtypes=INT_DTYPES)
        check_shape(op, "seq_lens", seq_lens, (batch,))
        check_device(op, "seq_lens", seq_lens, device, owner)
    if cu_seqlens is None:
        if device != CPU:
            check_sequence_values(op, num_bytes, seq_lens, None)
        return batch
    check_tensor(op, "cu_seqlens", cu_seqlens, ndim=1, dtypes=INT_DTYPES)
    if cu_seqlens.shape[0] < 1:
        raise fail_value(op, "cu_seqlens", "shape (S + 1,)", "shape (0,)")
    check_device(op, "cu_seqlens", cu_seqlens, device, owner)
    if batch != 1:
        raise fail_value(op, owner, "one row (B = 1) with cu_seqlens", f"B = {batch}")
    if device != CPU:
        check_sequence_values(op, num_bytes, None, cu_seqlens)
    return cu_seqlens.shape[0] - 1
