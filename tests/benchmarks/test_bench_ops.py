"""The benchmarks of the ops: what is measured, kept and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_results import kernel_result

from benchmarks import timing
from benchmarks.machine import describe_machine, device_slug
from benchmarks.ops import OPS, cross_attention, hash_ngram_embedding, rowwise_adagrad_update
from benchmarks.ops.cases import Case, Setting, assert_close, in_report
from benchmarks.ops.measure import Options, measure, run
from benchmarks.ops.patches import KINDS, patch_lengths, text_entropies, text_tokens
from benchmarks.ops.suite import print_comparison, run_suite, tables
from benchmarks.store import compare, read, refuse_to_lose, write
from benchmarks.timing import Measured, peak_bytes

CPU = torch.device("cpu")


def case(**changes) -> Case:
    x = torch.randn(1000)
    variants = {"ours": lambda: x + 1, "other": lambda: (x + 1) + 0}
    return dataclasses.replace(Case("forward", {"N": 1000}, variants, 8000), **changes)


def test_rows_of_a_case():
    (rows,) = run([case(headline="top", sweep=1000)], CPU, rounds=3)
    assert [row["variant"] for row in rows] == ["ours", "other", "copy"]
    by_variant = {row["variant"]: row for row in rows}
    for row in rows:
        low, high = row["quartiles"]
        assert 0 < low <= row["seconds"] <= high
        assert row["fraction_of_copy"] == by_variant["copy"]["seconds"] / row["seconds"]
        assert row["headline"] == "top" and row["sweep"] == 1000
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
        list(run([case(variants={"ours": lambda: calls.append(1)}, check=wrong)], CPU, rounds=1))
    assert not calls


def test_cases_are_chosen_by_their_label():
    (rows,) = run([case(), case(shapes={"N": 7})], CPU, 1, "N=7")
    assert {row["shapes"]["N"] for row in rows} == {7}


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
@pytest.mark.parametrize("tiny", [False, True], ids=["fp32", "tiny"])
def test_variants_of_every_op_agree(op, tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)  # the eager form is the same function
    monkeypatch.setattr(Setting, "sizes", lambda self: (256,))
    monkeypatch.setattr(Setting, "headline_bytes", 256)
    shape = (1000, 32, 1000)
    for sized in (hash_ngram_embedding, rowwise_adagrad_update):
        monkeypatch.setattr(sized, "HEADLINE_SHAPE", {"cpu": shape, "tiny": shape})
    torch.manual_seed(0)
    names, headlines = [], {}
    module = importlib.import_module(f"benchmarks.ops.{op}")
    for found in module.cases(Setting(CPU, quick=True, tiny=tiny)):
        if found.check is not None:
            found.check()
        names.append(found.name)
        assert found.sweep is not None
        if found.headline is not None:
            headlines[found.name] = found.headline
        assert next(iter(found.variants)) == "ours" and len(found.variants) > 1 and found.bytes > 0
    assert headlines == module.HEADLINES and len(names) == len(set(names))


def named(*args) -> Iterator[Case]:
    """Stands for `cases_of`, and builds nothing."""
    for name in ("forward", "backward", "forward with base", "forward and backward, sparse gradient", "update"):
        yield Case(name, {}, {}, 0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_each_headline_case_is_measured_once(op, device, quick, monkeypatch):
    """The choice for a GPU is tested too, because nothing is built."""
    module = importlib.import_module(f"benchmarks.ops.{op}")
    for place in (module, cross_attention):
        monkeypatch.setattr(place, "cases_of", named, raising=False)
        monkeypatch.setattr(place, "entropy_cases", lambda *args: [], raising=False)
    found = list(module.cases(Setting(torch.device(device), quick)))
    marked = [(case.name, case.headline) for case in found if case.headline is not None]
    assert sorted(marked) == sorted(module.HEADLINES.items())
    sizes = {case.sweep for case in found} - {None}
    assert len(sizes) > 1 or quick
    assert {case.sweep for case in found if case.headline is not None} <= sizes


def test_a_headline_that_no_case_has_is_an_error():
    with pytest.raises(ValueError, match="no case is named 'foward'"):
        list(in_report([case()], 1000, {"foward": "top"}))
    (marked,) = in_report([case()], 1000, {"forward": "top"})
    assert marked.headline == "top" and marked.sweep == 1000


def test_results_are_written_whole_and_read_again(tmp_path):
    kept = kernel_result({"ours": 1.0, "copy": 1.0})
    path = write(kept, tmp_path)
    assert path == tmp_path / "some-cpu-2-cores" / "patch_pool.json" and read(path) == kept
    assert [file.name for file in path.parent.iterdir()] == ["patch_pool.json"]
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"patch_pool\.json: not a readable result"):
        read(path)
    path.write_text(json.dumps(kept | {"rows": [{"variant": "ours"}]}))
    with pytest.raises(ValueError, match=r"patch_pool\.json: row 0: it has no environment, case"):
        read(path)
    path.write_text('{"op": "patch_pool"}')
    with pytest.raises(ValueError, match=r"patch_pool\.json: .* no device, dtype"):
        read(path)


@pytest.mark.parametrize(
    ("fields", "row", "message"),
    [
        ({"rows": None}, {}, "rows: expected list, got None"),
        ({"rows": [3]}, {}, "row 0: expected an object, got int"),
        ({"device": None}, {}, "device: expected str, got None"),
        ({}, {"seconds": 0.0}, "row 0: expected a time and two quartiles above 0"),
        ({}, {"seconds": float("nan")}, "row 0: expected a time and two quartiles above 0"),
        ({}, {"quartiles": 1}, "row 0: quartiles: expected list, got 1"),
        ({}, {"quartiles": [1.0]}, "row 0: expected a time and two quartiles above 0"),
        ({}, {"variant": "copied"}, "no row of the variant copy for measuring forward"),
    ],
)
def test_a_damaged_result_is_named(fields: dict, row: dict, message: str, tmp_path: Path) -> None:
    result = kernel_result({"copy": 1.0, "ours": 1.0})
    result["rows"][0] |= row
    path = tmp_path / "patch_pool.json"
    path.write_text(json.dumps(result | fields))
    with pytest.raises(ValueError, match=rf"patch_pool\.json: .*{message}"):
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
    old = kernel_result({"ours": 1.0, "copy": 1.0})
    (row,) = compare(old, kernel_result(new))
    assert row["verdict"] == verdict and row["change"] == new["ours"] and row["machine"] == new["copy"]
    paths = write(old, tmp_path / "old"), write(kernel_result(new), tmp_path / "new")
    assert print_comparison(*paths) == (verdict == "slower")


def test_wide_quartiles_are_no_regression():
    slower = kernel_result({"ours": 1.3, "copy": 1.0}, spread=0.3)
    (row,) = compare(kernel_result({"ours": 1.0, "copy": 1.0}, spread=0.3), slower)
    assert row["verdict"] == "same"


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"quick": True}, "cases that are not in the short list"),
        ({"case": "N=7"}, "cases other than 'N=7'"),
        ({"rounds": 3}, "15 rounds of each case instead of 3"),
        ({"tiny": True}, "sizes that a time can be measured at"),
        ({"environments": ("default",)}, "the measuring environment"),
    ],
)
def test_a_fuller_result_is_not_replaced(changes, lost, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.ops.suite.device_name", lambda device: "Some CPU, 2 cores")
    path = write(kernel_result({"ours": 1.0, "copy": 1.0}), tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"patch_pool.json: .*{lost}.*choose another --out, or delete"):
        run_suite(["patch_pool"], dataclasses.replace(Options(), **changes), tmp_path)
    assert path.read_bytes() == before


def test_a_result_is_replaced_by_one_that_is_as_full(tmp_path):
    refuse_to_lose(tmp_path / "none.json", Options(quick=True, case="x", rounds=1))
    refuse_to_lose(write(kernel_result({"ours": 1.0, "copy": 1.0}), tmp_path), Options(rounds=20))
    short = kernel_result({"ours": 1.0, "copy": 1.0}) | {"quick": True, "case": "N=7"}
    path = write(short, tmp_path)
    refuse_to_lose(path, Options(quick=True, case="N=7"))
    refuse_to_lose(path, Options())


def test_a_table_for_each_case():
    (table,) = tables(kernel_result({"ours": 1.0, "other": 2.0, "copy": 0.5}))
    assert table.title == "forward B=1 N=16384 D=1024 patches=text 4.5 (measuring environment)"
    assert [row[0] for row in table.rows] == ["ours", "other", "copy"] and table.rows[1][5] == "2.00"


def test_comparison_is_of_one_op():
    with pytest.raises(ValueError, match="op: expected one, got 'patch_pool' and 'patch_gather'"):
        list(compare(kernel_result({"copy": 1.0}), kernel_result({"copy": 1.0}, op="patch_gather")))

    with pytest.raises(ValueError, match="cases that both have, got none"):
        list(compare(kernel_result({"copy": 1.0}), kernel_result({"copy": 1.0}, n=7)))


@pytest.mark.parametrize(
    ("ops", "options", "text"),
    [
        (["nonsense"], Options(), "got 'nonsense'"),
        ([], Options(rounds=0), "--rounds: expected at least 1, got 0"),
        ([], Options(tiny=True, device="cuda"), "--tiny: expected --device cpu, got cuda"),
    ],
)
def test_wrong_options(ops, options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        run_suite(ops, options, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_a_case_that_is_not_there(monkeypatch, tmp_path):
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: start(["true"], **options))
    with pytest.raises(ValueError, match="--case: expected part of the name of a case of patch_pool, got 'nonsense'"):
        run_suite(["patch_pool"], Options(case="nonsense"), tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_a_bound_process_measures_the_same_machine(tmp_path):
    options = Options(quick=True, rounds=1, case="forward rows=4096", environments=("measuring",))
    *_, result = measure("linear_entropy", options)
    assert result["device"] == describe_machine(CPU)["device"]
    assert {row["environment"] for row in result["rows"]} == {"measuring"}
    assert read(write(result, tmp_path)) == result


def test_an_op_that_is_cut_short_leaves_its_finished_cases(tmp_path, monkeypatch):
    """As they stand after each case, beside the whole result of an earlier run, which stays."""
    device = describe_machine(CPU)["device"]
    earlier = write(kernel_result({"ours": 1.0, "copy": 1.0}) | {"device": device}, tmp_path)
    before = earlier.read_bytes()
    answer = json.dumps(
        {"facts": kernel_result({"copy": 1.0}), "rows": kernel_result({"ours": 1.0, "copy": 1.0})["rows"]}
    )
    worker = f"print({answer!r}, flush=True); raise SystemExit(3)"
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", worker], **options)
    )
    with pytest.raises(RuntimeError, match="its benchmark failed in the measuring environment"):
        run_suite(["patch_pool"], Options(environments=("measuring", "default")), tmp_path)
    partial = earlier.with_name("patch_pool.partial.json")
    assert read(partial)["device"] == device and read(partial)["rows"][0]["variant"] == "ours"
    assert earlier.read_bytes() == before


def test_a_whole_result_leaves_no_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    options = Options(quick=True, tiny=True, rounds=1, case="forward rows=64", environments=("default",))
    (path,) = run_suite(["linear_entropy"], options, tmp_path)
    assert [file.name for file in path.parent.iterdir()] == ["linear_entropy.json"]
    assert read(path)["tiny"]


class FakeCUDA:
    """What `benchmarks.timing` asks of torch.cuda for a graph, and what torch's allocator makes of it."""

    def __init__(self, monkeypatch):
        self.mode, self.capturing, self.captures, self.broken = "default", False, 0, False
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.capturing = True
        self.captures += 1
        try:
            yield
        except RuntimeError:
            self.broken = True
            raise
        self.capturing = False

    def wait(self):
        """What .item() or a tensor made of Python numbers does."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")


def test_a_call_that_waits_for_the_device_is_never_captured(monkeypatch):
    """A capture that fails would leave torch's allocator in the middle of it."""
    cuda = FakeCUDA(monkeypatch)
    assert timing._capture(lambda: None) == ("replay", True) and cuda.captures == 1
    with pytest.warns(UserWarning, match="timed with its launches: called a synchronizing CUDA operation"):
        assert timing._capture(cuda.wait) == (cuda.wait, False)
    assert cuda.captures == 1 and cuda.mode == "default" and not cuda.broken


def test_a_capture_that_fails_all_the_same_ends_the_measurement(monkeypatch):
    cuda = FakeCUDA(monkeypatch)

    def call():
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        timing._capture(call)
    assert cuda.mode == "default"


def test_slug():
    assert device_slug("AMD EPYC, 2 cores") == "amd-epyc-2-cores"
