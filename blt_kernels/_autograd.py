"""Autograd and autocast pieces that several ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# This is found out once, because torch.compile of torch 2.10 cannot trace the question. Asking autocast about another
# device is an error.
_AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "hpu", "mps", "mtia") if torch.amp.is_autocast_available(name)
)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives matrix products on `device`; None where it is off, or knows no such device."""
    kind = device.type
    if kind not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def register_derivative(
    op: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Registers the derivative of `blt_kernels::<op>`, and returns the op as a function that is cheap to call.

    Tracers, transforms and modes see the registered op. In plain eager code the same `backward` and `setup_context` run
    in an autograd function around the op: the way through torch.library.register_autograd costs several times the op on
    small inputs, because it goes through the dispatcher and through Python twice.
    """
    torch.library.register_autograd(f"blt_kernels::{op}", backward, setup_context=setup_context)
    overload = getattr(torch.ops.blt_kernels, op).default

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*args)
            setup_context(ctx, args, output)
        return output

    # torch.autograd.Function would ask once more whether a transform of torch.func is active.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(op, (torch.autograd.function._SingleLevelFunction,), members)
    return _shortcut(overload, function.apply)  # type: ignore[attr-defined]


def register_no_double_backward(op: str, backward_op: str | None = None) -> Callable[..., Any]:
    """Makes a second derivative through `blt_kernels::<op>_backward` an explained error instead of a silent zero.

    `backward_op` names the backward op where it is another. Returns it as a function that is cheap to call.
    """
    backward_op = backward_op or op + "_backward"

    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(
            f"blt_kernels.{op} has no second derivative (double backward). Use use_backend('reference') for the part "
            "of the graph that is differentiated twice."
        )

    torch.library.register_autograd(f"blt_kernels::{backward_op}", backward)
    overload = getattr(torch.ops.blt_kernels, backward_op).default
    return _shortcut(overload, overload)


def _shortcut(op: Callable[..., Any], differentiated: Callable[..., Any]) -> Callable[..., Any]:
    """`op` past its registered derivative where only autograd could ask for it: `differentiated` is called if it does.

    Everything else that can follow an op's tensors gets the op itself.
    """

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not _is_plain(args):
            return op(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return differentiated(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


# What the dispatcher includes in every call of plain eager code, as bits. Modes (fake tensors, tracers, users' own),
# transforms of torch.func, torch.jit.trace and torch.inference_mode all change it.
_PLAIN_DISPATCH = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
).raw_repr()
_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, torch.dtype))


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether autograd alone can follow these arguments of an op: no mode or transform is on, no subclass among them.

    Autograd is not excluded either, as it is inside of the kernel of somebody's own op.
    """
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() == _PLAIN_DISPATCH
        and not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradOther)
        and not torch._C._is_torch_function_mode_enabled()
        and _PLAIN_TYPES.issuperset(map(type, args))
    )
