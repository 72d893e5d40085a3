"""Tables, plots and pages from results."""

from __future__ import annotations

import copy
import importlib

import pytest
from kernel_results import kernel_result

from benchmarks import table_optimizers
from benchmarks.ops import OPS
from benchmarks.report import pages, plots, predictions, tables
from benchmarks.store import read, write, write_json


def test_section_of_a_device():
    pool = kernel_result({"ours": 0.001, "scatter_reduce": 0.02, "segment_reduce": 0.004, "copy": 0.0008})
    text = tables.kernel_table({"patch_pool": pool}).markdown()
    assert "| `patch_pool` | forward | 1 ms | 80% | torch.segment_reduce | 4.0x |" in text
    assert "| `patch_gather` |  | not measured |" in text
    slower = tables.slower_table({"patch_pool": pool})
    assert "slower than the best baseline in 0, and in 0" in slower.title and not slower.rows
    for row in (slow := copy.deepcopy(pool))["rows"]:
        if row["variant"] == "ours":
            row["seconds"] = 0.008
    line = "| `patch_pool` | forward | B 1, N 16384, D 1024, patches text 4.5 | torch.segment_reduce | 0.50x | no |"
    assert line in tables.slower_table({"patch_pool": slow}).markdown()
    for row in slow["rows"]:
        if row["variant"] == "ours":
            row["quartiles"] = [0.0079, 0.0081]
    assert tables.slower_table({"patch_pool": slow}).rows[0][-1] == "yes"


def test_growth_is_that_of_the_largest_sizes():
    rows = [
        row for n in (1024, 4096, 16384) for row in kernel_result({"ours": n**2, "copy": n, "other": n}, n=n)["rows"]
    ]
    curves = tables.growth({**kernel_result({"copy": 1.0}), "rows": rows}, "measuring")["forward"]
    assert [n for n, _ in curves["ours"]] == [1024, 4096, 16384]
    assert tables.exponent(curves["ours"]) == pytest.approx(2) and tables.exponent(curves["other"]) == pytest.approx(1)


def test_a_plot_carries_its_data(tmp_path):
    point = {"training_flops": 1e9, "seconds": 2.0, "valid_bits_per_byte": 3.0}
    job = {"kind": "main", "size": "small", "smoke": True, "model": {"name": "token"}, "flops": {"inclusive": 1e6}}
    kernels = {"patch_pool": kernel_result({"ours": 1.0, "other": 2.0, "copy": 1.0})}
    shown = plots.plots(kernels, {"cpu": [job | {"curve": [point]}]})
    assert set(shown) == {"speedup", "roofline", "quality_cpu_small"}
    for name, data in shown.items():
        path = tmp_path / f"{name}.png"
        assert plots.drawn_digest(path) is None
        plots.draw(name, data, path)
        assert plots.drawn_digest(path) == plots.digest(data)


def test_readme_and_plots_show_the_committed_results():
    assert pages.stale() == []


def without(key: str) -> dict:
    """A result whose case the report would not know how to show."""
    made = kernel_result({"ours": 1.0, "other": 2.0, "copy": 0.5})
    return made | {"rows": [row | {key: None} for row in made["rows"]]}


def test_an_op_without_a_headline_case_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="patch_pool: its result has no headline case in the measuring environment"):
        tables.kernel_table({"patch_pool": without("headline")})
    with pytest.raises(ValueError, match="patch_pool: its result has no case of the sweep over sizes"):
        tables.growth_table({"patch_pool": without("sweep")})
    with pytest.raises(ValueError, match="expected one of 'results', 'readme', 'top', got 'nowhere'"):
        tables.kernel_table({"patch_pool": kernel_result({"ours": 1.0, "copy": 0.5}, headline="nowhere")})
    write(without("headline"), tmp_path)
    with pytest.raises(ValueError, match="no headline case"):
        pages.main(["--results", str(tmp_path)])


def test_a_case_is_shown_where_it_says_and_in_all_places_before():
    def shown(headline: str) -> list[str]:
        results = {"patch_pool": kernel_result({"ours": 1.0, "other": 2.0, "copy": 0.5}, headline=headline)}
        return [place for place in tables.PLACES if list(tables.shown_in(results, place))]

    assert [shown(place) for place in tables.PLACES] == [["results"], ["results", "readme"], list(tables.PLACES)]


@pytest.mark.parametrize("op", OPS)
def test_committed_results_have_the_headline_cases_of_the_op(op):
    declared = importlib.import_module(f"benchmarks.ops.{op}").HEADLINES
    for path in pages.RESULTS.glob(f"*/{op}.json"):
        result = read(path)
        for environment in tables.environments(result):
            found = tables.headlines(result, environment)
            assert {name: rows["ours"]["headline"] for name, rows in found.items()} == declared


def test_readme_has_six_rows_a_loss_among_them_and_three_ratios_on_top():
    for _, kernels, _ in pages.devices(pages.RESULTS):
        rows = tables.short_table(kernels).rows
        assert len(rows) == 6 and any(float(speedup.removesuffix("x")) < 1 for _, _, speedup in rows)
        assert len(list(tables.shown_in(kernels, "top"))) == 3


