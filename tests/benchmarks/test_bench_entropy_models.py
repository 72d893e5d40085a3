"""`python -m benchmarks entropy_models`: real runs on a little text leave a result for every model and seed."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks import entropy_models
from blt_kernels.model import BLTConfig, TransformerConfig
from blt_kernels.model.config import BLT_PRESETS


def test_every_model_is_trained_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = TransformerConfig(32, 1, 2, 64, window=16)
    small = BLTConfig(local, TransformerConfig(64, 1, 2, 64), local, ngram_sizes=(3, 4), hash_rows=97)
    monkeypatch.setitem(BLT_PRESETS, "tiny", small)
    for name, value in {"FEWEST_STEPS": 4, "TRIAL_BATCHES": 2, "SEEDS": (0, 1)}.items():
        monkeypatch.setattr(entropy_models, name, value)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        lines = [f"value_{j} = {i * j} + {j}\n" for j in range(20 + i)]
        (text / f"{i:02}.txt").write_text("".join(lines))
    settings = ["--seconds", "0.01", "--blt-seconds", "0.01"]
    entropy_models.main([*settings, "--data", str(text), "--out", str(tmp_path / "out")])
    (path,) = (tmp_path / "out").rglob(entropy_models.FILE)
    result = entropy_models.read(path)
    assert result is not None
    runs = result["runs"]
    cut = [f"BLT on patches of {name}, seed {seed}" for seed in (0, 1) for name in ("tiny", "ngram")]
    assert list(runs) == [*entropy_models.MODELS, *cut]
    for name, run in runs.items():
        assert 0 < run["bits_per_byte"] < 8.5 and run["held_out_bytes"] > 0 and run["seconds"] > 0, name
        assert run["steps"] >= 4 and run["trained_bytes"] > 0, name
    assert runs["ngram"]["flops_per_byte"] < runs["tiny"]["flops_per_byte"] / 3
    _, models, _, blts = entropy_models.markdown(result)
    assert f"| ngram | {runs['ngram']['bits_per_byte']:.3f} |" in models
    mean = statistics.mean(runs[name]["bits_per_byte"] for name in cut[1::2])
    assert f"| ngram | {mean:.3f} (" in blts and blts.count("\n") == 3


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entropy_models.main(["--seconds", "nan"])
    assert "--seconds: expected a number above 0, got nan" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"runs": ', "[]", "{}", '{"runs": {"tiny": {}}}'])
def test_a_damaged_result_is_named(text: str, tmp_path: Path) -> None:
    assert entropy_models.read(tmp_path / entropy_models.FILE) is None
    (tmp_path / entropy_models.FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"{entropy_models.FILE}: not a readable result of entropy models"):
        entropy_models.read(tmp_path / entropy_models.FILE)
