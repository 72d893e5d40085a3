"""The CUDA kernels on host threads under a sanitizer: `python tests/sanitize.py thread` or `address,undefined`; their
compiled code in the interpreter of PTX: `python tests/sanitize.py ptx`; on a GPU, under compute-sanitizer:
`compute-sanitizer --tool racecheck python tests/sanitize.py cases gpu`.

Every op runs, forward and backward, on a small ragged case, and is compared with the CPU's. Under "thread" a kernel
without its barrier is run too, and must be reported.
"""

from __future__ import annotations

import os
import platform
import re
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


def cases():
    """`(op, arguments)` of every op that has CUDA kernels: small and ragged."""
    import torch
    from helpers import make_layout

    torch.manual_seed(0)
    cpu = torch.ops.blt_kernels
    layout = make_layout(torch.tensor([[1, 70, 0, 5, 3, 2], [4, 4, 0, 0, 1, 130]]))
    batch, capacity, num_bytes = 2, layout.capacity, layout.num_bytes

    logits, weights = torch.randn(20, 260), torch.randn(20)
    yield "entropy", (logits,)
    yield "entropy_backward", (weights, logits)
    hidden, head = torch.randn(20, 16), torch.randn(260, 16)
    yield "linear_entropy", (hidden, head)
    yield "linear_entropy_backward", (weights, hidden, head, True, True)

    x, grad = torch.randn(batch, num_bytes, 24), torch.randn(batch, capacity, 24)
    for reduce in ("max", "mean"):
        yield "patch_pool", (x, layout.offsets, reduce)
        values = (x, cpu.patch_pool(x, layout.offsets, reduce)) if reduce == "max" else (None, None)
        yield "patch_pool_backward", (grad, layout.offsets, *values, num_bytes, reduce)
    yield "patch_gather", (grad, layout.visible_ids)
    yield "patch_gather_backward", (x, layout.visible_ids, capacity)

    entropies = torch.rand(2, 1100) * 4
    seq_lens = torch.tensor([1100, 700])
    packed = torch.tensor([0, 300, 300, 1000], dtype=torch.int32)
    tail = (7, seq_lens, None, True, 600)
    yield "segment", (entropies, 2.0, "combined", 0.1, *tail)
    yield "segment", (entropies[:1], 2.0, "threshold", None, None, None, packed, False, None)
    yield "segment_spaces", (torch.randint(30, 60, (2, 1100)), 4, *tail)
    yield "segment_fixed", (torch.zeros(2, 1100, dtype=torch.int64), 5, *tail)
    yield "segment_logits", (torch.randn(2, 40, 260), 5.0, "threshold", None, None, None, None, True, 40)
    yield "layout_from_starts", (entropies > 3, seq_lens, None, torch.tensor([True, False]), 300)
    yield "layout_from_lengths", (torch.randint(0, 9, (2, 200)), 1700, None, None, None)

    ngrams = ([3, 4, 5], 11, [1000000007], None)
    tokens, table, base = torch.randint(4, 7, (2, 33)), torch.randn(33, 24), torch.randn(2, 33, 24)
    yield "hash_ngram_ids", (tokens, *ngrams)
    yield "hash_ngram_embedding", (tokens, table, base, *ngrams, True, False)
    yield "hash_ngram_embedding_backward", (base, tokens, *ngrams, True, torch.float32)
    yield "hash_ngram_embedding_sparse_backward", (base, tokens, *ngrams, True, torch.float32)
    yield "hash_ngram_embedding_row_grad", (base, tokens, *ngrams, True, torch.float32)
    rows, state = torch.tensor([0, 5, 32]), torch.rand(33)
    yield "rowwise_adagrad_update", (table, state, rows, torch.randn(3, 24), torch.tensor(0.5), 0.1, 1e-8, 0.1)

    slots, rows = torch.randn(batch, 2 * capacity, 4, 8), torch.randn(batch, num_bytes, 4, 8)
    slot_keys, byte_keys = slots[:, :, :2].contiguous(), rows[:, :, :2].contiguous()
    for window in (1, 2):
        for op, q, k, fields in (
            ("encoder_cross_attention", slots, byte_keys, (layout.offsets, layout.cu_patches)),
            ("decoder_cross_attention", rows, slot_keys, (layout.visible_ids, layout.offsets, layout.cu_patches)),
        ):
            arguments = (*fields, None, window)
            yield op, (q, k, k, *arguments)
            lse = getattr(cpu, op)(q, k, k, *arguments)[1]
            yield f"{op}_backward", (torch.randn_like(q), q, k, k, lse, *arguments, True, True, True)


def run_cases(ops) -> None:
    import torch
    from helpers import results_of

    covered = set()
    for op, arguments in cases():
        for a, b in zip(*(results_of(which, op, arguments) for which in (ops, torch.ops.blt_kernels)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, op=op: f"{op}: {text}")
        covered.add(op)
    source = "".join(path.read_text() for path in (TESTS.parent / "csrc" / "ops" / "cuda").glob("*.cpp"))
    missing = set(re.findall(r'm\.impl\("(\w+)"', source)) - covered
    assert not missing, f"no case for {sorted(missing)}"


def run_broken(ops) -> None:
    import torch

    ops.block_sum(torch.randn(3, 64), False)


def fixed_addresses() -> list[str]:
    """The prefix of a command whose process gets no random addresses, where the system lets us ask for that.

    Now and then a random address falls where ThreadSanitizer wants its shadow memory, and the process dies at once.
    """
    prefix = ["setarch", platform.machine(), "--addr-no-randomize"]
    try:
        works = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        works = False
    return prefix if works else []


def main(sanitizer: str) -> None:
    import emulation

    library = emulation.build_library(TESTS.parent / "build" / f"emulated-{sanitizer.replace(',', '-')}", sanitizer)
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in RUNTIMES[sanitizer]
    ]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(paths)}
    for which, expected in (("cases", 0), ("broken", 66)):
        if which == "broken" and sanitizer != "thread":
            continue
        command = [*fixed_addresses(), sys.executable, __file__, which, str(library)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != expected or (expected and "data race" not in done.stderr):
            sys.exit(f"{sanitizer}: {which}: exit {done.returncode}, expected {expected}\n{done.stdout}\n{done.stderr}")
        print(f"{sanitizer}: {which}: {'clean' if expected == 0 else 'reported, as it must be'}")


if __name__ == "__main__":
    if sys.argv[1] in RUNTIMES:
        main(sys.argv[1])
    elif sys.argv[1] == "cases" and sys.argv[2] in ("gpu", "cpu"):  # "cpu" rehearses what "gpu" does
        from gpu import GPUOps

        run_cases(GPUOps("cuda" if sys.argv[2] == "gpu" else "cpu"))
    elif sys.argv[1] == "ptx":
        import ptx

        if ptx.nvcc() is None:
            print("ptx: not run: no nvcc")
        else:
            run_cases(ptx.PTXOps())
            print("ptx: cases: clean, and the same bits in both orders of blocks and warps")
    else:
        import emulation

        {"cases": run_cases, "broken": run_broken}[sys.argv[1]](emulation.load(Path(sys.argv[2])))
