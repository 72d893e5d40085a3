"""`python -m benchmarks`: its commands, their errors, and the tables that they print."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as door
from benchmarks.machine import REPOSITORY
from benchmarks.report.table import Table


def failing(error: BaseException):
    def main(arguments: list[str]) -> None:
        raise error

    return lambda name: SimpleNamespace(main=main)


@pytest.mark.parametrize("command", sorted(door.COMMANDS))
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        door.main([command, "--help"])
    assert stop.value.code == 0 and f"python -m benchmarks {command}" in capsys.readouterr().out


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    door.main([])
    out = capsys.readouterr().out
    assert all(f"\n{command} " in out for command in door.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ops", "nonsense"), "benchmarks ops: ops: op: expected one of segment_logits"),
        (("ops", "--compare", "a.json", "b.json"), "benchmarks ops: a.json: not a readable result"),
        (("report", "--results", "nowhere"), "benchmarks report: nowhere: expected a folder of results, got none"),
        (("matched", "--data", "nowhere", "--out", "runs/none"), "benchmarks matched: "),
    ],
)
def test_what_is_wrong_outside_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        door.main(list(arguments))
    assert isinstance(stop.value.code, str)  # which Python prints on stderr, with exit status 1
    assert stop.value.code.startswith(message) and "\n" not in stop.value.code


@pytest.mark.parametrize("minutes", ["1", "nan"])
def test_too_few_minutes_are_refused(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        door.main(["matched", "--max-minutes", minutes, "--only", "no job"])
    assert stop.value.code == 2 and "--max-minutes: expected at least" in capsys.readouterr().err


def test_the_door_is_a_module() -> None:
    command = [sys.executable, "-m", "benchmarks", "nonsense"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    commands = "ops, matched, rows, tables, overhead, entropy_models, generation, report, gpu"
    assert done.stderr == f"benchmarks: expected one of {commands}, got 'nonsense'\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\n  two"), "benchmarks ops: one two"),
        (KeyError("seconds"), "benchmarks ops: KeyError: 'seconds' (BLT_KERNELS_DEBUG=1 shows the traceback)"),
        (ValueError(), "benchmarks ops: ValueError (BLT_KERNELS_DEBUG=1 shows the traceback)"),
        (
            ModuleNotFoundError("No module named 'rich'", name="rich"),
            "benchmarks ops: rich is not installed: pip install '.[bench]' in the checkout",
        ),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_of_any_kind(error: BaseException, line: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door.importlib, "import_module", failing(error))
    with pytest.raises(SystemExit) as stop:
        door.main(["ops"])
    assert stop.value.code == line


def test_a_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door.importlib, "import_module", failing(KeyError("x")))
    monkeypatch.setenv("BLT_KERNELS_DEBUG", "1")
    with pytest.raises(KeyError):
        door.main(["ops"])


def test_ops_are_measured_without_the_packages_that_show_them() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('rich', 'typer', 'matplotlib', 'tokenizers')))\n"
        "from benchmarks.__main__ import main\n"
        "import benchmarks.ops.worker\n"
        "from benchmarks.report.table import Table\n"
        "Table('title', ('a', 'b'), [('1', '2')]).show()\n"
        "main(['ops', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("title\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")


def test_a_table_takes_nothing_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Table("[bold]title", ("[/a]",), [("[/INST]",)]).show()
    out = capsys.readouterr().out
    assert "[bold]title" in out and "[/a]" in out and "[/INST]" in out
