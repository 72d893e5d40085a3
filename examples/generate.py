"""Text from a trained model, without running it again over all that is there for every byte.

You learn: `generate` and `stream`, how rows of a batch come and go, and `GenerationState`, whose steps give logits for
a decoding loop of your own. The model is trained for some seconds here and writes accordingly. The command
`blt-kernels generate` does the same with a run of `blt-kernels train`, or with published weights.
"""

import inspect
import string
import textwrap

import torch

from blt_kernels.data import encode
from blt_kernels.generation import GenerationState, generate, stream
from blt_kernels.generation.reference import generate_uncached
from blt_kernels.model import BLT, BLTConfig, TransformerConfig
from blt_kernels.training.patcher import Patcher, PatcherConfig

torch.manual_seed(0)
local = TransformerConfig(dim=64, num_layers=1, num_heads=2, ffn_dim=128, window=64)
latent = TransformerConfig(dim=128, num_layers=2, num_heads=2, ffn_dim=256)
model = BLT(BLTConfig(local, latent, local, ngram_sizes=(2, 3, 4), hash_rows=4099, sparse_grad=False))
patcher = Patcher(PatcherConfig("spaces"))  # or "entropy", with an entropy model and its threshold
text = torch.from_numpy(encode(inspect.getsource(string) + inspect.getsource(textwrap)))
adam = torch.optim.AdamW(model.parameters(), lr=5e-3)
losses = []
for _ in range(40):
    rows = text[torch.randint(len(text) - 257, (4, 1)) + torch.arange(257)]
    rows[:, 0] = 1  # BOS
    loss = model.loss(rows[:, :-1], rows[:, 1:], patcher.layout(rows[:, :-1]).trim())
    loss.mean.backward()
    adam.step()
    adam.zero_grad()
    losses.append(loss.mean.item())
print(f"loss {losses[0]:.2f} nats in the first step, {losses[-1]:.2f} in the last")

# 1. Several prompts at once. Greedy text is, byte for byte, that of a loop that runs the whole model for each byte.
prompts = [b"def ", b"    return self.", b""]
cached = generate(model, patcher, prompts, max_new_bytes=40)
print("equal to the loop without a cache:", cached == generate_uncached(model, patcher, prompts, max_new_bytes=40))

# 2. With more prompts than rows, a new prompt takes the place of a row that has ended, and no text changes.
print("equal with two rows at once:", cached == generate(model, patcher, prompts, max_new_bytes=40, batch_size=2))

# 3. Drawn, as text while it comes; the seed gives the same text again, whatever else is in the batch.
sampling = {"max_new_bytes": 60, "temperature": 0.8, "top_p": 0.9, "seed": 1, "stop": [b"\n\n"]}
pieces = list(stream(model, patcher, b"def ", **sampling))
print(f"{len(pieces)} pieces: {''.join(pieces)!r}")

# 4. A loop of your own: logits [B, V] after every byte. This one counts on the second likeliest byte.
state = GenerationState(model, patcher, [b"import ", b"class "])
for _ in range(20):
    logits = state.logits.clone()
    logits[:, :4] = -torch.inf  # these tokens have no byte
    state.step(logits.topk(2).indices[:, 1])
print("patches that the rows have closed:", state.num_patches)
