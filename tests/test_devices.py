"""The names of devices. There is no GPU where these tests must pass: torch's answers about GPUs are stand-ins."""

from __future__ import annotations

import pytest
import torch

from blt_kernels import _devices
from blt_kernels._devices import resolve_device

CPU = torch.device("cpu")
current: list[torch.device] = []  # what was made the current GPU


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    current.clear()


def gpus(monkeypatch: pytest.MonkeyPatch, *problems: str | None) -> None:
    """A machine with one GPU for each problem; None is a GPU on which the kernels run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(problems))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(problems))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(_devices, "cuda_problem", lambda device: problems[device.index])


def torchrun(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))


def test_without_a_gpu_only_the_cpu_serves(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    gpus(monkeypatch)
    assert resolve_device("auto") == resolve_device("cpu") == resolve_device(CPU) == CPU
    for name in ("cuda", "cuda:0", torch.device("cuda")):
        with pytest.raises(ValueError, match=r"device: expected cpu, because torch sees no GPU here, got cuda"):
            resolve_device(name)
    torchrun(monkeypatch, 1, 2)
    assert resolve_device("auto") == CPU
    assert not recwarn.list and not current


def test_a_gpu_whose_kernels_run_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, "no kernels for it", None, None)
    assert resolve_device("auto") == torch.device("cuda", 1)
    assert resolve_device("cuda") == torch.device("cuda", 0)  # it was asked for: the reference runs, with a warning
    assert resolve_device("cuda:2") == resolve_device(torch.device("cuda:2")) == torch.device("cuda", 2)
    with pytest.raises(ValueError, match=r"device: expected one of the 3 GPUs, cuda:0 to cuda:2, got cuda:3"):
        resolve_device("cuda:3")


def test_a_gpu_that_auto_passes_over_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, "too old", "too new")
    with pytest.warns(UserWarning, match=r"takes the CPU.*: cuda:0: too old; cuda:1: too new"):
        assert resolve_device("auto") == CPU


def test_a_rank_of_torchrun_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, None, None)
    torchrun(monkeypatch, 1, 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cpu") == CPU
    assert current == [torch.device("cuda", 1)] * 2
    with pytest.raises(ValueError, match=r"expected cuda, which gives each of the 2 processes .* got cuda:0"):
        resolve_device("cuda:0")
    torchrun(monkeypatch, 2, 3)
    with pytest.raises(ValueError, match=r"one of the 2 GPUs, .* got cuda in the process of local rank 2"):
        resolve_device("cuda")
    torchrun(monkeypatch, 0, 1)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)  # there is no other process that would want it


@pytest.mark.parametrize(
    ("problems", "why"), [((None, None), "3 processes have 2 GPUs"), ((None, "too old", None), "cuda:1: too old")]
)
def test_all_ranks_take_the_same_kind_of_device(
    problems: tuple[str | None, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, *problems)
    for rank in range(3):
        torchrun(monkeypatch, rank, 3)
        with pytest.warns(UserWarning, match=f"takes the CPU.*: {why}"):
            assert resolve_device("auto") == CPU


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "CUDA", "meta", "cuda:99999"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="device: expected one of auto, cpu, cuda or cuda:i, got"):
        resolve_device(name)


def test_what_is_no_name_is_refused() -> None:
    with pytest.raises(TypeError, match="device: expected one of auto, cpu, cuda or cuda:i, got 0"):
        resolve_device(0)  # type: ignore[arg-type]
