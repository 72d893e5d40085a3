"""`blt-kernels convert` and `byteify`, and commands that take directories of published models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from blt_kernels.checkpoints import from_pretrained, save_pretrained
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.model.config import BLT_PRESETS
from blt_kernels.training.load import load_model
from blt_kernels.training.patcher import Patcher, PatcherConfig

pytest.importorskip("typer")
from test_cli import fails, last_losses, run

LOCAL = TransformerConfig(32, 1, 2, 256, window=16)
CONFIG = BLTConfig(LOCAL, TransformerConfig(64, 1, 4, 256, num_kv_heads=2), LOCAL, ngram_sizes=(3, 4), hash_rows=101)


@pytest.fixture(scope="module", autouse=True)
def small_blt() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLT_PRESETS, "tiny", dataclasses.replace(CONFIG, hash_dim=8))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(4):
        (folder / f"{i}.txt").write_text("".join(f"def f_{i}_{j}(x):\n    return x + {j}\n" for j in range(60)))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of transformers' format, with a model that cuts by entropy."""
    torch.manual_seed(0)
    entropy_model = EntropyModel(EntropyModelConfig(dataclasses.replace(LOCAL, rope_theta=10000.0)))
    folder = tmp_path_factory.mktemp("published")
    save_pretrained(folder, BLT(CONFIG), Patcher(PatcherConfig(threshold=5.1), entropy_model))
    return folder


def logits(path: Path) -> torch.Tensor:
    model, patcher = from_pretrained(path)
    tokens = torch.arange(4, 64)[None]
    return model(tokens, patcher.layout(tokens).trim())


def test_convert_there_and_back(published: Path, tmp_path: Path) -> None:
    meta, back = tmp_path / "meta", tmp_path / "back"
    said = run("convert", published, meta, "--format", "meta").stdout
    assert str(meta) in said and "patches by entropy" in said
    run("convert", meta, back)
    assert (meta / "entropy_model" / "params.json").exists() and not (back / "entropy_model").exists()
    for path in (meta, back):
        torch.testing.assert_close(logits(path), logits(published), rtol=0, atol=0)
    assert "expected a directory to make" in fails("convert", meta, back)
    assert "no checkpoint here" in fails("convert", tmp_path / "gone", tmp_path / "out")
    assert "format: expected one of 'transformers', 'meta'" in fails(
        "convert", meta, tmp_path / "x", "--format", "gguf"
    )


def test_commands_take_a_published_directory(published: Path, text: Path, tmp_path: Path) -> None:
    result = json.loads(run("eval", published, text / "0.txt", "--json").stdout)
    assert 7 < result["bits_per_byte"]["BLT"] < 10  # it is untrained
    shown = run("patch", "--model", published, "def f(x):").stdout
    assert "threshold 5.1" in shown
    save_pretrained(tmp_path / "bare", BLT(CONFIG), None)
    assert "expected a model with a patcher" in fails("eval", tmp_path / "bare", text / "0.txt")
    assert "--model: expected a model with a patcher" in fails("patch", "--model", tmp_path / "bare", "text")


STEPS = ("--row-tokens", 256, "--holdout-bytes", 500, "--checkpoint-every", 2)


def test_training_starts_from_a_published_directory(published: Path, text: Path, tmp_path: Path) -> None:
    """It takes the shape and the patches from there, is resumed without it, and a run of it can be converted."""
    rates: tuple[Any, ...] = ("--learning-rate", 1e-9, "--table-learning-rate", 1e-9, "--latent-lr-scale", 0.5)
    arguments = (text, "--init", published, *STEPS, *rates)
    run("train", *arguments, "--run", tmp_path / "run", "--steps", 2)
    model, patcher, state = load_model(tmp_path / "run")
    expected, _ = from_pretrained(published)
    assert model.config == CONFIG and patcher.config.threshold == 5.1
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert state["train"]["optim"]["latent_lr_scale"] == 0.5
    assert state["notes"]["options"]["init"] == str(published.resolve())

    rates = ("--learning-rate", 1e-3)
    run("train", text, "--init", published, *STEPS, *rates, "--run", tmp_path / "whole", "--steps", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blt_kernels.training.trainer.Trainer._log", interrupt_after(2))
        run("train", text, "--init", published, *STEPS, *rates, "--run", tmp_path / "parts", "--steps", 4, check=False)
    run("train", text, "--run", tmp_path / "parts", "--resume")
    assert last_losses(tmp_path / "parts") == last_losses(tmp_path / "whole")

    run("convert", tmp_path / "whole", tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "whole"), rtol=0, atol=0)


def interrupt_after(step: int) -> Any:
    from blt_kernels.training.trainer import Trainer

    log = Trainer._log

    def interrupted(self: Trainer, metrics: dict[str, Any]) -> None:
        if metrics["step"] > step:
            raise KeyboardInterrupt
        log(self, metrics)

    return interrupted


def test_an_entropy_model_replaces_the_patches_of_the_start(published: Path, text: Path, tmp_path: Path) -> None:
    run("train-entropy", text, "--run", tmp_path / "entropy", "--steps", 2, *STEPS)
    given = ("--entropy-model", tmp_path / "entropy", "--threshold", 4.5)
    run("train", text, "--run", tmp_path / "run", "--init", published, "--steps", 1, *STEPS, *given)
    assert load_model(tmp_path / "run")[1].config.threshold == 4.5


def test_options_without_effect_are_refused(published: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("train", text, "--run", tmp_path / "run", "--init", published)
    assert "--preset: expected none, because --init has a shape" in fails(*arguments, "--preset", "tiny")
    assert "--patch-size: expected none, because --init has patches" in fails(*arguments, "--patch-size", 4)
    save_pretrained(tmp_path / "bare", BLT(CONFIG), None)
    arguments = ("train", text, "--run", tmp_path / "run", "--init", tmp_path / "bare")
    assert "--entropy-model: expected a run or checkpoint, got none" in fails(*arguments)
    assert not (tmp_path / "run").exists()


def test_byteify_starts_a_blt_from_a_token_model(text: Path, tmp_path: Path) -> None:
    llama, out = tmp_path / "llama", tmp_path / "out"
    llama.mkdir()
    layers = BLT(CONFIG).global_transformer.layers.state_dict()
    save_file({f"model.layers.{name}": tensor for name, tensor in layers.items()}, llama / "model.safetensors")
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": "llama", "intermediate_size": 256, "rope_theta": 5e5, "rms_norm_eps": 1e-5} | shape
    (llama / "config.json").write_text(json.dumps(config))
    assert "1 latent layers" in run("byteify", llama, out, "--preset", "tiny").stdout
    model, patcher = from_pretrained(out)
    assert model.config == CONFIG and patcher is None
    for name, tensor in model.global_transformer.layers.state_dict().items():
        assert torch.equal(tensor.sort(dim=0).values, layers[name].sort(dim=0).values)  # rows of q and k change places
    assert "`blt-kernels byteify` starts a BLT from it" in fails("convert", llama, tmp_path / "other")
    start = ("--init", out, "--patching", "spaces", "--latent-lr-scale", 0.1)
    run("train", text, "--run", tmp_path / "run", *start, "--steps", 1, *STEPS)
    assert load_model(tmp_path / "run")[1].config.method == "spaces"
