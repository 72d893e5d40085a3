"""What only a GPU can show: graph capture, streams, host syncs, other devices and large tensors; and what must be shown
on it again: fakes, autocast, torch.compile and a training step of the model.

Every test also runs as a rehearsal on the CPU, so that none of them fails on a GPU by a slip of its own.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.utils._pytree as pytree
from gpu import captured, has_gpu, move, on_another_stream, without_waiting
from helpers import REPOSITORY, assert_no_recompile, opcheck, random_lengths, results_of
from sanitize import cases as ragged_cases

from blt_kernels import (
    PatchLayout,
    decoder_cross_attention,
    encoder_cross_attention,
    entropy,
    hash_ngram_embedding,
    hash_ngram_embedding_row_grad,
    linear_entropy,
    patch_gather,
    patch_pool,
    segment,
    segment_logits,
    use_backend,
)
from blt_kernels.model import BLT, BLTConfig, TransformerConfig, next_byte_loss

B, N, C, D = 2, 300, 120, 64
Case = Callable[[torch.Tensor, PatchLayout], torch.Tensor]

CASES: dict[str, tuple[tuple[int, ...], Case]] = {
    "entropy": ((B, N, 260), lambda x, layout: entropy(x)),
    "linear_entropy": ((B, N, 32), lambda x, layout: linear_entropy(x, torch.eye(260, 32, device=x.device))),
    "encoder_cross_attention": (
        (B, N, 4, 16),
        lambda x, layout: encoder_cross_attention(torch.ones(B, 2 * C, 4, 16, device=x.device), x, x, layout),
    ),
    "decoder_cross_attention": (
        (B, 2 * C, 4, 16),
        lambda x, layout: decoder_cross_attention(torch.ones(B, N, 4, 16, device=x.device), x, x, layout),
    ),
    "hash_ngram_embedding": (
        (2 * 101, D),
        lambda x, layout: hash_ngram_embedding(layout.patch_ids, x, ngram_sizes=(3, 4), num_rows=101),
    ),
    "patch_pool max": ((B, N, D), lambda x, layout: patch_pool(x, layout, "max")),
    "patch_pool mean": ((B, N, D), lambda x, layout: patch_pool(x, layout, "mean")),
    "patch_gather own": ((B, C, D), lambda x, layout: patch_gather(x, layout, "own")),
    "patch_gather visible": ((B, C, D), lambda x, layout: patch_gather(x, layout, "visible")),
}


def layout_of(seed: int, device: torch.device) -> PatchLayout:
    lengths = random_lengths(N, 4.5, B, seed)
    lengths = torch.nn.functional.pad(lengths, (0, C - lengths.shape[1]))
    return PatchLayout.from_lengths(lengths, N).to(device)


def both(case: Case, x: torch.Tensor, layout: PatchLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and the gradient of its sum of squares."""
    leaf = x.detach().requires_grad_()
    out = case(leaf, layout)
    return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]


# One small ragged call of every op as it is registered, backward ops included.
RAGGED_CALLS = list(ragged_cases())
ragged_calls = pytest.mark.parametrize(
    ("op", "arguments"), RAGGED_CALLS, ids=[f"{op}-{i}" for i, (op, _) in enumerate(RAGGED_CALLS)]
)
# It has as many rows as the tokens have n-grams of their own: the host must know.
WAITS = "hash_ngram_embedding_sparse_backward"


