"""Loading any directory: strict about tensors, damaged files refused by name, memory for the weights and no more."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blt_kernels.checkpoints import from_pretrained, load_any, save_pretrained
from blt_kernels.checkpoints.tensors import INDEX_FILE
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.training.checkpoint import CheckpointError, save_checkpoint
from blt_kernels.training.patcher import Patcher, PatcherConfig

LOCAL = TransformerConfig(16, 1, 2, 256, window=8)
CONFIG = BLTConfig(LOCAL, TransformerConfig(24, 1, 2, 256), LOCAL, ngram_sizes=(3, 4), hash_rows=11)
ENTROPY = EntropyModelConfig(TransformerConfig(16, 1, 2, 256, window=8, rope_theta=10000.0))
FORMATS = ("transformers", "meta")


@pytest.fixture(scope="module")
def pair() -> tuple[BLT, Patcher]:
    torch.manual_seed(0)
    model = BLT(CONFIG).eval()
    torch.nn.init.normal_(model.encoder_hash_tok_embedding.weight)
    return model, Patcher(PatcherConfig(threshold=1.5), EntropyModel(ENTROPY))


def edit(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_missing_unexpected_and_misshaped_tensors_are_named(pair, tmp_path: Path) -> None:
    save_pretrained(tmp_path, *pair)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.local_decoder.norm.bias"] = torch.zeros(16)
        del tensors["model.local_encoder.layers.0.self_attn.q_proj.weight"]
        tensors["model.patcher.norm.weight"] = torch.zeros(15)
        tensors["model.local_decoder.norm.weight"] = torch.zeros(16, dtype=torch.int32)

    edit(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError) as caught:
        BLT.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: its tensors do not fit its configuration: "
        "missing: model.local_encoder.layers.0.self_attn.q_proj.weight; "
        "unexpected: model.local_decoder.norm.bias; "
        "of another shape: model.patcher.norm.weight: expected (16,), got (15,); "
        "not floating-point: model.local_decoder.norm.weight"
    )


def test_a_table_too_few_is_named(pair, tmp_path: Path) -> None:
    save_pretrained(tmp_path, *pair, format="meta")
    edit(tmp_path / "model.safetensors", lambda tensors: tensors.pop("encoder_hash_tok_embedding.1.weight"))
    with pytest.raises(CheckpointError, match=r"missing: encoder_hash_tok_embedding\.1\.weight$"):
        BLT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("format", "file", "damage"),
    [
        ("transformers", "model.safetensors", lambda content: content[: len(content) // 2]),
        ("transformers", "model.safetensors", lambda content: b""),
        ("transformers", "model.safetensors", lambda content: b"{}" * 99),
        ("transformers", "config.json", lambda content: content[:-9]),
        ("transformers", "config.json", lambda content: b"[1]"),
        ("meta", "entropy_model/consolidated.pth", lambda content: content[: len(content) // 2]),
        ("meta", "entropy_model/consolidated.pth", lambda content: b"garbage"),
        ("meta", "entropy_model/params.json", lambda content: b"{}"),
    ],
)
def test_damaged_files_are_refused_by_name(pair, format: str, file: str, damage, tmp_path: Path) -> None:
    save_pretrained(tmp_path, *pair, format=format)
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=file):
        BLT.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError):
        BLT.from_pretrained(tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_runs_nothing(pair, tmp_path: Path, capsys) -> None:
    save_pretrained(tmp_path, *pair, format="meta")
    torch.save({"model": {"norm.weight": Evil()}}, tmp_path / "entropy_model" / "consolidated.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.pth: cannot be used"):
        BLT.from_pretrained(tmp_path)
    torch.save([1, 2], tmp_path / "entropy_model" / "consolidated.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.pth: expected a dict of tensors under the key 'model'"):
        BLT.from_pretrained(tmp_path)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda weight_map: weight_map.update({"lm_head.weight": "../elsewhere.safetensors"}),
            "expected files of this",
        ),
        (lambda weight_map: weight_map.update(other=weight_map["lm_head.weight"]), "says that it holds other"),
        (lambda weight_map: weight_map.pop("lm_head.weight"), "does not say that it holds lm_head.weight"),
        (lambda weight_map: weight_map.update({"lm_head.weight": "gone.safetensors"}), "gone.safetensors: missing"),
        (lambda weight_map: weight_map.update({"lm_head.weight": 7}), "weight_map: expected an object"),
    ],
)
def test_shards_and_their_index_agree(pair, change, words: str, tmp_path: Path) -> None:
    save_pretrained(tmp_path, *pair, max_shard_bytes=40_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert BLT.from_pretrained(tmp_path)[0].config == CONFIG
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    change(index["weight_map"])
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        BLT.from_pretrained(tmp_path)


def test_a_whole_file_comes_before_shards(pair, tmp_path: Path) -> None:
    """As in transformers, which leaves the index of an earlier save where it is."""
    save_pretrained(tmp_path / "shards", *pair, max_shard_bytes=40_000)
    save_pretrained(tmp_path / "whole", *pair)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "shards" / "model.safetensors")
    loaded, _ = BLT.from_pretrained(tmp_path / "shards")
    assert torch.equal(loaded.lm_head.weight, pair[0].lm_head.weight + 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder_hash_byte_group_vocab": 10**18}, "cannot be used"),
        ({"encoder_hash_byte_group_vocab": 10**30}, "cannot be used"),
        ({"global_config": {"num_hidden_layers": 10**9}}, "1000000000 layers in the latent transformer"),
        ({"patcher_config": {"num_hidden_layers": 10**9}}, "1000000000 layers in the entropy model"),
    ],
)
def test_huge_numbers_are_refused_at_once(pair, change, words: str, tmp_path: Path) -> None:
    save_pretrained(tmp_path, *pair)
    values = json.loads((tmp_path / "config.json").read_text())
    for name, value in change.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*{words}"):
        BLT.from_pretrained(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_dtypes(pair, format: str, tmp_path: Path) -> None:
    model, patcher = pair
    save_pretrained(tmp_path, model, patcher, format=format)
    loaded, cutter = BLT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.bfloat16(), rtol=0, atol=0)
    assert {tensor.dtype for tensor in cutter.weights().values()} == {torch.float32}
    with pytest.raises(ValueError, match=r"load_any: dtype: expected a floating-point dtype, got torch\.int32"):
        load_any(tmp_path, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"load_any: dtype: expected a torch\.dtype or None, got str"):
        load_any(tmp_path, dtype="bfloat16")
    # What is saved in several dtypes is loaded in one that holds them all.
    save_pretrained(tmp_path / "half", loaded, None)
    assert BLT.from_pretrained(tmp_path / "half")[0].lm_head.weight.dtype == torch.bfloat16
    edit(tmp_path / "half" / "model.safetensors", lambda named: named.update({"lm_head.weight": model.lm_head.weight}))
    assert {p.dtype for p in BLT.from_pretrained(tmp_path / "half")[0].parameters()} == {torch.float32}


def test_training_what_was_loaded_does_not_write_to_the_file(pair, tmp_path: Path) -> None:
    save_pretrained(tmp_path, *pair)
    before = (tmp_path / "model.safetensors").read_bytes()
    model, _ = BLT.from_pretrained(tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_link_to_a_directory_stays(pair, tmp_path: Path) -> None:
    """Whether the directory is empty or not there yet."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        link = tmp_path / f"to {name}"
        link.symlink_to(tmp_path / name)
        save_pretrained(link, *pair)
        assert link.is_symlink() and BLT.from_pretrained(tmp_path / name)[0].config == CONFIG


