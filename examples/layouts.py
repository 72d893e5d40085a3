"""One description of which bytes belong to which patch: made from your own patches, trimmed, packed and checked.

You learn: `PatchLayout.from_lengths`, `from_starts`, `trim`, `pack`, `unpack`, `validate`, and what is in a layout.
"""

import dataclasses

import torch

from blt_kernels import PatchLayout, segment_fixed

# From lengths: two rows of 8 bytes, the second with 6 real bytes. Zeros are empty slots.
layout = PatchLayout.from_lengths(
    torch.tensor([[1, 4, 3, 0], [2, 4, 0, 0]]), num_bytes=8, seq_lens=torch.tensor([8, 6])
)
print(layout)
print("patch of each byte:       ", layout.patch_ids.tolist())
print("last patch finished there:", layout.visible_ids.tolist(), "(what a causal decoder may read)")
print("bytes of each patch:      ", layout.lengths().tolist())

# From a mask of patch starts: the same patches.
starts = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0, 0, 0]]).bool()
same = PatchLayout.from_starts(starts, seq_lens=torch.tensor([8, 6]), capacity=4)
print("from_starts gives the same:", torch.equal(same.patch_ids, layout.patch_ids))

# Three sequences packed in one row, as `cu_seqlens` delimits them: no patch reaches from one into the next.
packed = segment_fixed(torch.zeros(1, 20, dtype=torch.long), 4, cu_seqlens=torch.tensor([0, 9, 11, 20]))
print(
    "\npacked:",
    packed.lengths()[packed.lengths() > 0].tolist(),
    "with slots of each sequence at",
    packed.cu_patches.tolist(),
)

# Slots: a latent transformer computes all of them, so drop those that no row uses. This waits for the device once.
trimmed = layout.trim()
print(f"\ntrim: {layout.capacity} slots a row -> {trimmed.capacity}, used {trimmed.num_patches.tolist()}")

# Or leave no slot unused at all: all rows one after the other, for attention with cu_seqlens, and back again.
y = torch.randn(2, trimmed.capacity, 16)
flat = trimmed.pack(y)
back = trimmed.unpack(flat)
used = torch.arange(trimmed.capacity) < trimmed.num_patches[:, None]
print(f"pack: {list(y.shape)} -> {list(flat.shape)}, cu_patches {trimmed.cu_patches.tolist()}")
print("unpack restores every used slot:", torch.equal(back[used], y[used]))

# Memory, for 16,384 bytes of text in patches of 4: a dense mask of bytes by patches, and this.
long = segment_fixed(torch.zeros(1, 16384, dtype=torch.long), 4).trim()
ours = sum(getattr(long, field.name).nbytes for field in dataclasses.fields(long))
mask = long.num_bytes * long.capacity
print(f"\n{long.num_bytes} bytes in {long.capacity} patches: mask {mask / 1e6:.0f} MB, layout {ours / 1e6:.2f} MB")

# A layout that came from elsewhere can be wrong. `validate` names the first broken promise.
broken = dataclasses.replace(layout, visible_ids=layout.patch_ids)
try:
    broken.validate()
except ValueError as error:
    print(f"\nvalidate: {error}")