@pytest.fixture(params=["gpu", "rehearsal"])
def gpu(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "rehearsal":
        return torch.device("cpu")
    if not has_gpu():
        pytest.skip("not run: no GPU")
    return torch.device("cuda", torch.cuda.current_device())


def test_moved_tensors_keep_their_offsets_strides_and_shared_memory(gpu):
    wide = torch.randn(2, 5, 7)
    view, other = wide[:, 1:, 2:5], wide[1]
    arguments = (view, [other, view.transpose(0, 1)], torch.zeros(3).expand(4, 3), torch.tensor(1.5), 7, None)
    moved = move(arguments, gpu)
    for was, now in zip(pytree.tree_leaves(arguments), pytree.tree_leaves(moved), strict=True):
        if not isinstance(was, torch.Tensor):
            assert was == now
            continue
        assert now.device == gpu and now.dtype == was.dtype and torch.equal(now.cpu(), was)
        assert (now.stride(), now.storage_offset()) == (was.stride(), was.storage_offset())
        assert now.data_ptr() != was.data_ptr()
    moved[0].zero_()
    assert (moved[1][0][1:, 2:5] == 0).all() and not (wide == 0).any()


@pytest.mark.parametrize("name", CASES)
def test_graph_replays_with_other_patches(gpu, name):
    shape, case = CASES[name]
    x, layout = torch.randn(shape, device=gpu), layout_of(0, gpu)
    results, replay = captured(lambda: both(case, x, layout), gpu)
    for seed in (1, 2):
        other = layout_of(seed, gpu)
        layout.copy_(other)
        x.normal_()
        replay()
        for got, expected in zip(results, both(case, x, other), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("name", CASES)
def test_no_host_sync_on_any_stream(gpu, name):
    shape, case = CASES[name]
    x, layout = torch.randn(shape, device=gpu), layout_of(0, gpu)
    expected = both(case, x, layout)
    with without_waiting(gpu), on_another_stream(gpu):
        got = both(case, x, layout)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_compiles_once(gpu, name):
    shape, case = CASES[name]
    # The CPU's code generator is tested in tests/ops, and would take a minute here.
    backend = "inductor" if gpu.type == "cuda" else "aot_eager"
    compiled = torch.compile(lambda x, layout: case(x, layout).sin(), fullgraph=True, backend=backend)
    with assert_no_recompile():
        for seed in range(3):
            x, layout = torch.randn(shape, device=gpu), layout_of(seed, gpu)
            torch.testing.assert_close(compiled(x, layout), case(x, layout).sin())


@ragged_calls
def test_every_op_captures_and_does_not_wait(gpu, op, arguments):
    if op == WAITS:
        pytest.skip("not run: it waits for the device by design")
    arguments = move(arguments, gpu)

    def call() -> list[torch.Tensor]:
        return results_of(torch.ops.blt_kernels, op, arguments)

    expected = call()
    with without_waiting(gpu):
        call()
    results, replay = captured(call, gpu)
    for result in results:
        result.zero_()
    replay()
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@ragged_calls
def test_every_op_agrees_with_its_fake(gpu, op, arguments):
    opcheck(op, move(arguments, gpu))


@pytest.mark.parametrize("name", CASES)
def test_autocast(gpu, name):
    """Cross-attention alone casts; every op takes tensors of the lower dtype as they are."""
    shape, case = CASES[name]
    x, layout = torch.randn(shape, device=gpu), layout_of(0, gpu)
    with torch.autocast(gpu.type, torch.bfloat16):
        out = case(x, layout)
    assert out.dtype == (torch.bfloat16 if "cross_attention" in name else torch.float32)
    expected = case(x.bfloat16().float() if out.dtype == torch.bfloat16 else x, layout)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


SMALL_BLT = BLTConfig(
    encoder=TransformerConfig(64, 2, 2, 96, window=32),
    latent=TransformerConfig(96, 2, 2, 128),
    decoder=TransformerConfig(64, 2, 2, 96, window=32),
    ngram_sizes=(3, 4),
    hash_rows=101,
    sparse_grad=False,
)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_training_step_of_the_model(gpu, autocast):
    """Two steps with our ops and with their definitions: the same losses and parameters, and no wait for the device."""
    model = BLT(SMALL_BLT).to(gpu)
    torch.nn.init.normal_(model.encoder_hash_tok_embedding.weight, std=0.1)
    tokens, layout = torch.randint(4, 260, (B, N), device=gpu), layout_of(0, gpu)

    def train(model: BLT) -> list[torch.Tensor]:
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(gpu.type, torch.bfloat16, enabled=autocast):
                loss = next_byte_loss(model(tokens, layout), tokens.roll(-1, 1)).mean
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *(parameter.detach() for parameter in model.parameters())]

    train(copy.deepcopy(model))  # what is set up once may wait
    ours = copy.deepcopy(model)
    with without_waiting(gpu):
        got = train(ours)
    with use_backend("reference"):
        expected = train(model)
    assert got[1] < got[0]
    tolerance = 2e-2 if autocast else 1e-4
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_device_that_is_not_current(gpu):
    """Ops run where their tensors are, leave the current device as it was, and create no context on it."""
    if gpu.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("not run: it takes two GPUs")
    last = torch.cuda.device_count() - 1 if gpu.type == "cuda" else None
    code = f"""
import torch
from blt_kernels import entropy
device = torch.device({gpu.type!r}, {last})
x = torch.randn(5, 260, generator=torch.Generator().manual_seed(0))
torch.testing.assert_close(entropy(x.to(device)).cpu(), entropy(x))
if device.type == "cuda":
    assert torch.cuda.current_device() == 0 and not torch._C._cuda_hasPrimaryContext(0)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


def test_a_step_of_a_sparse_table_captures_and_does_not_sync(gpu):
    tokens, base = torch.randint(4, 8, (B, N), device=gpu), torch.randn(B, N, D, device=gpu, requires_grad=True)
    table = torch.randn(2 * 101, D, device=gpu)
    ngrams = {"ngram_sizes": (3, 4), "num_rows": 101}

    def step(table):
        out = hash_ngram_embedding(tokens, table, base=base, **ngrams)
        (grad,) = torch.autograd.grad(out.square().sum(), out)
        rows, values, count = hash_ngram_embedding_row_grad(grad, tokens, **ngrams)
        return table.index_add(0, rows, values, alpha=-0.01), count

    step(table)
    with without_waiting(gpu):
        step(table)
    (stepped, count), replay = captured(lambda: step(table), gpu)
    for vocabulary in (1, 4, 250):
        tokens.copy_(torch.randint(4, 4 + vocabulary, (B, N), device=gpu))
        table.normal_()
        replay()
    leaf = table.detach().requires_grad_()
    out = hash_ngram_embedding(tokens, leaf, base=base, sparse_grad=True, **ngrams)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(stepped, table - 0.01 * grad.to_dense())
    assert count == grad._nnz()


def test_sparse_gradients_wait_for_the_device_once(gpu):
    if gpu.type != "cuda":
        pytest.skip("not run: the CPU has nothing to wait for")
    tokens = torch.randint(4, 8, (B, N), device=gpu)
    table = torch.randn(2 * 101, D, device=gpu, requires_grad=True)
    for _ in range(2):
        table.grad = None
        out = hash_ngram_embedding(tokens, table, ngram_sizes=(3, 4), num_rows=101, sparse_grad=True).sum()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing") as syncs:
                out.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert sum("synchronizing" in str(warning.message) for warning in syncs) == 1
        assert table.grad.is_coalesced()
    hash_ngram_embedding(tokens, table, ngram_sizes=(3, 4), num_rows=101, sparse_grad=True).sum().backward()
    rows = table.grad._indices()[0]
    assert not table.grad.is_coalesced() or (rows[1:] > rows[:-1]).all()


def test_segmentation_captures_and_does_not_sync(gpu):
    logits = torch.randn(B, N, 260, device=gpu)
    seq_lens = torch.tensor([N, N - 7], device=gpu)

    def call():
        return segment_logits(logits, 5.0, seq_lens=seq_lens, capacity=C)

    call()
    with without_waiting(gpu):
        call()
    (entropies, layout), replay = captured(call, gpu)
    logits.normal_().mul_(2)
    replay()
    expected = segment(entropies.cpu(), 5.0, seq_lens=seq_lens.cpu(), capacity=C)
    for field in ("offsets", "patch_ids", "visible_ids", "num_patches", "cu_patches", "overflow"):
        assert torch.equal(getattr(layout, field).cpu(), getattr(expected, field))


def big(gpu: torch.device, tensors: int) -> int:
    """The number of rows of 1024 with which a tensor has more than 2^31 elements, where so many bf16 tensors fit."""
    if gpu.type != "cuda":
        return 1 << 9
    rows = (1 << 31) // 1024 + 64
    if torch.cuda.mem_get_info()[0] < tensors * rows * 1024 * 2:
        pytest.skip(f"not run: less than {tensors * rows * 1024 * 2 / 1e9:.0f} GB of GPU memory are free")
    return rows


def two_patches(rows: int, gpu: torch.device) -> PatchLayout:
    """One long patch and one of the last three bytes."""
    return PatchLayout.from_lengths(torch.tensor([[rows - 3, 3]]), rows).to(gpu)


def test_more_than_2_31_elements_pooled_and_gathered(gpu):
    rows = big(gpu, 6)
    x = torch.zeros(1, rows, 1024, dtype=torch.bfloat16, device=gpu)
    x[0, -3:] = 2
    layout = two_patches(rows, gpu)
    for reduce, last in (("sum", 6), ("max", 2)):
        pooled = patch_pool(x, layout, reduce)
        assert (pooled[0, 0] == 0).all() and (pooled[0, 1] == last).all()
    leaf = pooled.requires_grad_()
    gathered = patch_gather(leaf, layout, "own")
    assert (gathered[0, -3:] == 2).all() and (gathered[0, :-3] == 0).all()
    (grad,) = torch.autograd.grad(gathered, leaf, x)
    assert (grad[0, 0] == 0).all() and (grad[0, 1] == 6).all()
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(patch_pool(leaf, layout, "sum"), leaf, torch.ones_like(pooled))
    assert (grad == 1).all()


def test_more_than_2_31_elements_of_logits(gpu):
    rows = big(gpu, 4) * 1024 // 260
    x = torch.zeros(rows, 260, dtype=torch.bfloat16, device=gpu)
    x[-5:] = torch.randn(5, 260, device=gpu)
    leaf = x.requires_grad_()
    out = entropy(leaf)
    last = x[-5:].detach().requires_grad_()
    expected = entropy(last)
    assert torch.equal(out[-5:], expected) and (out[:-5] == out[0]).all()
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(grad[-5:], torch.autograd.grad(expected.sum(), last)[0])


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_more_than_2_31_elements_attended(gpu, side):
    rows = big(gpu, 8)
    layout = two_patches(rows, gpu)
    per_byte = torch.zeros(1, rows, 16, 64, dtype=torch.bfloat16, device=gpu)
    per_byte[0, -3:] = 1
    slots = torch.ones(1, 4, 16, 64, dtype=torch.bfloat16, device=gpu)
    leaf = per_byte.requires_grad_()
    if side == "encoder":
        out = encoder_cross_attention(slots, leaf, leaf, layout)
        assert (out[0, :2] == 0).all() and (out[0, 2:] == 1).all()
    else:
        out = decoder_cross_attention(leaf, slots, slots, layout)
        assert (out[0, -3:] == 1).all()
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad.shape == leaf.shape and grad[0, -3:].isfinite().all()
