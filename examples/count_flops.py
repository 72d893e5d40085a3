"""What a Byte Latent Transformer costs per byte, component by component, and what patches save.

You learn: `blt_kernels.model.flops`, how the paper's count and the inclusive one differ, and that torch's own
`FlopCounterMode` counts these ops too.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

import blt_kernels.flops  # noqa: F401, importing it teaches the counter the ops
from blt_kernels import encoder_cross_attention, segment_fixed
from blt_kernels.model import BLTConfig, EntropyModelConfig
from blt_kernels.model.flops import blt_flops

config, entropy_model = BLTConfig.preset("1B"), EntropyModelConfig.preset("100M")
paper, inclusive = (
    blt_flops(config, 4.5, context_bytes=8192, entropy_model=entropy_model, count=count)
    for count in ("paper", "inclusive")
)
print("MFLOPs per byte of the released 1B model, patches of 4.5 bytes     paper   inclusive")
for name in inclusive.components:
    print(f"  {name:62} {paper.components.get(name, 0) / 1e6:7.1f}   {inclusive.components[name] / 1e6:9.1f}")
print(f"  {'all of it, forward':62} {paper.forward / 1e6:7.1f}   {inclusive.forward / 1e6:9.1f}")
print(f"  {'training':62} {paper.training / 1e6:7.1f}   {inclusive.training / 1e6:9.1f}\n")

print("Longer patches: the latent transformer runs less often, the local models as often as before.")
for patch_size in (1, 2, 4.5, 6, 8):
    ledger = blt_flops(config, patch_size, context_bytes=8192, entropy_model=entropy_model)
    share = sum(flops for name, flops in ledger.components.items() if "latent" in name) / ledger.forward
    print(
        f"  patches of {patch_size:3g} bytes: {ledger.forward / 1e6:6.0f} MFLOPs per byte, {share:.0%} of them latent"
    )

# The counter of torch sees the ops as they run. Two products of 2 FLOPs for each of N keys, K slots, H heads of E.
N, K, H, E = 1024, 2, 4, 32
layout = segment_fixed(torch.zeros(1, N, dtype=torch.long), 4).trim()
q, k = torch.randn(1, layout.capacity * K, H, E), torch.randn(1, N, H, E)
with FlopCounterMode(display=False) as counter:
    encoder_cross_attention(q, k, k, layout)
print(
    f"\nFlopCounterMode: {counter.get_total_flops()} FLOPs of encoder_cross_attention, by hand {2 * 2 * N * K * H * E}"
)
