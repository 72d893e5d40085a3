"""`python -m benchmarks tables`: which runs it makes, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import table_optimizers
from benchmarks.table_optimizers import FILE, RATES, SEEDS, next_run, read, table
from blt_kernels.training.optim import TABLE_OPTIMIZERS


def run(optimizer: str, rate: float, seed: int, bits: float) -> dict:
    return {"optimizer": optimizer, "rate": rate, "seed": seed, "bits_per_byte": bits, "seconds": 1.0}


def result(runs: list[dict]) -> dict:
    machine = {"device": "Some CPU, 2 cores", "torch": "2.13.0", "commit": "abcdef0123456789", "date": "2026-01-01"}
    return {"settings": {"steps": 7}, "text": "a text", "machine": machine, "finished": True, "runs": runs}


def bits_of(optimizer: str, rate: float, seed: int) -> float:
    return (2.0 if optimizer == TABLE_OPTIMIZERS[0] else 1.9) + abs(rate - 0.1) + 0.01 * seed


def test_the_grid_comes_first_and_then_more_seeds_at_the_best_rates() -> None:
    runs: list[dict] = []
    while (wanted := next_run(runs)) is not None:
        runs.append(run(*wanted, bits_of(*wanted)))
    made = [(each["optimizer"], each["rate"], each["seed"]) for each in runs]
    grid = [(name, rate, SEEDS[0]) for name in TABLE_OPTIMIZERS for rate in RATES]
    assert made == grid + [(name, 0.1, seed) for name in TABLE_OPTIMIZERS for seed in SEEDS[1:]]
    first, second = table(result(runs)).rows
    assert first[1:] == ("2.090", "2.070", "2.000", "2.200", "2.010 (2.000 .. 2.020), 3 seeds at 0.1")
    assert second[0] == TABLE_OPTIMIZERS[1] and second[-1].startswith("1.910 (1.900 .. 1.920)")


def test_the_page_says_where_and_on_what(tmp_path: Path) -> None:
    made = result([run("rowwise_adagrad", 0.1, 0, 2.0), run("sparse_adam", 0.3, 0, 2.1), run("sparse_adam", 0.3, 1, 2)])
    title, lines, differences = table_optimizers.markdown(made)
    assert "after 7 steps" in title and "commit abcdef012345, 2026-01-01; text: a text" in title
    assert "| 2.000 (2.000 .. 2.000), 1 seeds at 0.1 |" in lines
    assert differences.endswith("at their best rates: +0.100.")  # the other has no second seed
    assert table_optimizers.markdown(made | {"finished": False})[-1] == "**Not finished.**"


@pytest.mark.parametrize("text", ['{"runs": ', "[]", "{}", '{"runs": [{}]}'])
def test_a_damaged_result_is_named(text: str, tmp_path: Path) -> None:
    assert read(tmp_path / FILE) is None
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"{FILE}: not a readable result of the optimisers of tables"):
        read(tmp_path / FILE)


def test_runs_are_made_kept_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is real, on a little text; a model that learns nothing would not come below that of 256 equal bytes."""
    monkeypatch.setattr(table_optimizers, "RATES", (0.03,))
    monkeypatch.setattr(table_optimizers, "SEEDS", (0,))
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text("".join(f"line {i * k} of a text that is not long\n" for k in range(60)))
    monkeypatch.setattr(table_optimizers, "USUAL", table_optimizers.Settings(12, entropy_steps=2, autocast=False))
    arguments = ["--data", str(text), "--out", str(tmp_path / "out")]
    table_optimizers.main(arguments)
    (path,) = (tmp_path / "out").rglob(FILE)
    made = json.loads(path.read_text())
    assert made["finished"] and made["settings"]["steps"] == 12
    assert [each["optimizer"] for each in made["runs"]] == list(TABLE_OPTIMIZERS)
    assert all(each["bits_per_byte"] < 7 for each in made["runs"])
    assert len({each["bits_per_byte"] for each in made["runs"]}) == 2
    monkeypatch.setattr(table_optimizers, "train", None)
    table_optimizers.main(arguments)
    assert json.loads(path.read_text()) == made
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("another text")
    with pytest.raises(ValueError, match=f"{FILE}: the result of other settings is here already"):
        table_optimizers.main([*arguments, "--data", str(other)])


def test_a_run_without_steps_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        table_optimizers.main(["--steps", "0"])
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err
