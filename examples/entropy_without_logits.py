"""Entropies straight from hidden states: the logits of a long text never reach memory whole.

You learn: `linear_entropy`, its gradients, what it saves against `entropy` of the logits, and why a patch boundary does
not depend on the batch that it was computed in.
"""

import torch

from blt_kernels import calibrate_threshold, entropy, linear_entropy, segment

N, D, V = 16384, 64, 260
torch.manual_seed(0)
hidden = torch.randn(1, N, D, requires_grad=True)  # final states of your byte model
head = torch.nn.Linear(D, V, bias=False)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any torch op returns while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(x.nbytes for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))])
        return out


with LargestTensor() as plain, torch.no_grad():
    expected = entropy(head(hidden))
with LargestTensor() as fused, torch.no_grad():
    entropies = linear_entropy(hidden, head.weight)  # [1, N] nats
print(f"largest tensor: {plain.bytes / 1e6:.1f} MB by way of the logits, {fused.bytes / 1e6:.2f} MB without them")
print(f"largest difference: {(entropies - expected).abs().max():.1e} nats")

wanted = torch.autograd.grad(entropy(head(hidden)).sum(), [hidden, head.weight])
got = torch.autograd.grad(linear_entropy(hidden, head.weight).sum(), [hidden, head.weight])
for name, a, b in zip(("states", "head"), got, wanted, strict=True):
    print(f"gradient of the {name}: {(a - b).norm() / b.norm():.1e} apart, relative")

# Matrix products of a library depend on the number of rows in the last bit, and a byte at the threshold would then
# start a patch in one batch and not in another. These entropies do not.
alone = linear_entropy(hidden[:, 100:101], head.weight)
print("one byte alone has the entropy that it has in the row:", bool(alone[0, 0] == entropies[0, 100]))

threshold = calibrate_threshold(entropies, patch_size=4.5)
layout = segment(entropies, threshold)
print(f"threshold {threshold:.4f} nats: {N / int(layout.num_patches):.2f} bytes a patch")
