"""Figures of a training step, against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blt_kernels.data import Batch
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.model.flops import blt_flops
from blt_kernels.training import metrics
from blt_kernels.training.metrics import StepMeter, device_peak
from blt_kernels.training.patcher import Patcher, PatcherConfig

LOCAL = TransformerConfig(16, 1, 2, 32, window=8)
ENTROPY = EntropyModelConfig(LOCAL)
CONFIG = BLTConfig(LOCAL, TransformerConfig(32, 1, 2, 64), LOCAL, ngram_sizes=(), hash_rows=7)
CPU = torch.device("cpu")


def make_batch(lengths: list[int], patches: list[int] | None = None) -> Batch:
    """A row of 100 tokens and, with patches, of 40 slots."""
    slots = None if patches is None else np.array([patches + [0] * (40 - len(patches))])
    cu_seqlens = np.cumsum([0, *lengths, 0]).astype(np.int32)
    return Batch(np.zeros((1, 100), np.int64), np.zeros((1, 100), np.int64), cu_seqlens, 60, slots, None)


def test_shares_and_rates_of_a_blt() -> None:
    patcher = Patcher(PatcherConfig(threshold=1.0), EntropyModel(ENTROPY))
    batches = [make_batch([60, 30], [3] * 30), make_batch([10, 50, 10], [2] * 35)]
    got = StepMeter(BLT(CONFIG), patcher, CPU).measure(batches, 150, 160, 65, 0.5)
    assert got["bytes_per_second"] == 300
    assert got["tokens_used"] == 160 / 200 and got["slots_used"] == 65 / 80
    assert got["bytes_per_patch"] == 160 / 65
    context = (60**2 + 30**2 + 10**2 + 50**2 + 10**2) / 160
    flops = blt_flops(CONFIG, 160 / 65, context_bytes=context, entropy_model=ENTROPY).training
    assert got["flops_per_second"] == pytest.approx(flops * 160 / 0.5)
    assert "mfu" not in got
    without = StepMeter(BLT(CONFIG), Patcher(PatcherConfig("spaces")), CPU).measure(batches, 150, 160, 65, 0.5)
    assert 0 < without["flops_per_second"] < got["flops_per_second"]


def test_attention_of_sequences_counts_the_keys_that_are_seen() -> None:
    """Of sequences of different lengths, without windows: each token sees those before it and itself."""
    shape = TransformerConfig(16, 1, 2, 32)
    model = EntropyModel(EntropyModelConfig(shape))
    lengths = [1, 7, 60, 30]
    got = StepMeter(model, None, CPU).measure([make_batch(lengths)], 90, 98, 98, 1.0)
    keys = sum(n * (n + 1) / 2 for n in lengths)
    each = 8 * 16 * 16 + 6 * 16 * 32 + 2 * 16 * 260
    assert got["flops_per_second"] == pytest.approx(3 * (98 * each + 4 * 16 * keys))
    assert got.keys() == {"bytes_per_second", "tokens_used", "flops_per_second"}


def test_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "device_peak", lambda device: 1e6)
    monkeypatch.setattr(metrics, "world_size", lambda: 4)
    got = StepMeter(EntropyModel(ENTROPY), None, CPU).measure([make_batch([50])], 180, 200, 200, 1.0)
    assert got["mfu"] == got["flops_per_second"] / 4e6
    assert got["tokens_used"] == 200 / 400


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_known_by_whole_words(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak(torch.device("cuda", 0)) == peak
    assert device_peak(CPU) is None
