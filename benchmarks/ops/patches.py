"""Patch lengths to measure with: those of real text, random ones, and the extremes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from blt_kernels import PatchLayout, calibrate_threshold, entropy, segment
from blt_kernels.tokens import BYTE_OFFSET

from .cases import Case, Headline, Setting, in_report

KINDS = ("text 4.5", "text 6", "text 8", "random 4.5", "one patch", "single bytes")


def sweeps(
    setting: Setting,
    cases_of: Callable[[Setting, int, int, int, str], Iterator[Case]],
    headlines: Mapping[str, Headline],
) -> Iterator[Case]:
    """The cases of an op that moves rows of D numbers: sweeps of N, of the patches and of D.

    Args:
        cases_of: the cases at `(setting, B, N, D, kind of patches)`.
        headlines: as for `in_report`.
    """
    for num_bytes in setting.sizes():
        chosen = headlines if num_bytes == setting.headline_bytes else None
        yield from in_report(cases_of(setting, 1, num_bytes, 1024, KINDS[0]), num_bytes, chosen)
    if setting.quick:
        return
    for kind in KINDS[1:]:
        yield from cases_of(setting, 1, 16384, 1024, kind)
    for width in (768, 2048, 4096):
        yield from cases_of(setting, 4, 4096, width, KINDS[0])


def patch_lengths(kind: str, batch: int, num_bytes: int) -> torch.Tensor:
    """int64 [batch, P], every row summing to num_bytes. `kind` is one of KINDS.

    "text" are the entropy patches of Python's own library source, the threshold calibrated to the mean that is
    named; "random" are geometric.
    """
    name, _, mean = kind.partition(" ")
    if kind == "one patch":
        return torch.full((batch, 1), num_bytes)
    if kind == "single bytes":
        return torch.ones(batch, num_bytes, dtype=torch.int64)
    if name == "text":
        entropies = text_entropies(batch * num_bytes).view(batch, num_bytes)
        layout = segment(entropies, calibrate_threshold(entropies, float(mean)))
    else:
        starts = torch.rand(batch, num_bytes) < 1 / float(mean)
        starts[:, 0] = True
        layout = PatchLayout.from_starts(starts)
    lengths = layout.trim().lengths()
    assert (lengths.sum(1) == num_bytes).all()
    return lengths


def layout_for(kind: str, batch: int, num_bytes: int, device: torch.device) -> PatchLayout:
    return PatchLayout.from_lengths(patch_lengths(kind, batch, num_bytes), num_bytes).to(device)


@functools.cache
def library_text(count: int) -> bytes:
    """The first `count` bytes of the source of Python's own library, repeated where it is shorter."""
    data = bytearray()
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        data += path.read_bytes()
        if len(data) >= count:
            return bytes(data[:count])
    return bytes((data * (count // len(data) + 1))[:count])


def text_tokens(batch: int, num_bytes: int) -> torch.Tensor:
    """int64 [batch, num_bytes]: bytes of `library_text`, each plus BYTE_OFFSET."""
    data = torch.frombuffer(bytearray(library_text(batch * num_bytes)), dtype=torch.uint8)
    return data.long().view(batch, num_bytes) + BYTE_OFFSET


@functools.cache
def text_entropies(count: int) -> torch.Tensor:
    """float32 [count]: entropy of the next byte given the two before it, by their counts in the same text (add-0.1).

    This needs no trained model, and yet patches begin where words and phrases do, and their lengths vary like those of
    a trained model.
    """
    text = library_text(max(count, 1 << 18))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    pairs, context = (data[:-2] * 256 + data[1:-1]).unique(return_inverse=True)
    counts = torch.zeros(len(pairs), 256).index_put_((context, data[2:]), torch.ones(()), accumulate=True)
    after = entropy((counts + 0.1).log())[context]  # position i: after bytes i and i + 1
    return torch.cat((after[:1], after, after[-1:]))[:count].contiguous()
