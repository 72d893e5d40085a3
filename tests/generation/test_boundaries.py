"""Boundaries decided byte by byte are those of the ops over whole rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from blt_kernels.generation.boundaries import Boundaries
from blt_kernels.training.patcher import Patcher, PatcherConfig

CONFIGS: list[dict[str, Any]] = [
    {"threshold": 1.5},
    {"threshold": float(np.float32(1.1))},
    {"threshold": 0.1, "rule": "monotonic"},
    {"threshold": 1.0, "rule": "combined", "delta": 0.1},
    {"method": "spaces"},
    {"method": "fixed", "patch_size": 1},
    {"method": "fixed", "patch_size": 4},
]


class _WithoutModel(Patcher):
    """Segments by entropies that the test makes."""

    def __init__(self, config: PatcherConfig):
        self.config = config


@pytest.mark.parametrize("longest", [None, 1, 2, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: " ".join(map(str, config.values())))
def test_decisions_are_those_of_the_ops(config: dict[str, Any], longest: int | None) -> None:
    """Rows that begin with nothing and with a prompt; some entropies lie on the threshold."""
    config = config | {"max_patch_length": longest}
    rng = np.random.default_rng(0)
    rows, length, prompt = 12, 40, 17
    tokens = rng.choice([0, 2, 3, 36, 52, 69, 101, 132, 199, 255], (rows, length)).astype(np.int64)
    tokens[:, 0] = 1
    entropies = rng.choice([0.2, 0.5, 0.6, 1.1, 1.5, 1.6, 3.0, np.nan], (rows, length)).astype(np.float32)
    layout = _WithoutModel(PatcherConfig(**config)).segment(torch.from_numpy(tokens), torch.from_numpy(entropies))
    expected = (layout.visible_ids == layout.patch_ids).numpy()  # the byte's own patch is finished with it

    boundaries = Boundaries(PatcherConfig(**config), rows)
    for t in range(length):
        if t == prompt:
            for row in range(0, rows, 2):  # as if these rows had come with a prompt now
                begin = int(layout.offsets[row, int(layout.visible_ids[row, t - 1]) + 1])
                assert t - begin == boundaries.open_lengths[row]
                boundaries.set_row(row, t, t - begin, int(tokens[row, t - 1]), float(entropies[row, t - 1]))
        assert (boundaries.add(tokens[:, t], entropies[:, t]) == expected[:, t]).all(), t
    assert (boundaries.positions == length).all()
