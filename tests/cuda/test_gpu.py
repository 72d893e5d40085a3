"""What only a GPU can show: graph capture, streams, host syncs and large tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_no_recompile, random_lengths

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
)

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


@pytest.mark.parametrize("name", CASES)
def test_graph_replays_with_other_patches(gpu, name):
    shape, case = CASES[name]
    x, layout = torch.randn(shape, device=gpu), layout_of(0, gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both(case, x, layout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(case, x, layout)
    for seed in (1, 2):
        other = layout_of(seed, gpu)
        layout.copy_(other)
        x.normal_()
        graph.replay()
        for got, expected in zip(captured, both(case, x, other), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("name", CASES)
def test_no_host_sync_on_any_stream(gpu, name):
    shape, case = CASES[name]
    x, layout = torch.randn(shape, device=gpu), layout_of(0, gpu)
    expected = both(case, x, layout)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            got = both(case, x, layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_compiles_once(gpu, name):
    shape, case = CASES[name]
    compiled = torch.compile(lambda x, layout: case(x, layout).sin(), fullgraph=True)
    with assert_no_recompile():
        for seed in range(3):
            x, layout = torch.randn(shape, device=gpu), layout_of(seed, gpu)
            torch.testing.assert_close(compiled(x, layout), case(x, layout).sin())


def test_a_step_of_a_sparse_table_captures_and_does_not_sync(gpu):
    tokens, base = torch.randint(4, 8, (B, N), device=gpu), torch.randn(B, N, D, device=gpu, requires_grad=True)
    table = torch.randn(2 * 101, D, device=gpu)
    ngrams = {"ngram_sizes": (3, 4), "num_rows": 101}

    def step(table):
        out = hash_ngram_embedding(tokens, table, base=base, **ngrams)
        (grad,) = torch.autograd.grad(out.square().sum(), out)
        rows, values, count = hash_ngram_embedding_row_grad(grad, tokens, **ngrams)
        return table.index_add(0, rows, values, alpha=-0.01), count

    torch.cuda.set_sync_debug_mode("error")
    try:
        step(table)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stepped, count = step(table)
        for vocabulary in (1, 4, 250):
            tokens.copy_(torch.randint(4, 4 + vocabulary, (B, N), device=gpu))
            table.normal_()
            graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    leaf = table.detach().requires_grad_()
    out = hash_ngram_embedding(tokens, leaf, base=base, sparse_grad=True, **ngrams)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(stepped, table - 0.01 * grad.to_dense())
    assert count == grad._nnz()


def test_sparse_gradients_wait_for_the_device_once(gpu):
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
    segment_logits(logits, 5.0, seq_lens=seq_lens, capacity=C)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            entropies, layout = segment_logits(logits, 5.0, seq_lens=seq_lens, capacity=C)
        logits.normal_().mul_(2)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = segment(entropies.cpu(), 5.0, seq_lens=seq_lens.cpu(), capacity=C)
    for field in ("offsets", "patch_ids", "visible_ids", "num_patches", "cu_patches", "overflow"):
        assert torch.equal(getattr(layout, field).cpu(), getattr(expected, field))


def test_more_than_2_31_elements(gpu):
    rows, width = (1 << 31) // 1024 + 64, 1024
    if torch.cuda.mem_get_info()[0] < 5 * rows * width * 2:
        pytest.skip("not run: less than 22 GB of GPU memory are free")
    x = torch.zeros(1, rows, width, dtype=torch.bfloat16, device=gpu)
    x[0, -3:] = 2
    layout = PatchLayout.from_lengths(torch.tensor([[rows - 3, 3]]), rows).to(gpu)
    pooled = patch_pool(x, layout, "sum")
    assert (pooled[0, 0] == 0).all() and (pooled[0, 1] == 6).all()
    gathered = patch_gather(pooled, layout, "own")
    assert (gathered[0, -3:] == 6).all() and (gathered[0, :-3] == 0).all()
