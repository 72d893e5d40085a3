"""Cross-attention between bytes and patches, beside scaled_dot_product_attention under a dense mask.

You learn: `encoder_cross_attention` (patches read their bytes) and `decoder_cross_attention` (bytes read the last
finished patch), that values and gradients agree with the masked attention that published code uses, how long both take
on your machine, and how much memory the mask takes.
"""

import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from blt_kernels import decoder_cross_attention, encoder_cross_attention, segment_fixed

N, K, H, E = 2048, 2, 4, 32  # bytes, slots a patch, heads, width of a head
torch.manual_seed(0)
torch.set_num_threads(1)  # threads that wait for a busy core would distort the times
layout = segment_fixed(torch.zeros(1, N, dtype=torch.long), 5).trim()
slots = layout.capacity * K
slot_patch = torch.arange(layout.capacity).repeat_interleave(K)  # the patch of each slot: slots are patch-major
print(f"{N} bytes, {layout.capacity} patches of {K} slots, {H} heads of {E}")


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    return out.nan_to_num() * mask.any(-1)[:, :, None, None]  # a query that sees nothing gets 0


def compare(name: str, ours: Callable, dense: Callable, inputs: list[torch.Tensor]) -> None:
    results, grads, seconds = [], [], []
    for function in (ours, dense):
        times = []
        for _ in range(3):  # the first call pays for what is set up once
            for x in inputs:
                x.grad = None
            begin = time.perf_counter()
            out = function()
            out.square().sum().backward()
            times.append(time.perf_counter() - begin)
        seconds.append(min(times))
        results.append(out.detach())
        grads.append(torch.cat([x.grad.flatten() for x in inputs]))
    apart = (results[0] - results[1]).abs().max(), (grads[0] - grads[1]).abs().max()
    print(f"{name}: largest difference {apart[0]:.1e}, of the gradients {apart[1]:.1e}")
    print(f"  forward and backward {seconds[0] * 1e3:.1f} ms, under a dense mask {seconds[1] * 1e3:.1f} ms")


q, k, v = (torch.randn(1, n, H, E, requires_grad=True) for n in (slots, N, N))
mask = slot_patch[:, None] == layout.patch_ids[:, None]  # [1, slots, N]
compare("encoder", lambda: encoder_cross_attention(q, k, v, layout), lambda: masked(q, k, v, mask), [q, k, v])

k, v = (torch.randn(1, slots, H, E, requires_grad=True) for _ in range(2))
q = torch.randn(1, N, H, E, requires_grad=True)
mask = layout.visible_ids[..., None] == slot_patch  # [1, N, slots]
compare("decoder", lambda: decoder_cross_attention(q, k, v, layout), lambda: masked(q, k, v, mask), [q, k, v])

metadata = layout.offsets.nbytes + layout.visible_ids.nbytes + layout.patch_ids.nbytes
print(f"mask: {mask.numel() / 1e6:.2f} MB, quadratic in the text; layout: {metadata / 1e6:.3f} MB, linear")
