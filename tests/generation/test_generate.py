"""`generate` and `stream`: ends, streams, seeds, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from blt_kernels.generation import GenerationState, generate, stream
from blt_kernels.generation import generate as generate_
from blt_kernels.generation.reference import generate_uncached
from blt_kernels.model import BLT
from blt_kernels.training.patcher import Patcher

EOS = 2


class Script:
    """A model that wants to write given bytes, whatever comes: GenerationState's logits are replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, continuations: dict[bytes, list[int]]):
        admit, decode, keep = GenerationState.admit, GenerationState.decode, GenerationState.keep
        self.admitted: list[list[bytes]] = []

        def show(state: GenerationState) -> None:
            state.logits = torch.zeros_like(state.logits)
            for row, (prompt, done) in enumerate(state.script):
                state.logits[row, [0, 1, 3]] = 9.0  # what must never be chosen
                state.logits[row, (continuations[prompt] + [EOS] * 99)[done]] = 5.0

        def scripted_admit(state: GenerationState, rows: Any, prompts: Any) -> None:
            admit(state, rows, prompts)
            self.admitted.append(list(prompts))
            state.__dict__.setdefault("script", [None] * state.num_rows)
            for row, prompt in zip(rows, prompts, strict=True):
                state.script[row] = (prompt, 0)
            show(state)

        def scripted_decode(state: GenerationState, *known: Any) -> torch.Tensor:
            decode(state, *known)
            state.script = [(prompt, done + 1) for prompt, done in state.script]
            show(state)
            return state.logits

        def scripted_keep(state: GenerationState, rows: Any) -> None:
            keep(state, rows)
            state.script = [state.script[row] for row in rows]

        monkeypatch.setattr(GenerationState, "admit", scripted_admit)
        monkeypatch.setattr(GenerationState, "decode", scripted_decode)
        monkeypatch.setattr(GenerationState, "keep", scripted_keep)


def tokens(text: str) -> list[int]:
    return [byte + 4 for byte in text.encode()]


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_rows_end(blt: BLT, patcher: Patcher, monkeypatch: pytest.MonkeyPatch, batch_size: int | None) -> None:
    """With EOS at once and later, at a stop string that the prompt has begun, and at the longest length."""
    script = Script(
        monkeypatch,
        {b"one": [], b"two": [*tokens("abc"), EOS], b"x stop a": tokens("bab, stop there"), b"long": tokens("x" * 90)},
    )
    prompts = [b"one", b"two", b"x stop a", b"long", b"two"]
    results = generate(blt, patcher, prompts, max_new_bytes=20, stop=[b"ab", b"zz", b"stop"], batch_size=batch_size)
    assert results == [b"", b"ab", b"bab", b"x" * 20, b"ab"]
    assert [prompt for prompts in script.admitted for prompt in prompts if prompt] == prompts
    assert len(script.admitted[0]) == (batch_size or len(prompts))


def test_nothing_to_do(blt: BLT, patcher: Patcher) -> None:
    assert generate(blt, patcher, [], max_new_bytes=5) == []
    assert generate(blt, patcher, [b"a", b""], max_new_bytes=0) == [b"", b""]
    assert list(stream(blt, patcher, b"a", max_new_bytes=0)) == []


