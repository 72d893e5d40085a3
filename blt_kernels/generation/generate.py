"""`generate` and `stream`: text from prompts."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .._checks import check_int, fail_value
from ..model import BLT
from ..tokens import BOE_ID, BYTE_OFFSET, EOS_ID
from ..training.patcher import Patcher
from .sampling import Sampler, SamplingConfig, check_stop, generators
from .state import GenerationState, check_prompts


def generate(
    model: BLT,
    patcher: Patcher,
    prompts: Sequence[bytes],
    *,
    max_new_bytes: int,
    temperature: float = 0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[bytes] = (),
    seed: int | Sequence[int] | None = None,
    exact_entropies: bool = False,
    batch_size: int | None = None,
) -> list[bytes]:
    """Continues each prompt, byte by byte.

    A row ends with the token EOS, with one of `stop`, or when it has `max_new_bytes`. It depends neither on the other
    prompts nor on their number, up to rounding: where two logits, or an entropy and the threshold, are closer than
    their rounding (about 1e-6 of their size in fp32), the other one may win.

    Args:
        model: a BLT, on any device.
        patcher: the one that it was trained with.
        prompts: text that is continued; b"" begins a document.
        max_new_bytes: the longest continuation, 0 or more.
        temperature: 0 takes the likeliest byte; above 0 bytes are drawn. See SamplingConfig for the order of all steps.
        top_k, top_p, min_p, repetition_penalty: see SamplingConfig; None leaves them out.
        stop: byte strings. A row ends when one of them is complete, and its result ends with it. Prompts do not count.
        seed: of the random numbers: one number, or one for each prompt. With one number every prompt draws numbers of
            its own, the first prompt those of the list [seed]. None: other numbers at every call.
        exact_entropies: see GenerationState.
        batch_size: so many rows run at once, and the next prompt takes the place of a row that has ended. None: all.

    Returns:
        What follows each prompt, without the prompt and without EOS.

    Raises:
        TypeError, ValueError: wrong argument.
    """
    check_prompts("generate", prompts)
    results = [bytearray() for _ in prompts]
    config = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    rows = _rows(
        model, patcher, prompts, config, max_new_bytes=max_new_bytes, stop=stop, seed=seed,
        exact_entropies=exact_entropies, batch_size=batch_size,
    )  # fmt: skip
    for number, byte in rows:
        results[number].append(byte)
    return [bytes(result) for result in results]


def stream(model: BLT, patcher: Patcher, prompt: bytes, **options: Any) -> Iterator[str]:
    """What `generate` gives for one prompt, as text while it comes.

    A character is held back until all of its bytes are there; bytes that are no UTF-8 become U+FFFD.

    Args:
        prompt: text that is continued.
        options: those of `generate`.

    Returns:
        An iterator of pieces of text, none of them empty.

    Raises:
        TypeError, ValueError: wrong argument, when the first piece is asked for.
    """
    return as_text(stream_bytes(model, patcher, prompt, **options))


def stream_bytes(model: BLT, patcher: Patcher, prompt: bytes, **options: Any) -> Iterator[bytes]:
    """As `stream`, but each byte when it is there, whether it is text or not."""
    check_prompts("stream", [prompt])
    sampling = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    config = SamplingConfig(**{name: options.pop(name) for name in sampling if name in options})
    for _, byte in _rows(model, patcher, [prompt], config, **options):
        yield bytes((byte,))


def as_text(pieces: Iterable[bytes]) -> Iterator[str]:
    """Pieces of UTF-8 as text: what is no whole character yet is held back, and what is none becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


@torch.inference_mode()
def _rows(
    model: BLT,
    patcher: Patcher,
    prompts: Sequence[bytes],
    config: SamplingConfig,
    *,
    max_new_bytes: int,
    stop: Sequence[bytes] = (),
    seed: int | Sequence[int] | None = None,
    exact_entropies: bool = False,
    batch_size: int | None = None,
) -> Iterator[tuple[int, int]]:
    """(number of the prompt, byte), byte by byte, the rows of a batch in turn."""
    check_int("generate", "max_new_bytes", max_new_bytes, 0)
    if batch_size is not None:
        check_int("generate", "batch_size", batch_size, 1)
    ends = check_stop(stop)
    draws = generators(seed, len(prompts))
    if max_new_bytes == 0 or not prompts:
        return
    waiting = deque(range(len(prompts)))
    running = [waiting.popleft() for _ in range(min(len(prompts), batch_size or len(prompts)))]
    state = GenerationState(model, patcher, [prompts[number] for number in running], exact_entropies=exact_entropies)
    sampler = Sampler(config, model.config.vocab_size, len(running), state.device)
    for row, number in enumerate(running):
        sampler.begin(row, prompts[number], draws[number])
    written = {number: bytearray() for number in running}
    while running:
        # On a GPU nothing waits before `encode` has put everything up to the question which patches close on its way.
        tokens, entropies = state.encode(sampler.choose(state.logits))
        ended = []
        for row, (number, token) in enumerate(zip(running, tokens.tolist(), strict=True)):
            if token == BOE_ID:
                raise fail_value("generate", "model", "finite logits", f"NaN for prompt {number}")
            text = written[number]
            if token != EOS_ID:
                text.append(token - BYTE_OFFSET)
                yield number, token - BYTE_OFFSET
            if token == EOS_ID or len(text) == max_new_bytes or text.endswith(ends):
                ended.append(row)
        if len(ended) < len(running):
            state.decode(tokens, entropies)
        fresh = [(row, waiting.popleft()) for row in ended[: len(waiting)]]
        for row, number in fresh:
            running[row], written[number] = number, bytearray()
            sampler.begin(row, prompts[number], draws[number])
        state.admit([row for row, _ in fresh], [prompts[number] for _, number in fresh])
        if gone := ended[len(fresh) :]:
            kept = [row for row in range(len(running)) if row not in gone]
            running = [running[row] for row in kept]
            state.keep(kept)
            sampler.keep(kept)
