"""Which implementation of an op runs: compiled for the CPU, compiled for CUDA, or the readable reference."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Iterator

import torch
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from ._checks import CPU, check_choice
from ._library import build_record

BACKENDS = ("cpu", "cuda", "reference")


# Integrated devices, whose binaries and those of other devices do not run on each other, whatever the major version.
_INTEGRATED = ((7, 2), (8, 7), (11, 0))


def cuda_problem(device: torch.device | None = None) -> str | None:
    """Why the CUDA backend cannot be used here; None where it can.

    Args:
        device: a CUDA device, which is asked for its compute capability too. Without it CUDA is not initialised.
    """
    built = build_record().get("cuda")
    if not built:
        return "it was not built: install a CUDA toolkit with nvcc and reinstall blt_kernels"
    if torch.version.cuda is None:
        return "this torch was built without CUDA: install a CUDA build of torch"
    driver, needed = _driver_major(), int(built["nvcc"].split(".")[0])
    if driver < needed:
        found = f"is for CUDA {driver}" if driver else "is missing"
        return f"the NVIDIA driver {found}, the kernels were built by nvcc {built['nvcc']}: install a newer driver"
    return None if device is None else _capability_problem(built, device)


def _capability_problem(built: dict[str, str], device: torch.device) -> str | None:
    """Why a build with binaries for `built["sm"]` and PTX of `built["ptx"]` has nothing that runs on `device`."""
    major, minor = torch.cuda.get_device_capability(device)
    for name in built["sm"].split(", "):
        number = int(name.rstrip("af"))
        same_major = number // 10 == major and number % 10 <= minor and (major, minor) not in _INTEGRATED
        if number == 10 * major + minor or (same_major and not name.endswith("a")):
            return None
    if built["ptx"] and int(built["ptx"]) <= 10 * major + minor:
        return None  # the driver compiles it
    has = f"sm_{built['sm'].replace(', ', ', sm_')}" + (f" and PTX of compute_{built['ptx']}" if built["ptx"] else "")
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and the build has {has}: build "
        f"from source on a machine with nvcc, with BLT_CUDA_ARCHITECTURES={major}{minor}"
    )


def _driver_major() -> int:
    """The newest CUDA that the driver runs; 0 where there is no driver. Initialises nothing."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value // 1000


# This is found out once, because ops ask on every call, and torch.compile cannot trace the reading of a file.
_AVAILABLE = (
    *(name for name in build_record().get("backends", ()) if name != "cuda" or cuda_problem() is None),
    "reference",
)
# The ops that have a compiled CUDA kernel. All have one for the CPU.
_ON_CUDA = frozenset(
    schema.name.removeprefix("blt_kernels::")
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("blt_kernels::") and torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA")
)

_device_problems: dict[torch.device, str | None] = {}
_forced: str | None = None
_warned: set[tuple[str, str]] = set()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the `with` block on the backend `name`: "cpu", "cuda" or "reference".

    Without it the backend follows the device of the tensors and what was built. The choice is global to the
    process, not to a thread, so that `torch.compile` can guard on it.

    Raises:
        ValueError: unknown name, or a backend that was not built or cannot run here.
    """
    check_choice("use_backend", "name", name, BACKENDS)
    if name not in available_backends():
        names = ", ".join(map(repr, available_backends()))
        why = f": {cuda_problem()}" if name == "cuda" else ""
        raise ValueError(f"use_backend: name: expected one of {names}, got {name!r}, which cannot be used here{why}")
    global _forced
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def available_backends() -> tuple[str, ...]:
    """What `use_backend` accepts here: "cpu", "cuda" where it was built and can run, and "reference".

    Devices are not looked at, because that would initialise CUDA: on one whose compute capability the build does not
    cover the reference runs.
    """
    return _AVAILABLE


def backend_for(op: str, device: torch.device, *differentiable: torch.Tensor | None) -> str:
    """The backend that `op` takes for tensors on `device`.

    Raises:
        NotImplementedError: it is a compiled one, and one of the `differentiable` inputs carries a tangent, or
            torch.func differentiates by it.
    """
    backend = _choose(op, device)
    if backend == "reference":
        return backend
    if forward_ad._current_level >= 0:
        for x in differentiable:
            if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                # The dispatcher would drop the tangent and give a derivative of 0 without a word.
                raise NotImplementedError(
                    f"blt_kernels.{op} has no forward-mode derivative (jvp). Use use_backend('reference') for the part "
                    "of the model that is differentiated forward."
                )
    # torch.library.register_autograd has no way to support these transforms, and its error names neither the op nor a
    # remedy. torch.func.vmap and torch.func.functionalize work.
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        for x in differentiable:
            if _is_differentiated(x):
                raise NotImplementedError(
                    f"blt_kernels.{op} cannot be differentiated by torch.func (grad, vjp, jacrev and others). Use "
                    "torch.autograd.grad, or use_backend('reference') for the part of the model that torch.func "
                    "differentiates."
                )
    return backend


def _is_differentiated(x: torch.Tensor | None) -> bool:
    """Whether a transform of torch.func such as `grad` follows `x`, also through a `vmap` within it."""
    while x is not None and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x) and x.requires_grad:  # every tensor made inside of `grad` is wrapped
            return True
        x = functorch.get_unwrapped(x)
    return False


def _device_problem(device: torch.device) -> str | None:
    """`cuda_problem(device)`, found out once for each device: ops ask on every call, and it cannot be traced."""
    if device not in _device_problems:
        _device_problems[device] = cuda_problem(device)
    return _device_problems[device]


# What torch.compiler.assume_constant_result does, which would import all of torch._dynamo here, several seconds.
_device_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(op: str, device: torch.device) -> str:
    if device == CPU and _forced is None and "cpu" in _AVAILABLE:
        return "cpu"  # as below, sooner
    if _forced is not None:
        if _forced in ("cpu", "cuda") and device.type != _forced:
            raise ValueError(f"{op}: device: expected {_forced} (use_backend({_forced!r}) is active), got {device}")
        if _forced == "cuda" and (problem := _device_problem(device)) is not None:
            raise ValueError(f"{op}: device: expected one that the CUDA kernels run on, got {device}: {problem}")
        return _forced
    if device.type in available_backends() and (
        device.type != "cuda" or (op.replace("PatchLayout.", "layout_") in _ON_CUDA and _device_problem(device) is None)
    ):
        return device.type
    if device.type != "meta" and (op, device.type) not in _warned:
        _warned.add((op, device.type))
        warnings.warn(
            f"blt_kernels has no kernel of {op} for {device.type} tensors here: the reference implementation runs "
            "instead, at reference speed. `blt-kernels doctor` says what is missing.",
            stacklevel=3,
        )
    return "reference"
