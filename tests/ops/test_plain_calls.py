"""Plain eager calls go past the registered derivative (blt_kernels/_autograd.py): who must see the op still sees it.

Values, gradients and errors are the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_transforms import CASES, LAYOUT, B, N, rand
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import blt_kernels as bk

# Those that have a derivative of their own.
OPS = [name for name in CASES if name not in ("pack", "unpack", "hash_ngram_embedding_row_grad")]
BOTH_WAYS = pytest.mark.parametrize("name", OPS)


class Seen(TorchDispatchMode):
    """Changes nothing, but it is a mode, so that ops are called as they are registered; notes ours."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "blt_kernels":
            self.ops.add(func._schema.name.removeprefix("blt_kernels::"))
        return func(*args, **(kwargs or {}))


def leaf(name: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    f, x = CASES[name]
    return f, x.clone().requires_grad_()


def gradient(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = f(x)
    weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape)
    return out, *torch.autograd.grad(out, x, weights)


def first_node(out: torch.Tensor) -> str:
    """The derivative that made `out`, or a view of it."""
    node = out.grad_fn
    while node is not None and type(node).__name__.startswith(("Select", "View", "Alias", "Squeeze")):
        node = node.next_functions[0][0]
    return type(node).__name__


@BOTH_WAYS
def test_plain_calls_take_the_short_way_and_modes_the_registered_one(name: str) -> None:
    """The first half fails where a new version of torch makes every call look as if somebody followed it."""
    f, x = leaf(name)
    op = name.split()[0]
    assert first_node(f(x)) == f"{op}Backward"
    with Seen() as seen:
        assert first_node(f(x)) == f"GeneratedBackwardFor_blt_kernels_{op}_defaultBackward"
    assert op in seen.ops


@BOTH_WAYS
def test_values_and_gradients_are_equal_both_ways(name: str) -> None:
    f, x = leaf(name)
    out, grad = gradient(f, x)
    with Seen() as seen:
        expected_out, expected_grad = gradient(f, x)
    if "base" not in name:  # whose gradient is that of the result
        assert any("backward" in op for op in seen.ops)  # for segment_logits that of entropy
    torch.testing.assert_close((out, grad), (expected_out, expected_grad), rtol=0, atol=0)
    with torch.no_grad():
        without = f(x)
    assert not without.requires_grad
    with torch.inference_mode():
        inference = f(x)
    torch.testing.assert_close((without, inference), (out.detach(), out.detach()), rtol=0, atol=0)


@BOTH_WAYS
def test_a_second_derivative_is_refused_both_ways(name: str) -> None:
    f, x = leaf(name)
    for mode in (None, Seen()):
        with mode or torch.enable_grad():
            out = f(x)
            weights = torch.ones_like(out).requires_grad_()
            (grad,) = torch.autograd.grad(out, x, weights, create_graph=True)
            if "base" in name:
                continue  # it passes through, and has all derivatives
            with pytest.raises(RuntimeError, match=r"has no second derivative .*use_backend"):
                torch.autograd.grad(grad.sum(), weights)


@contextmanager
def counted() -> Iterator[list[torch.Tensor]]:
    saved: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> int:
        saved.append(x)
        return len(saved) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: saved[i]):
        yield saved


@BOTH_WAYS
def test_hooks_on_saved_tensors_see_the_same(name: str) -> None:
    f, x = leaf(name)
    with counted() as short:
        gradient(f, x)
    with Seen(), counted() as registered:
        gradient(f, x)
    assert short
    torch.testing.assert_close(short, registered, rtol=0, atol=0)


@BOTH_WAYS
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    f, x = leaf(name)
    expected = gradient(f, x)
    out = checkpoint(f, x, use_reentrant=reentrant)
    out.backward(torch.arange(out.numel(), dtype=out.dtype).view(out.shape))
    torch.testing.assert_close((out, x.grad), expected, rtol=0, atol=0)


@BOTH_WAYS
def test_hooks_on_parameters_run(name: str) -> None:
    """What DistributedDataParallel and FSDP build on."""
    f, x = CASES[name]
    parameter, seen = torch.nn.Parameter(x.clone()), []
    parameter.register_hook(lambda grad: seen.append("hook"))
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    out = f(parameter)
    assert first_node(out) == f"{name.split()[0]}Backward"
    out.sum().backward()
    assert seen == ["hook", "accumulated"]


def test_modes_of_torch_function_see_the_op() -> None:
    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    f, x = leaf("patch_pool")
    with Functions():
        f(x)
    assert any("patch_pool" in name for name in names)


def test_subclasses_see_the_op() -> None:
    class Noting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    names: list[str] = []
    f, x = CASES["patch_pool"]
    assert type(f(x.as_subclass(Noting))) is Noting
    assert any("patch_pool" in name for name in names)


def test_traces_and_graphs_contain_the_op() -> None:
    f, x = leaf("patch_pool")
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.testing.assert_close(gradient(torch.compile(f, backend=keep, fullgraph=True), x), gradient(f, x))
    assert "torch.ops.blt_kernels.patch_pool" in graphs[0].code
    assert "torch.ops.blt_kernels.patch_pool.default" in make_fx(f)(x.detach()).code
    exported = torch.export.export(Pool(), (x.detach(),), strict=False)
    assert "torch.ops.blt_kernels.patch_pool.default" in exported.graph_module.code
    assert "blt_kernels::patch_pool" in str(torch.jit.trace(f, (x.detach(),)).graph)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert f(fake.from_tensor(x.detach())).shape == f(x).shape


class Pool(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bk.patch_pool(x, LAYOUT)


def test_no_derivative_inside_the_kernel_of_somebodys_op() -> None:
    """There autograd is excluded, and the dispatcher would record nothing."""
    f, x = leaf("patch_pool")
    with torch._C._AutoDispatchBelowAutograd():
        assert f(x).grad_fn is None


def test_a_constant_that_has_outlived_its_transform() -> None:
    outlived: list[torch.Tensor] = []

    def leak(x: torch.Tensor) -> torch.Tensor:
        outlived.append(x.detach())
        return x.sum()

    weight = rand(9, 4)
    torch.func.grad(leak)(weight)
    x = rand(B, N, 4).requires_grad_()
    (constant,) = outlived
    assert torch._C._functorch.is_functorch_wrapped_tensor(constant)
    found = gradient(lambda x: bk.linear_entropy(x, constant), x)
    torch.testing.assert_close(found, gradient(lambda x: bk.linear_entropy(x, weight), x), rtol=0, atol=0)
