"""What a directory holds besides its tensors: the shapes of the models, and how text is cut into patches."""

from __future__ import annotations

import dataclasses
from typing import Any

from .._checks import fail_value
from ..model import BLTConfig, EntropyModelConfig, TransformerConfig
from ..training.patcher import PatcherConfig


@dataclasses.dataclass(frozen=True)
class Description:
    """A BLT and its patcher without their weights.

    Attributes:
        model: the shape of the BLT.
        patcher: how its text is cut; None where the directory does not say.
        entropy_model: the shape of the model that cuts it by entropy; None without one.
    """

    model: BLTConfig
    patcher: PatcherConfig | None = None
    entropy_model: EntropyModelConfig | None = None

    def normal(self) -> Description:
        """The same without what published formats have no words for and no need of: a group of one head, the width of
        the tables, which are written in the width of the model, and the form of their gradients."""
        entropy_model = self.entropy_model
        if entropy_model is not None:
            entropy_model = dataclasses.replace(entropy_model, transformer=_normal(entropy_model.transformer))
        model = dataclasses.replace(
            self.model,
            encoder=_normal(self.model.encoder),
            latent=_normal(self.model.latent),
            decoder=_normal(self.model.decoder),
            hash_dim=None,
            sparse_grad=True,
        )
        return Description(model, self.patcher, entropy_model)


def _normal(config: TransformerConfig) -> TransformerConfig:
    grouped = config.num_kv_heads not in (None, config.num_heads)
    return dataclasses.replace(config, num_kv_heads=config.num_kv_heads if grouped else None)


def check_expressible(format: str, wanted: Description, said: Description) -> None:
    """`said`, which is how a directory of `format` would be read, is what was `wanted`.

    Raises:
        ValueError: names every field that the format cannot say.
    """
    before, after = _flat(dataclasses.asdict(wanted.normal())), _flat(dataclasses.asdict(said.normal()))
    lost = [f"{name} = {value!r}" for name, value in before.items() if name not in after or after[name] != value]
    if lost:
        raise fail_value("save_pretrained", "format", f"one that can express {', '.join(lost)}", repr(format))


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
