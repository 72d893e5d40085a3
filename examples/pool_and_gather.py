"""Pool bytes into patches and spread patches over bytes, beside the plain PyTorch that does the same.

You learn: `patch_pool` and `patch_gather`, that values and gradients agree with `scatter_reduce` and `gather`, and what
the expanded int64 index costs that plain PyTorch needs and these ops do not.
"""

import torch

from blt_kernels import PatchLayout, patch_gather, patch_pool

B, N, D = 2, 4096, 256
torch.manual_seed(0)
starts = torch.rand(B, N) < 0.22
layout = PatchLayout.from_starts(starts | (torch.arange(N) == 0)).trim()
C = layout.capacity
print(f"{B} rows of {N} bytes, {layout.num_patches.tolist()} patches, states of width {D}")

x = torch.randn(B, N, D, requires_grad=True)
index = layout.patch_ids.long()[..., None].expand(-1, -1, D)  # int64, one number for each element of x
for reduce, name in {"max": "amax", "min": "amin", "mean": "mean", "sum": "sum"}.items():
    ours = patch_pool(x, layout, reduce)  # [B, C, D]; empty slots are 0
    plain = torch.zeros(B, C, D).scatter_reduce(1, index, x, name, include_self=False)
    weight = torch.randn_like(ours)
    (ours_grad,) = torch.autograd.grad((ours * weight).sum(), x)
    (plain_grad,) = torch.autograd.grad((plain * weight).sum(), x)
    apart = (ours - plain).abs().max(), (ours_grad - plain_grad).abs().max()
    print(f"patch_pool {reduce:4}: largest difference {apart[0]:.1e}, of the gradient {apart[1]:.1e}")

# "visible" is the last patch finished at or before a byte: what a causal decoder may read. "own" undoes a pool.
y = torch.randn(B, C, D, requires_grad=True)
for which, ids in {"visible": layout.visible_ids, "own": layout.patch_ids}.items():
    ours = patch_gather(y, layout, which)  # [B, N, D]; 0 where there is no patch yet
    clamped = ids.long().clamp(min=0)[..., None].expand(-1, -1, D)
    plain = y.gather(1, clamped) * (ids >= 0)[..., None]
    weight = torch.randn_like(ours)
    (ours_grad,) = torch.autograd.grad((ours * weight).sum(), y)
    (plain_grad,) = torch.autograd.grad((plain * weight).sum(), y)
    apart = (ours - plain).abs().max(), (ours_grad - plain_grad).abs().max()
    print(f"patch_gather {which:7}: largest difference {apart[0]:.1e}, of the gradient {apart[1]:.1e}")

expanded, ids = index.numel() * index.element_size() / 1e6, layout.patch_ids.nbytes / 1e6
print(f"the expanded index takes {expanded:.0f} MB once it is copied, the ids of the layout {ids:.2f} MB")
