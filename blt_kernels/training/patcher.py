"""From the tokens of a document to its patches, for data loading, evaluation and display."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._checks import check_bool, check_choice, check_int, check_number, fail_value
from ..layout import PatchLayout
from ..model import EntropyModel, EntropyModelConfig
from ..ops._segment_options import RULES
from ..ops.segment import segment, segment_fixed, segment_spaces
from .lines import entropies_of

METHODS = ("entropy", "spaces", "fixed")


@dataclasses.dataclass(frozen=True)
class PatcherConfig:
    """How documents are cut into patches; the arguments of `segment`, `segment_spaces` and `segment_fixed`.

    Attributes:
        method: "entropy", "spaces" or "fixed".
        rule: of method "entropy": "threshold", "monotonic" or "combined".
        threshold: of method "entropy": a finite number of nats.
        delta: of the rule "combined": a finite number of nats.
        patch_size: of method "fixed": bytes, at least 1.
        max_patch_length: bytes of the longest patch, at least 1; None for no bound.
        reset_at_newline: of method "entropy": whether the entropy model forgets what it has read at the end of each
            line; see `lines`.
    """

    method: str = "entropy"
    rule: str = "threshold"
    threshold: float | None = None
    delta: float | None = None
    patch_size: int | None = None
    max_patch_length: int | None = None
    reset_at_newline: bool = False

    def __post_init__(self) -> None:
        name = "PatcherConfig"
        check_choice(name, "method", self.method, METHODS)
        check_choice(name, "rule", self.rule, RULES)
        owners = {
            "threshold": ("a number of nats for method 'entropy'", self.method == "entropy"),
            "delta": ("a number of nats for rule 'combined'", self.method == "entropy" and self.rule == "combined"),
            "patch_size": ("a number of bytes for method 'fixed'", self.method == "fixed"),
        }
        for field, (meaning, needed) in owners.items():
            if (getattr(self, field) is not None) != needed:
                raise fail_value(name, field, f"{meaning}, and None otherwise", getattr(self, field))
        check_bool(name, "reset_at_newline", self.reset_at_newline)
        if self.reset_at_newline and self.method != "entropy":
            raise fail_value(name, "reset_at_newline", "False for a method without an entropy model", True)
        for field in ("threshold", "delta"):
            if getattr(self, field) is not None:
                check_number(name, field, getattr(self, field), -math.inf)
        for field in ("patch_size", "max_patch_length"):
            if getattr(self, field) is not None:
                check_int(name, field, getattr(self, field), 1, 2**31 - 1)


class Patcher:
    """Cuts documents into patches; with method "entropy" it owns the frozen entropy model.

    Called with the tokens of one document (int64 [n], BOS and EOS included) it returns the patch lengths
    (int64 [p], each at least 1, sum n): the segmenter of `data.PackedBatches`.
    """

    def __init__(self, config: PatcherConfig, entropy_model: EntropyModel | None = None):
        if (config.method == "entropy") != (entropy_model is not None):
            raise fail_value(
                "Patcher",
                "entropy_model",
                "a model for method 'entropy' and none otherwise",
                type(entropy_model).__name__,
            )
        self.config = config
        self.entropy_model = entropy_model.eval().requires_grad_(False) if entropy_model is not None else None

    def to(self, device: str | torch.device) -> Patcher:
        """Moves the entropy model, and with it the cutting, to `device`. Returns this patcher."""
        if self.entropy_model is not None:
            self.entropy_model.to(device)
        return self

    def layout(self, tokens: torch.Tensor) -> PatchLayout:
        """The patches of tokens int64 [B, N], one document a row; C = N."""
        return self._layout_and_entropies(tokens)[0]

    def cut(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """The patch lengths of a document, and what they were decided by.

        Returns:
            lengths: int64 [p].
            entropies: float32 [n], nats: the entropy of the prediction made at each token for the next one. None unless
                the method is "entropy".
        """
        layout, entropies = self._layout_and_entropies(self._row(tokens))
        lengths = layout.lengths()[0, : int(layout.num_patches[0])].cpu().numpy()
        return lengths, None if entropies is None else entropies[0].cpu().numpy()

    def __call__(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.cut(tokens)[0]

    def segment(
        self, tokens: torch.Tensor, entropies: torch.Tensor | None, *, seq_lens: torch.Tensor | None = None
    ) -> PatchLayout:
        """The patches of tokens int64 [B, N], one document a row, by entropies that are known; C = N.

        Args:
            entropies: float32 [B, N], nats, with method "entropy"; otherwise they are not looked at.
            seq_lens: [B], tokens of each row that are real; default N.
        """
        config = self.config
        common: dict[str, Any] = {"max_patch_length": config.max_patch_length, "seq_lens": seq_lens}
        if config.method == "spaces":
            return segment_spaces(tokens, **common)
        if config.method == "fixed":
            assert config.patch_size is not None
            return segment_fixed(tokens, config.patch_size, **common)
        assert config.threshold is not None and entropies is not None
        return segment(entropies, config.threshold, rule=config.rule, delta=config.delta, **common)

    def _layout_and_entropies(self, tokens: torch.Tensor) -> tuple[PatchLayout, torch.Tensor | None]:
        entropies = None
        if self.entropy_model is not None:
            entropies = entropies_of(self.entropy_model, tokens, reset_at_newline=self.config.reset_at_newline)
        return self.segment(tokens, entropies), entropies

    def _row(self, tokens: NDArray[np.int64]) -> torch.Tensor:
        """int64 [1, n], on the device of the entropy model."""
        device = None if self.entropy_model is None else next(self.entropy_model.parameters()).device
        return torch.from_numpy(tokens)[None].to(device)

    def state(self) -> dict[str, Any]:
        """The configurations, JSON-able; see `weights`."""
        model = None if self.entropy_model is None else self.entropy_model.config.to_dict()
        return {"config": dataclasses.asdict(self.config), "entropy_model": model}

    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict of the entropy model; empty where there is none."""
        return {} if self.entropy_model is None else self.entropy_model.state_dict()

    @staticmethod
    def from_state(state: dict[str, Any], weights: dict[str, torch.Tensor]) -> Patcher:
        model = None
        if state["entropy_model"] is not None:
            model = EntropyModel(EntropyModelConfig.from_dict(state["entropy_model"]))
            model.load_state_dict(weights)
        return Patcher(PatcherConfig(**state["config"]), model)
