"""The benchmark suite: what is measured, kept, compared and reported."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import gpu
from benchmarks.ops import cross_attention, hash_ngram_embedding
from benchmarks.ops.harness import (
    OPS,
    Case,
    Options,
    Setting,
    assert_close,
    describe_machine,
    device_slug,
    measure,
    run,
)
from benchmarks.ops.patches import KINDS, patch_lengths, text_entropies, text_tokens
from benchmarks.ops.suite import print_comparison, run_suite
from benchmarks.report import pages, plots, tables
from benchmarks.store import compare, read, write
from benchmarks.timing import Measured, peak_bytes

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def case(**changes) -> Case:
    x = torch.randn(1000)
    variants = {"ours": lambda: x + 1, "other": lambda: (x + 1) + 0}
    return dataclasses.replace(Case("forward", {"N": 1000}, variants, 8000), **changes)


def document(seconds: dict[str, float], *, op: str = "patch_pool", spread: float = 0.01, n: int = 16384) -> dict:
    rows = [
        {
            "environment": "measuring",
            "case": "forward",
            "shapes": {"B": 1, "N": n, "D": 1024, "patches": "text 4.5"},
            "variant": variant,
            "seconds": value,
            "quartiles": [value * (1 - spread), value * (1 + spread)],
            "fraction_of_copy": seconds["copy"] / value,
            "gb_per_second": 1e-9 / value,
            "peak_bytes": 1_000_000,
        }
        for variant, value in seconds.items()
    ]
    facts = {
        "device": "Some CPU, 2 cores",
        "dtype": "float32",
        "torch": "2.13.0",
        "commit": "abc",
        "date": "2026-01-01",
    }
    return {"op": op, **facts, "environments": {}, "rows": rows}


def test_rows_of_a_case():
    rows = run([case()], CPU, rounds=3)
    assert [row["variant"] for row in rows] == ["ours", "other", "copy"]
    by_variant = {row["variant"]: row for row in rows}
    for row in rows:
        low, high = row["quartiles"]
        assert 0 < low <= row["seconds"] <= high
        assert row["fraction_of_copy"] == by_variant["copy"]["seconds"] / row["seconds"]
        assert row["gb_per_second"] == 8000 / row["seconds"] / 1e9
    assert by_variant["ours"]["slower_than_first"] == 1
    assert 4000 <= by_variant["ours"]["peak_bytes"] < 4100  # its result, and a few scalars
    assert 8000 <= by_variant["other"]["peak_bytes"] < 8100  # and what comes between
    assert json.loads(json.dumps(rows)) == rows


def test_nothing_is_timed_that_is_wrong():
    calls = []

    def wrong():
        raise AssertionError("wrong result")

    with pytest.raises(AssertionError, match="wrong result"):
        run([case(variants={"ours": lambda: calls.append(1)}, check=wrong)], CPU, rounds=1)
    assert not calls


def test_cases_are_chosen_by_their_label():
    assert {row["shapes"]["N"] for row in run([case(), case(shapes={"N": 7})], CPU, 1, "N=7")} == {7}


def test_a_call_takes_its_time():
    x = torch.randn(400, 400)
    quick, slow = Measured(lambda: x + 1, CPU), Measured(lambda: [x @ x for _ in range(20)], CPU)
    assert 0 < quick.sample() < slow.sample()


def test_peak_counts_what_is_held_at_once():
    def call():
        for _ in range(5):
            x = torch.empty(250)
            del x
        return torch.empty(125)

    assert peak_bytes(call, CPU) == 1000


def test_narrow_results_are_compared_by_their_norms():
    a, narrow = torch.randn(1000), torch.zeros(1, dtype=torch.bfloat16)
    assert_close(a, a * 1.02, [a, narrow])
    assert_close(a * 0, a * 0, [narrow])
    with pytest.raises(AssertionError, match="allowed"):
        assert_close(a, a * 1.1, [narrow])
    with pytest.raises(AssertionError, match="not close"):
        assert_close(a, a * 1.02, [a])


@pytest.mark.parametrize("kind", KINDS)
def test_patch_lengths(kind):
    lengths = patch_lengths(kind, 2, 4096)
    assert (lengths.sum(1) == 4096).all() and (lengths >= 0).all()
    mean = 2 * 4096 / int((lengths > 0).sum())
    expected = {"one patch": 4096, "single bytes": 1}.get(kind) or float(kind.split()[1])
    assert abs(mean / expected - 1) < 0.1


def test_text_is_the_same_every_time():
    assert torch.equal(text_entropies(5000), text_entropies(5000)) and text_entropies(5000).shape == (5000,)
    assert torch.equal(text_tokens(2, 100).flatten(), text_tokens(1, 200).flatten())
    assert text_entropies(300_000).min() >= 0


@pytest.mark.parametrize("op", OPS)
def test_variants_of_every_op_agree(op, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)  # the eager form is the same function
    monkeypatch.setattr(Setting, "sizes", lambda self: (256,))
    monkeypatch.setattr(hash_ngram_embedding, "CPU_SHAPES", ((64, 32, 1000), (128, 32, 1000)))
    torch.manual_seed(0)
    names = []
    for found in importlib.import_module(f"benchmarks.ops.{op}").cases(Setting(CPU, quick=True)):
        if found.check is not None:
            found.check()
        names.append(found.name)
        assert next(iter(found.variants)) == "ours" and len(found.variants) > 1 and found.bytes > 0
    expected = tables.CENTRE_NAMES.get(op, ("forward", "backward") if op != "segment_logits" else ("forward",))
    assert set(expected) <= set(names) and len(names) == len(set(names))


def test_results_are_written_whole_and_read_again(tmp_path):
    kept = document({"ours": 1.0, "copy": 1.0})
    path = write(kept, tmp_path)
    assert path == tmp_path / "some-cpu-2-cores" / "patch_pool.json" and read(path) == kept
    assert [file.name for file in path.parent.iterdir()] == ["patch_pool.json"]
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"patch_pool\.json: not a readable result"):
        read(path)
    path.write_text(json.dumps(kept | {"rows": [{"variant": "ours"}]}))
    with pytest.raises(ValueError, match=r"patch_pool\.json: row 0 has no environment, case"):
        read(path)
    path.write_text('{"op": "patch_pool"}')
    with pytest.raises(ValueError, match=r"patch_pool\.json: .* no device, dtype"):
        read(path)


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ({"ours": 1.3, "copy": 1.0}, "slower"),
        ({"ours": 0.7, "copy": 1.0}, "faster"),
        ({"ours": 1.05, "copy": 1.0}, "same"),
        ({"ours": 1.3, "copy": 1.3}, "same"),  # the whole machine is slower
        ({"ours": 0.85, "copy": 0.7}, "same"),  # faster, though less so than the copy
        ({"ours": 1.2, "copy": 1.4}, "same"),
    ],
)
def test_comparison(new, verdict, tmp_path):
    old = document({"ours": 1.0, "copy": 1.0})
    (row,) = compare(old, document(new))
    assert row["verdict"] == verdict and row["change"] == new["ours"] and row["machine"] == new["copy"]
    paths = write(old, tmp_path / "old"), write(document(new), tmp_path / "new")
    assert print_comparison(Console(quiet=True), *paths) == (verdict == "slower")


def test_wide_quartiles_are_no_regression():
    slower = document({"ours": 1.3, "copy": 1.0}, spread=0.3)
    (row,) = compare(document({"ours": 1.0, "copy": 1.0}, spread=0.3), slower)
    assert row["verdict"] == "same"


def test_comparison_is_of_one_op():
    with pytest.raises(ValueError, match="op: expected one, got 'patch_pool' and 'patch_gather'"):
        list(compare(document({"copy": 1.0}), document({"copy": 1.0}, op="patch_gather")))

    with pytest.raises(ValueError, match="cases that both have, got none"):
        list(compare(document({"copy": 1.0}), document({"copy": 1.0}, n=7)))


@pytest.mark.parametrize(
    ("ops", "options", "environment", "text"),
    [
        (["nonsense"], Options(), None, "got 'nonsense'"),
        ([], Options(), "mine", "--environment"),
        ([], Options(device="tpu"), None, "--device: expected cpu or cuda, got 'tpu'"),
        (["linear_entropy"], Options(quick=True, case="no such case"), "default", "--case: .*'no such case'"),
    ],
)
def test_wrong_options(ops, options, environment, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        run_suite(Console(quiet=True), ops, options, environment, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_section_of_a_device():
    pool = document({"ours": 0.001, "scatter_reduce": 0.02, "segment_reduce": 0.004, "copy": 0.0008})
    text = tables.kernel_table({"patch_pool": pool}).markdown()
    assert "| `patch_pool` | forward | 1 ms | 80% | segment_reduce | 4.0x |" in text
    assert "| `patch_gather` |  | not measured |" in text
    slower = tables.slower_table({"patch_pool": pool})
    assert "slower one in 0, and in 0" in slower.title and not slower.rows
    for row in (slow := copy.deepcopy(pool))["rows"]:
        if row["variant"] == "ours":
            row["seconds"] = 0.008
    line = "| `patch_pool` | forward | B 1, N 16384, D 1024, patches text 4.5 | segment_reduce | 0.50x | no |"
    assert line in tables.slower_table({"patch_pool": slow}).markdown()
    for row in slow["rows"]:
        if row["variant"] == "ours":
            row["quartiles"] = [0.0079, 0.0081]
    assert tables.slower_table({"patch_pool": slow}).rows[0][-1] == "yes"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_short_list_has_what_stands_for_an_op(op, device, monkeypatch):
    """On a GPU too: shapes are chosen there as here, and nothing is built."""
    shapes = []
    module = importlib.import_module(f"benchmarks.ops.{op}")
    for name in ("cases_of", "make_logits", "cases_for"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *args: shapes.append(args) or [])
    if op.endswith("cross_attention"):
        monkeypatch.setattr(cross_attention, "cases_of", lambda *args: shapes.append(args) or [])
        monkeypatch.setattr(module, "cases_for", cross_attention.cases_for)
    list(module.cases(Setting(torch.device(device), quick=True)))
    wanted = tables.centre({"op": op, "dtype": "bfloat16"} | ({"cuda": "13.0"} if device == "cuda" else {}))
    sizes = [arg for args in shapes for arg in args if isinstance(arg, int)]
    sizes += [arg.shape[1] for args in shapes for arg in args if isinstance(arg, torch.Tensor)]
    assert wanted.get("N", wanted.get("rows")) in sizes


def test_growth_is_that_of_the_largest_sizes():
    rows = [row for n in (1024, 4096, 16384) for row in document({"ours": n**2, "copy": n, "other": n}, n=n)["rows"]]
    curves = tables.growth({**document({"copy": 1.0}), "rows": rows}, "measuring")["forward"]
    assert [n for n, _ in curves["ours"]] == [1024, 4096, 16384]
    assert tables.exponent(curves["ours"]) == pytest.approx(2) and tables.exponent(curves["other"]) == pytest.approx(1)


def test_a_plot_carries_its_data(tmp_path):
    point = {"training_flops": 1e9, "seconds": 2.0, "valid_bits_per_byte": 3.0}
    job = {"kind": "main", "size": "small", "smoke": True, "model": {"name": "token"}, "flops": {"inclusive": 1e6}}
    kernels = {"patch_pool": document({"ours": 1.0, "other": 2.0, "copy": 1.0})}
    shown = plots.plots(kernels, {"cpu": [job | {"curve": [point]}]})
    assert set(shown) == {"speedup", "roofline", "quality_cpu_small"}
    for name, data in shown.items():
        path = tmp_path / f"{name}.png"
        assert plots.drawn_digest(path) is None
        plots.draw(name, data, path)
        assert plots.drawn_digest(path) == plots.digest(data)


def test_readme_and_plots_show_the_committed_results():
    assert pages.stale() == []


def test_a_bound_process_measures_the_same_machine():
    options = Options(quick=True, rounds=1, case="forward rows=4096")
    documents = [measure("linear_entropy", options, [environment]) for environment in ("measuring", "default")]
    assert documents[0]["device"] == documents[1]["device"] == describe_machine(CPU)["device"]


def test_slug():
    assert device_slug("AMD EPYC, 2 cores") == "amd-epyc-2-cores"


def test_steps_of_the_gpu_report():
    step = gpu.run([sys.executable, "-c", "print('== 3 passed, 1 skipped in 2 s')"], 60)
    assert step["status"] == "ok" and step["tests"] == {"passed": 3, "skipped": 1}
    step = gpu.run([sys.executable, "-c", "import sys; print('why'); sys.exit(9)"], 60)
    assert step["status"] == "exit 9" and step["output"] == "why\n"
    step = gpu.run([sys.executable, "-c", "import time; print('begun'); time.sleep(60)"], 2)
    assert step["status"] == "stopped after 2 s" and step["output"] == "begun\n"
    assert gpu.run(["no-such-program"], 1)["status"] == "not run"
    step = gpu.run([sys.executable, "-c", "print('== 7 skipped in 1 s')"], 60)
    assert step["status"] == "nothing was tested"


def test_a_step_that_is_stopped_leaves_nothing_running(tmp_path):
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert gpu.run([sys.executable, "-c", parent], 1)["status"] == "stopped after 1 s"
    time.sleep(4)
    assert not (tmp_path / "alive").exists()


def test_steps_of_the_gpu_report_are_all_benchmarks():
    assert {f"bench {op}" for op in OPS} < set(gpu.steps(Path("out")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_report_needs_a_gpu():
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "gpu-report: not run: torch sees no GPU here\n"
