"""torch.compile: one graph, compiled once, however the text is cut.

You learn: that layouts are plain pytrees of tensors, that the ops compile with `fullgraph=True`, and that other
boundaries of the same shape need no new compilation. The backend "aot_eager" traces forward and backward as the default
one does, but needs no C++ compiler at run time and starts in seconds; leave it out in your own code.
"""

import torch
from torch import nn
from torch._dynamo.utils import counters

from blt_kernels import PatchLayout, decoder_cross_attention, encoder_cross_attention, patch_pool

N, C, D, H, K = 512, 160, 64, 4, 2
torch.manual_seed(0)


class PatchBlock(nn.Module):
    """Bytes to patch slots and back."""

    def __init__(self) -> None:
        super().__init__()
        self.to_queries = nn.Linear(D, K * D)
        self.latent = nn.Linear(D, D)

    def forward(self, x: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]"""
        queries = self.to_queries(patch_pool(x, layout, "max")).view(len(x), -1, H, D // H)
        heads = x.unflatten(-1, (H, -1))
        slots = encoder_cross_attention(queries, heads, heads, layout)
        slots = self.latent(slots.flatten(-2)).unflatten(-1, (H, -1))
        return x + decoder_cross_attention(heads, slots, slots, layout).flatten(-2)


block = PatchBlock()
compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
x = torch.randn(2, N, D)
print("mean patch   largest difference   gradient   graphs compiled so far")
for mean in (8, 6, 5, 4):
    layout = PatchLayout.from_starts(torch.rand(2, N) < 1 / mean, capacity=C)  # a fixed number of slots
    results, grads = [], []
    for model in (block, compiled):
        block.zero_grad()
        out = model(x, layout)
        out.square().mean().backward()
        results.append(out.detach())
        grads.append(block.to_queries.weight.grad.clone())
    apart, grad_apart = (results[0] - results[1]).abs().max(), (grads[0] - grads[1]).abs().max()
    graphs = counters["stats"]["unique_graphs"]
    print(f"{N / layout.num_patches.float().mean():6.2f} bytes   {apart:.1e}              {grad_apart:.1e}    {graphs}")
