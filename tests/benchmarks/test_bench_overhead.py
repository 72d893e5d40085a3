"""`python -m benchmarks overhead`: its calls are right, and what it writes is read, refused or shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import blt_kernels as bk
from benchmarks import overhead


def first_tensor(result: Any) -> torch.Tensor:
    if isinstance(result, bk.PatchLayout):
        return result.offsets
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("case", overhead.cases(), ids=lambda case: case.function)
def test_the_call_and_the_compiled_op_compute_the_same(case: overhead.Case) -> None:
    assert set(overhead.calls_of(case)) == {"call"} | ({"raw"} if case.raw else set()) | (
        {"both"} if case.both else set()
    )
    for call in overhead.calls_of(case).values():
        call()
    if case.raw is not None:
        torch.testing.assert_close(first_tensor(case.call(case.x)), first_tensor(case.raw()), rtol=0, atol=0)


def test_checks_are_counted() -> None:
    def two() -> None:
        bk._checks.check_bool("op", "a", True)
        bk._checks.check_ints("op", "b", [1], 0)  # it asks check_int

    assert overhead.count_checks(two) == 3
    assert overhead.count_checks(lambda: torch.ones(1)) == 0


def test_a_result_is_written_read_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["--rounds", "1", "--calls", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob(f"*/{overhead.FILE}")
    result = overhead.read(path)
    assert "patch_pool" in capsys.readouterr().out
    assert len(overhead.table(result).rows) == len(list(overhead.cases()))
    assert "| `patch_pool`" in "\n".join(overhead.section(result))
    del result["rows"][0]["call"]["least"]
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=rf"{overhead.FILE}: not a result of `benchmarks overhead`: .*least"):
        overhead.read(path)


@pytest.mark.parametrize("call, both, verdict", [(15, 80, "yes and yes"), (15.1, 79, "no and yes"), (9, None, "yes")])
def test_verdicts(call: float, both: float | None, verdict: str) -> None:
    def row(**microseconds: float | None) -> dict[str, Any]:
        times = {kind: {"least": us * 1e-6, "median": us * 1e-6} for kind, us in microseconds.items() if us is not None}
        return {"function": "f", "checks": 3, **times}

    result = {"device": "d", "torch": "t", "rounds": 1, "calls": 1, "rows": [row(raw=1.0, call=call, both=both)]}
    assert overhead.table(result).rows[0][-1] == verdict
    result["rows"] = [row(call=call)]  # a function of torch has no goals
    assert overhead.table(result).rows[0][-1] == ""


@pytest.mark.parametrize("option", ["--rounds", "--calls"])
def test_nothing_to_measure_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"overhead: {option}: expected at least 1, got 0"):
        overhead.main([option, "0"])