def test_nothing_is_written_over(pair, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a directory to make"):
        save_pretrained(tmp_path, *pair)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="format: expected one of 'transformers', 'meta', got 'gguf'"):
        save_pretrained(tmp_path / "out", *pair, format="gguf")
    with pytest.raises(TypeError, match="model: expected a BLT, got EntropyModel"):
        save_pretrained(tmp_path / "out", pair[1].entropy_model, None)
    with pytest.raises(TypeError, match="patcher: expected a Patcher or None, got EntropyModel"):
        save_pretrained(tmp_path / "out", pair[0], pair[1].entropy_model)


@pytest.mark.parametrize("kind", ["blt", "entropy_model"])
def test_runs_and_their_checkpoints(pair, kind: str, tmp_path: Path) -> None:
    model, patcher = pair
    saved = model if kind == "blt" else patcher.entropy_model
    groups = {"model": saved.state_dict()}
    if kind == "blt":
        groups["entropy_model"] = patcher.weights()
    state = {"kind": kind, "model": saved.config.to_dict(), "patcher": patcher.state() if kind == "blt" else None}
    for path in (save_checkpoint(tmp_path, 3, groups, state), tmp_path):
        loaded, cutter = load_any(path, dtype=torch.bfloat16)
        assert loaded.config == saved.config and loaded.lm_head.weight.dtype == torch.bfloat16
        if kind == "blt":
            assert from_pretrained(path)[1].state() == cutter.state() == patcher.state()
            assert cutter.entropy_model.lm_head.weight.dtype == torch.float32
        else:
            with pytest.raises(ValueError, match=r"path: expected a directory that holds a BLT, got .*: EntropyModel"):
                BLT.from_pretrained(path)


def test_directories_without_a_model(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            load_any(path)


# A process of its own: what this one has used before would hide what loading needs.
MEASURE = """
    import re, sys, torch
    from blt_kernels.checkpoints import load_any

    def peak():
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1])

    load_any(sys.argv[2])  # whatever is loaded once, as libraries
    dtype = getattr(torch, sys.argv[3])
    before = peak()
    model, patcher = load_any(sys.argv[1], dtype=dtype)
    used = [*model.parameters(), *patcher.entropy_model.parameters()]
    for tensor in used:
        tensor.detach().flatten()[::512].sum()  # every page
    print((peak() - before) / sum(tensor.nbytes for tensor in used))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(("format", "dtype"), [("transformers", "float32"), ("meta", "bfloat16"), ("run", "float32")])
def test_loading_needs_memory_for_the_weights_alone(pair, format: str, dtype: str, tmp_path: Path) -> None:
    """At most 1.15 times a model of 300 MB, half of it in hash tables: mapped, and converted piece by piece."""
    latent = TransformerConfig(768, 6, 12, 2048)
    config = BLTConfig(LOCAL, latent, LOCAL, ngram_sizes=(3, 4), hash_rows=1_180_000)
    with torch.device("meta"):
        model = BLT(config)
    model = model.to_empty(device="cpu")
    assert 295e6 < sum(parameter.nbytes for parameter in model.parameters()) < 350e6
    for name, saved in (("big", model), ("small", pair[0])):
        if format == "run":
            state = {"kind": "blt", "model": saved.config.to_dict(), "patcher": pair[1].state()}
            groups = {"model": saved.state_dict(), "entropy_model": pair[1].weights()}
            save_checkpoint(tmp_path / name, 1, groups, state)
        else:
            save_pretrained(tmp_path / name, saved, pair[1], format=format)
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "big"), str(tmp_path / "small"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) <= 1.15