def test_streams_hold_back_what_is_no_character_yet(
    blt: BLT, patcher: Patcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "é名\N{GRINNING FACE}!"
    Script(monkeypatch, {b"": tokens(text), b"bad": [0xFF + 4, *tokens("a"), 0xE5 + 4, 0x90 + 4, EOS]})
    assert list(stream(blt, patcher, b"", max_new_bytes=50)) == list(text)
    assert list(stream(blt, patcher, b"", max_new_bytes=4)) == ["é", "\N{REPLACEMENT CHARACTER}"], "cut in a character"
    assert "".join(stream(blt, patcher, b"bad", max_new_bytes=50)) == "\ufffda\ufffd"


def test_a_stream_is_what_generate_gives(blt: BLT, patcher: Patcher) -> None:
    options: dict[str, Any] = {"max_new_bytes": 40, "temperature": 0.8, "top_p": 0.9, "seed": 3, "stop": [b"\n\n\n"]}
    pieces = stream(blt, patcher, b"import ", **options)
    assert isinstance(pieces, Iterator)
    (whole,) = generate(blt, patcher, [b"import "], **options)
    assert "".join(pieces) == whole.decode(errors="replace")


def test_sampled_rows_do_not_depend_on_their_neighbours(blt: BLT, patcher: Patcher, text: bytes) -> None:
    prompts = [text[100 * i : 100 * i + 3 + 9 * i] for i in range(5)]
    options: dict[str, Any] = {"max_new_bytes": 25, "temperature": 1.0, "min_p": 0.01, "repetition_penalty": 1.1}
    together = generate(blt, patcher, prompts, seed=[5, 6, 7, 8, 9], **options)
    assert together == generate(blt, patcher, prompts, seed=[5, 6, 7, 8, 9], batch_size=2, **options)
    alone = [generate(blt, patcher, [prompt], seed=[5 + i], **options)[0] for i, prompt in enumerate(prompts)]
    assert together == alone
    assert len(set(generate(blt, patcher, [b"a"] * 3, seed=1, **options))) == 3


def test_waits_for_the_device_once_a_byte(blt: BLT, patcher: Patcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the reads of `encode` nothing looks at values: counted on the CPU, where looking does not wait."""
    looks = []
    for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "nonzero", "__index__"):
        original = getattr(torch.Tensor, name)

        def look(self: torch.Tensor, *args: Any, _name: str = name, _original: Any = original) -> Any:
            looks.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, look)
    steps = 0
    encode = GenerationState.encode

    def counted(state: GenerationState, chosen: torch.Tensor) -> Any:
        nonlocal steps
        if steps == 0:
            looks.clear()  # of the prompt
        steps += 1
        return encode(state, chosen)

    monkeypatch.setattr(GenerationState, "encode", counted)
    generate(blt, patcher, [b"ab", b"def f"], max_new_bytes=30)
    assert steps == 30 and looks == ["numpy"] * 30


def test_parameters_stay_as_they_are(blt: BLT, patcher: Patcher) -> None:
    before = copy.deepcopy(blt.state_dict())
    generate(blt, patcher, [b"a"], max_new_bytes=3)
    assert all(torch.equal(before[name], value) for name, value in blt.state_dict().items())
    assert all(parameter.requires_grad for parameter in blt.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": b"abc"}, "generate: prompts: expected a sequence of bytes objects, got bytes"),
        ({"prompts": ["abc"]}, "generate: prompts: expected bytes objects, got str"),
        ({"max_new_bytes": -1}, "generate: max_new_bytes: expected at least 0, got -1"),
        ({"stop": b"x"}, "generate: stop: expected a sequence of bytes objects, got bytes"),
        ({"stop": [b""]}, "generate: stop: expected strings of at least one byte, got an empty one"),
        ({"seed": [1, 2]}, "generate: seed: expected one number, or one for each of 1 prompts, got 2"),
        ({"seed": -1}, "generate: seed: expected at least 0, got -1"),
        ({"batch_size": 0}, "generate: batch_size: expected at least 1, got 0"),
        ({"model": None}, "GenerationState: model: expected a BLT, got NoneType"),
        ({"patcher": 4.5}, "GenerationState: patcher: expected a Patcher, got float"),
    ],
)
def test_wrong_arguments_are_refused(blt: BLT, patcher: Patcher, change: dict[str, Any], message: str) -> None:
    arguments = {"model": blt, "patcher": patcher, "prompts": [b"a"], "max_new_bytes": 3} | change
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        generate_(**arguments)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_without_finite_logits_is_named(blt: BLT, patcher: Patcher, temperature: float) -> None:
    broken = copy.deepcopy(blt)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="generate: model: expected finite logits, got NaN for prompt 0"):
        generate(broken, patcher, [b"a"], max_new_bytes=3, temperature=temperature)


def test_vocabularies_of_other_sizes(blt: BLT, patcher: Patcher) -> None:
    """What comes after the last byte is never chosen; a vocabulary that lacks bytes is refused."""
    larger = BLT(dataclasses.replace(blt.config, vocab_size=300))
    with torch.no_grad():
        larger.lm_head.weight[260:] *= 100
    for temperature in (0, 1.0):
        assert len(generate(larger, patcher, [b"a"], max_new_bytes=9, temperature=temperature, seed=1)[0]) <= 9
    (cached,) = generate(larger, patcher, [b"a"], max_new_bytes=9)
    assert generate_uncached(larger, patcher, [b"a"], max_new_bytes=9) == [cached]
    smaller = BLT(dataclasses.replace(blt.config, vocab_size=200))
    with pytest.raises(ValueError, match=r"GenerationState: vocab_size of BLT: expected at least 260 tokens.*got 200"):
        GenerationState(smaller, patcher, [b"a"])


def test_wrong_steps_are_refused(blt: BLT, patcher: Patcher) -> None:
    state = GenerationState(blt, patcher, [b"a", b"b"])
    with pytest.raises(ValueError, match=r"GenerationState.step: tokens: expected shape \(2\)"):
        state.step(torch.tensor([5]))
    with pytest.raises(ValueError, match=r"GenerationState.step: tokens: expected values in 0 .. 259, got 260"):
        state.step(torch.tensor([5, 260]))
    with pytest.raises(ValueError, match=r"GenerationState.admit: rows: expected 2 different rows"):
        state.admit([1, 1], [b"a", b"b"])
    with pytest.raises(ValueError, match=r"GenerationState.admit: rows: expected 0 .. 1, got 2"):
        state.admit([2], [b"a"])
