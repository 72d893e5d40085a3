"""PatchLayout and patching once more, from the text of the rules, in loops over bytes. No code of the library."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch

from blt_kernels import PatchLayout

FIELDS = ("offsets", "patch_ids", "visible_ids", "num_patches", "cu_patches", "overflow")


@dataclasses.dataclass
class Sequence:
    row: int
    begin: int  # byte range in its row
    end: int
    slots: dict[int, int]  # byte -> slot, for the bytes that belong to a patch
    next_is_start: bool


def assert_fields(layout: PatchLayout, expected: dict[str, list]) -> None:
    for name in FIELDS:
        tensor = getattr(layout, name)
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
        assert tensor.tolist() == expected[name], f"{name}: {tensor.tolist()}, expected {expected[name]}"


def assert_same(a: PatchLayout, b: PatchLayout) -> None:
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)


def ranges(batch: int, num_bytes: int, seq_lens: list[int] | None, cu: list[int] | None) -> list[tuple[int, int, int]]:
    """(row, begin, end) of every sequence."""
    if cu is not None:
        return [(0, cu[s], cu[s + 1]) for s in range(len(cu) - 1)]
    return [(b, 0, num_bytes if seq_lens is None else seq_lens[b]) for b in range(batch)]


def fields(
    batch: int, num_bytes: int, packed: bool, sequences: list[Sequence], offsets: list[list[int]], overflow: list[int]
) -> dict[str, list]:
    """All fields, from the slot of every byte."""
    patch_ids = [[-1] * num_bytes for _ in range(batch)]
    visible_ids = [[-1] * num_bytes for _ in range(batch)]
    used = [0] * batch
    for s in sequences:
        for byte, slot in s.slots.items():
            patch_ids[s.row][byte] = slot
            used[s.row] = max(used[s.row], slot + 1)

    # Slots of a sequence: from that of its first byte (the first of a row from slot 0) up to those of the next.
    firsts = []
    for k in range(len(sequences)):
        if not packed or all(not earlier.slots for earlier in sequences[:k]):
            firsts.append(0)
        else:
            after = [min(later.slots.values()) for later in sequences[k:] if later.slots]
            firsts.append(after[0] if after else used[0])
    if packed:
        cu_patches = [*firsts, used[0]]
        cu_patches = [0 if not any(s.slots for s in sequences) else c for c in cu_patches]
    else:
        cu_patches = [sum(used[:b]) for b in range(batch + 1)]

    for s, first in zip(sequences, firsts, strict=True):
        for byte, slot in s.slots.items():
            after = s.slots.get(byte + 1, slot + 1 if s.next_is_start else slot)
            visible = after - 1
            visible_ids[s.row][byte] = visible if visible >= first else -1
    values = (offsets, patch_ids, visible_ids, used, cu_patches, overflow)
    return dict(zip(FIELDS, values, strict=True))


def from_lengths(
    lengths: list[list[int]],
    num_bytes: int,
    seq_lens: list[int] | None,
    cu: list[int] | None,
    next_is_start: list[bool] | None,
) -> dict[str, list]:
    batch = len(lengths)
    real = [cu[-1]] * batch if cu is not None else (seq_lens or [num_bytes] * batch)
    owner: list[list[int]] = []  # patch of each byte that the lengths describe, the unseen ones too
    offsets = []
    for b, row in enumerate(lengths):
        owner.append([c for c, length in enumerate(row) for _ in range(max(0, length))])
        offsets.append([min(real[b], sum(max(0, n) for n in row[:c])) for c in range(len(row) + 1)])
    sequences = []
    for s, (b, begin, end) in enumerate(ranges(batch, num_bytes, seq_lens, cu)):
        slots = {i: owner[b][i] for i in range(begin, end) if i < len(owner[b])}
        if next_is_start is not None:
            closed = next_is_start[s]
        else:  # the unseen byte is described, and is not in the patch of the last real one
            closed = end == real[b] and 0 < end < len(owner[b]) and owner[b][end] != owner[b][end - 1]
        sequences.append(Sequence(b, begin, end, slots, closed))
    return fields(batch, num_bytes, cu is not None, sequences, offsets, [0] * batch)


def from_starts(
    mask: list[list[bool]],
    num_bytes: int,
    seq_lens: list[int] | None,
    cu: list[int] | None,
    next_is_start: list[bool] | None,
    capacity: int | None,
) -> dict[str, list]:
    batch = len(mask)
    spans = ranges(batch, num_bytes, seq_lens, cu)
    slots_of_row = [[-1] * num_bytes for _ in range(batch)]
    count, non_empty = [0] * batch, [set() for _ in range(batch)]
    sequences = []
    for s, (b, begin, end) in enumerate(spans):
        slots, slot = {}, None
        for i in range(begin, end):
            if mask[b][i] or (cu is not None and i == begin):
                slot = count[b]
                if capacity is not None:
                    slot = min(slot, capacity - len(spans) + s if cu is not None else capacity - 1)
                count[b] += 1
            if slot is not None:
                slots[i] = slots_of_row[b][i] = slot
                non_empty[b].add(slot)
        sequences.append(Sequence(b, begin, end, slots, bool(next_is_start and next_is_start[s])))
    slots_a_row = num_bytes if capacity is None else capacity
    offsets = []
    for b in range(batch):
        end = max([0, *(e for row, _, e in spans if row == b)])
        offsets.append([min([i for i in range(end) if slots_of_row[b][i] >= c] or [end]) for c in range(slots_a_row)])
        offsets[b].append(end)
    overflow = [count[b] - len(non_empty[b]) for b in range(batch)]
    return fields(batch, num_bytes, cu is not None, sequences, offsets, overflow)


def cut(starts: list[bool], max_patch_length: int | None) -> list[bool]:
    """Cuts the patches that start here, each from its left."""
    if max_patch_length is None:
        return starts
    begins = [p for p, start in enumerate(starts) if start] + [len(starts)]
    out = list(starts)
    for begin, end in itertools.pairwise(begins):
        for p in range(begin, end, max_patch_length):
            out[p] = True
    return out


def entropy_starts(
    e: np.ndarray, threshold: float, rule: str, delta: float | None, max_patch_length: int | None, bos_patch: bool
) -> tuple[list[bool], bool]:
    """Which positions of one sequence start a patch, and whether the one after it does."""
    t, d = np.float32(threshold), np.float32(0 if delta is None else delta)

    def starts(position: int) -> bool:
        if position == 0 or (bos_patch and position == 1):
            return True
        if rule == "threshold":
            return bool(e[position - 1] > t)
        if bos_patch and position == 2:
            return True
        if position == 1:
            return False
        with np.errstate(all="ignore"):
            rise = np.float32(e[position - 1] - e[position - 2])
        if rule == "monotonic":
            return bool(rise > t)
        return bool(rise > d) and bool(e[position - 1] > t)

    everything = cut([starts(position) for position in range(len(e) + 1)], max_patch_length)
    return everything[:-1], everything[-1]


def space_starts(
    tokens: list[int], byte_offset: int, max_patch_length: int | None, bos_patch: bool
) -> tuple[list[bool], bool]:
    def spacelike(token: int) -> bool:
        u = token - byte_offset
        return u < 0x30 or 0x39 < u < 0x41 or 0x5A < u < 0x61 or 0x7A < u < 0x80 or u >= 0xC0

    def starts(position: int) -> bool:
        if position == 0 or (bos_patch and position == 1) or tokens[position - 1] < byte_offset:
            return True
        return position > 1 and spacelike(tokens[position - 1]) and not spacelike(tokens[position - 2])

    everything = cut([starts(position) for position in range(len(tokens) + 1)], max_patch_length)
    return everything[:-1], everything[-1]


def fixed_starts(n: int, patch_size: int, max_patch_length: int | None, bos_patch: bool) -> tuple[list[bool], bool]:
    lengths = ([1] if bos_patch else []) + [patch_size] * (n + 1)
    begins = {sum(lengths[:c]) for c in range(len(lengths))}
    everything = cut([position in begins for position in range(n + 1)], max_patch_length)
    return everything[:-1], everything[-1]
