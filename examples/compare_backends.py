"""Is it the kernel or my code? Run the same lines on the readable reference implementation and compare.

You learn: `use_backend`, `available_backends`, and how far the compiled ops are from their definitions in
`blt_kernels/reference/`: for fp32 about one part in a million, and for ids and patches nothing at all.
"""

import torch

import blt_kernels as bk

torch.manual_seed(0)
N, D, K, H, V = 1024, 64, 2, 4, 260
hidden, head, logits = torch.randn(1, N, D), torch.randn(V, D), 3 * torch.randn(1, N, V)
table, tokens = torch.randn(3 * 4099, D), torch.randint(4, V, (1, N))
layout = bk.segment_fixed(tokens, 5).trim()
y, slots = torch.randn(1, layout.capacity, D), torch.randn(1, layout.capacity * K, H, D // H)
heads = hidden.unflatten(-1, (H, D // H))
ngrams = {"ngram_sizes": (3, 4, 5), "num_rows": 4099}

OPS = {
    "entropy": lambda: bk.entropy(logits),
    "linear_entropy": lambda: bk.linear_entropy(hidden, head),
    "segment_logits (patches)": lambda: bk.segment_logits(logits, 3.0)[1].patch_ids,
    "segment_spaces (patches)": lambda: bk.segment_spaces(tokens).patch_ids,
    "patch_pool": lambda: bk.patch_pool(hidden, layout, "mean"),
    "patch_gather": lambda: bk.patch_gather(y, layout),
    "encoder_cross_attention": lambda: bk.encoder_cross_attention(slots, heads, heads, layout),
    "decoder_cross_attention": lambda: bk.decoder_cross_attention(heads, slots, slots, layout),
    "hash_ngram_ids": lambda: bk.hash_ngram_ids(tokens, **ngrams),
    "hash_ngram_embedding": lambda: bk.hash_ngram_embedding(tokens, table, base=hidden, **ngrams),
}

print("backends here:", ", ".join(bk.available_backends()))
for name, run in OPS.items():
    compiled = run()
    with bk.use_backend("reference"):
        expected = run()
    apart = (compiled.double() - expected.double()).abs().max() / expected.double().abs().max()
    print(f"{name:26} {apart:.1e} of the largest value apart" if apart else f"{name:26} equal, bit for bit")

# Nothing depends on the number of threads, forward or backward.
x = hidden.clone().requires_grad_()
grads = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    (grad,) = torch.autograd.grad(bk.patch_pool(x, layout, "mean").square().sum(), x)
    grads.append(grad)
print("gradients with 1 and 2 threads are equal, bit for bit:", torch.equal(*grads))