def test_pages_call_every_measured_baseline_by_a_name_of_its_own():
    variants = {
        row["variant"]
        for _, kernels, _ in pages.devices(pages.RESULTS)
        for result in kernels.values()
        for row in result["rows"]
    } - set(tables.NOT_A_BASELINE)
    assert {variant.removesuffix(tables.COMPILED) for variant in variants} <= set(tables.BASELINES)
    assert len({tables.baseline_name(variant) for variant in variants}) == len(variants)
    assert tables.baseline_name("gather compiled") == "gather in PyTorch, torch.compile"


def test_the_page_compares_the_optimisers_of_tables(tmp_path):
    seconds = {"ours": 0.01, "reference": 0.2, "SparseAdam": 0.4, "copy": 0.008}
    kernel = kernel_result(seconds, op="rowwise_adagrad_update")
    for row in kernel["rows"]:
        row |= {"case": "update", "shapes": {"R": 600_000, "D": 512, "rows": 40_000}}
    path = write(kernel, tmp_path)
    assert "Optimisers of hash tables" not in pages.full(tmp_path, "plots")
    run = {"rate": 0.1, "seed": 0, "bits_per_byte": 2.0, "seconds": 1.0}
    runs = [run | {"optimizer": name} for name in ("rowwise_adagrad", "sparse_adam")]
    machine = {"device": "Some CPU, 2 cores", "torch": "2.13.0", "commit": "abc", "date": "2026-01-01"}
    result = {"settings": {"steps": 7}, "text": "a text", "machine": machine, "finished": True, "runs": runs}
    write_json(path.with_name(table_optimizers.FILE), result)
    page = pages.full(tmp_path, "plots")
    assert "| `rowwise_adagrad_update` | update | 10 ms | 80% | PyTorch definition | 20.0x |" in page
    assert "### Optimisers of hash tables" in page and "| sparse_adam |" in page
    assert "takes 10 ms by `rowwise_adagrad_update` and 400 ms by torch.optim.SparseAdam: 40 times as long." in page
    assert "The state is 2.4 MB in place of 2.46 GB." in page


def test_readme_needs_its_markers():
    with pytest.raises(ValueError, match="expected the markers <!-- headline: begin"):
        pages.between("no markers", "headline", "text")
    page = "a\n<!-- x: begin (python -m benchmarks report) -->old<!-- x: end -->\nb"
    assert "old" not in pages.between(page, "x", "new") and "new" in pages.between(page, "x", "new")


def costs(**others: float) -> dict:
    """What an op might cost that no limit holds back, but for `others`."""
    free = {"instructions": 0.01, "alu_cycles": 0.01, "special_cycles": 0.0, "shuffles": 0.0, "shared_wavefronts": 0.0}
    in_flight = others.pop("bytes_in_flight", 80000)
    small = {"accessed": 0.1, "bytes_in_flight": 10}
    return {"all": free | others, "kernels": {"join": small, "main": {"accessed": 1.0, "bytes_in_flight": in_flight}}}


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ({}, "up to 100%"),
        ({"instructions": 0.5}, "50%, issue"),  # 2.5 instructions a clock move 5 bytes, a copy 10
        ({"alu_cycles": 1.0}, "25%, ALU"),
        ({"special_cycles": 0.5}, "50%, special functions"),
        ({"shuffles": 0.1, "shared_wavefronts": 0.025}, "50%, exchange"),
        ({"bytes_in_flight": 30000}, "75%, latency"),
        ({"bytes_in_flight": 30000, "instructions": 0.5}, "50%, issue"),
    ],
)
def test_a_prediction_is_the_least_of_the_limits(found: dict[str, float], shown: str):
    assert predictions.predicted(costs(**found), bytes_a_clock=10) == shown


def test_what_a_gpu_achieved_is_beside_the_prediction():
    result = kernel_result({"ours": 1.0, "copy": 0.5}) | {"op": "patch_pool"}
    on_gpu = {"NVIDIA H100 patch_pool": result}
    assert predictions.achieved("patch_pool, max, bfloat16", on_gpu) == "NVIDIA H100, forward: 50%"
    assert predictions.achieved("patch_pool, max, backward, bfloat16", on_gpu) == "not measured"
    assert predictions.achieved("patch_gather, bfloat16", on_gpu) == "not measured"
    ops = [row[0] for row in predictions.table({}).rows]
    assert {"`entropy`, V = 260", "`decoder_cross_attention`, K = 4, backward"} <= set(ops)
    assert len(set(ops)) == len(ops)


def test_tables_of_other_results_are_printed_and_plots_lie_beside_them(tmp_path, capsys):
    write(kernel_result({"ours": 1.0, "other": 2.0, "copy": 0.5}), tmp_path)
    pages.main(["--results", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| `patch_pool` | forward | 1e+03 ms | 50% | other | 2.0x |" in out and "one size of N" in out
    assert (tmp_path / "some-cpu-2-cores" / "speedup.png").exists()


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected results in folders of devices, got none"):
        pages.main(["--results", str(tmp_path)])
