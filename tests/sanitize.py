"""The CUDA kernels on host threads under a sanitizer: `python tests/sanitize.py thread` or `address,undefined`.

Every kernel runs once, forward and backward, on a small ragged case, and is compared with its reference. Under
"thread" a kernel without its barrier is run too, and must be reported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "cuda")]

RUNTIMES = {"thread": ["libtsan.so"], "address,undefined": ["libasan.so", "libubsan.so"]}
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 ignore_noninstrumented_modules=1",
    "ASAN_OPTIONS": "detect_leaks=0 abort_on_error=0 exitcode=66",
    "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1 exitcode=66",
    "OMP_NUM_THREADS": "1",
}


def run_cases(ops) -> None:
    import torch
    from helpers import make_layout

    from blt_kernels import reference

    torch.manual_seed(0)
    layout = make_layout(torch.tensor([[1, 70, 0, 5, 3, 2], [4, 4, 0, 0, 1, 130]]))
    x = torch.randn(2, layout.num_bytes, 24, requires_grad=True)
    grad = torch.randn(2, layout.capacity, 24)
    for reduce in ("max", "mean"):
        out = ops.patch_pool(x.detach(), layout.offsets, reduce)
        expected = reference.patch_pool(x, layout, reduce)
        torch.testing.assert_close(out, expected.detach())
        values = (x.detach(), out) if reduce == "max" else (None, None)
        got = ops.patch_pool_backward(grad, layout.offsets, *values, x.shape[1], reduce)
        torch.testing.assert_close(got, torch.autograd.grad(expected, x, grad)[0])
    y = torch.randn(2, layout.capacity, 24, requires_grad=True)
    expected = reference.patch_gather(y, layout, "visible")
    torch.testing.assert_close(ops.patch_gather(y.detach(), layout.visible_ids), expected.detach())
    got = ops.patch_gather_backward(x.detach(), layout.visible_ids, layout.capacity)
    torch.testing.assert_close(got, torch.autograd.grad(expected, y, x.detach())[0])

    logits = torch.randn(20, 260, requires_grad=True)
    expected, grad = reference.entropy(logits), torch.randn(20)
    torch.testing.assert_close(ops.entropy(logits.detach()), expected.detach())
    torch.testing.assert_close(
        ops.entropy_backward(grad, logits.detach()),
        torch.autograd.grad(expected, logits, grad)[0],
        rtol=1e-4,
        atol=1e-6,
    )


def run_broken(ops) -> None:
    import torch

    ops.block_sum(torch.randn(3, 64), False)


def main(sanitizer: str) -> None:
    import emulation

    library = emulation.build(TESTS.parent / "build" / f"emulated-{sanitizer.replace(',', '-')}", sanitizer)
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in RUNTIMES[sanitizer]
    ]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(paths)}
    for which, expected in (("cases", 0), ("broken", 66)):
        if which == "broken" and sanitizer != "thread":
            continue
        command = [sys.executable, __file__, which, str(library)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != expected or (expected and "data race" not in done.stderr):
            sys.exit(f"{sanitizer}: {which}: exit {done.returncode}, expected {expected}\n{done.stdout}\n{done.stderr}")
        print(f"{sanitizer}: {which}: {'clean' if expected == 0 else 'reported, as it must be'}")


if __name__ == "__main__":
    if sys.argv[1] in RUNTIMES:
        main(sys.argv[1])
    else:
        import emulation

        {"cases": run_cases, "broken": run_broken}[sys.argv[1]](emulation.load(Path(sys.argv[2])))
