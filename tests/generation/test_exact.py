"""Cached generation against its definition, which runs the whole model again for every byte."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from blt_kernels import PatchLayout
from blt_kernels.data import encode
from blt_kernels.generation import GenerationState, generate
from blt_kernels.generation.reference import generate_uncached
from blt_kernels.model import BLT, EntropyModel, TransformerConfig
from blt_kernels.training.patcher import Patcher

RULES = (
    "threshold",
    "threshold, at most 5",
    "monotonic",
    "combined",
    "spaces",
    "spaces, at most 3",
    "fixed",
    "threshold, reset at newlines",
    "threshold of a model of n-grams",
)
TOLERANCE = 1e-5  # of the largest logit
SPACE, UNUSED = 32 + 4, 0 + 4  # tokens: the commonest byte of the text, and one that is not in it


def full_pass(blt: BLT, patcher: Patcher, tokens: torch.Tensor) -> tuple[torch.Tensor, PatchLayout]:
    """Logits [N, V] of tokens [N] and their layout, from one pass over all of them."""
    with torch.no_grad():
        layout = patcher.layout(tokens[None]).trim()
        return blt(tokens[None], layout)[0], layout


def forced(
    state: GenerationState, rows: Sequence[torch.Tensor], begins: Sequence[int], steps: int
) -> Iterator[list[int]]:
    """Feeds each row its own tokens, from position `begins` on; yields the positions that the rows have reached."""
    for i in range(steps):
        yield [begin + i for begin in begins]
        state.step(torch.stack([tokens[begin + i + 1] for tokens, begin in zip(rows, begins, strict=True)]))


@pytest.mark.parametrize("rule", RULES)
def test_logits_and_patches_are_those_of_a_full_pass(
    blt: BLT, patchers: dict[str, Patcher], text: bytes, rule: str
) -> None:
    """Rows of four texts, with prompts of no byte, within the window, and beyond it."""
    patcher = patchers[rule]
    rows = [torch.from_numpy(encode(text[begin : begin + 200], eos=False)) for begin in (0, 1000, 2000, 3001)]
    begins = (0, 1, 20, 77)
    state = GenerationState(blt, patcher, [text[1000 * i + i // 3 :][:begin] for i, begin in enumerate(begins)])
    full = [full_pass(blt, patcher, row) for row in rows]
    for positions in forced(state, rows, begins, 110):
        for row, position in enumerate(positions):
            logits, layout = full[row]
            assert state.num_patches[row] == int(layout.visible_ids[0, position]) + 1
            apart = (state.logits[row] - logits[position]).abs().max()
            assert apart <= TOLERANCE * logits.abs().max(), (row, position)


@pytest.mark.parametrize("rule", RULES)
def test_greedy_text_is_that_of_the_definition(blt: BLT, patchers: dict[str, Patcher], text: bytes, rule: str) -> None:
    prompts = [b"", text[:3], text[500:540], text[900:970], b"\xff\x00\n", "名 é".encode()]
    expected = generate_uncached(blt, patchers[rule], prompts, max_new_bytes=12)
    assert generate(blt, patchers[rule], prompts, max_new_bytes=12) == expected
    for size in (1, 4):  # other neighbours, other padding, and rows that take the place of others
        assert generate(blt, patchers[rule], prompts, max_new_bytes=12, batch_size=size) == expected


def test_rows_take_the_place_of_finished_ones_in_the_middle(blt: BLT, patcher: Patcher, text: bytes) -> None:
    """A row is admitted, moved and continued among others that go on, and none of them notices."""
    tokens = [torch.from_numpy(encode(text[begin : begin + 120], eos=False)) for begin in (0, 300, 700)]
    state = GenerationState(blt, patcher, [text[:10], text[300:390]])
    for _ in forced(state, tokens[:2], (10, 90), 15):
        pass
    state.admit([0], [text[700:740]])
    for _ in forced(state, [tokens[2], tokens[1]], (40, 105), 5):
        pass
    state.keep([1, 0])
    for _ in forced(state, [tokens[1], tokens[2]], (110, 45), 5):
        pass
    state.keep([1])
    for positions in forced(state, [tokens[2]], (50,), 30):
        logits, layout = full_pass(blt, patcher, tokens[2])
        assert state.num_patches == [int(layout.visible_ids[0, positions[0]]) + 1]
        assert (state.logits[0] - logits[positions[0]]).abs().max() <= TOLERANCE * logits.abs().max()


def test_layers_without_a_window(patcher: Patcher, blt: BLT, text: bytes) -> None:
    """Local layers that see everything: their caches grow, and rows of other lengths come and go."""
    unbounded = dataclasses.replace(blt.config.encoder, window=None)
    model = BLT(dataclasses.replace(blt.config, encoder=unbounded, decoder=unbounded))
    model.load_state_dict(blt.state_dict())
    assert patcher.entropy_model is not None
    entropy_config = patcher.entropy_model.config
    entropy_model = EntropyModel(
        dataclasses.replace(entropy_config, transformer=dataclasses.replace(entropy_config.transformer, window=None))
    )
    entropy_model.load_state_dict(patcher.entropy_model.state_dict())
    unbounded_patcher = Patcher(patcher.config, entropy_model)
    with pytest.raises(ValueError, match="exact_entropies: expected False for an entropy model without a window"):
        GenerationState(model, unbounded_patcher, [b"a"], exact_entropies=True)
    tokens = [torch.from_numpy(encode(text[begin : begin + 400], eos=False)) for begin in (0, 500, 1000)]
    full = [full_pass(model, unbounded_patcher, row) for row in tokens]
    state = GenerationState(model, unbounded_patcher, [text[:5], text[500:560]], max_patches=1)
    for _ in forced(state, tokens[:2], (5, 60), 90):
        pass
    state.admit([0], [text[1000:1300]])
    for positions in forced(state, [tokens[2], tokens[1]], (300, 150), 90):
        for row, source in ((0, 2), (1, 1)):
            logits, layout = full[source]
            assert state.num_patches[row] == int(layout.visible_ids[0, positions[row]]) + 1
            assert (state.logits[row] - logits[positions[row]]).abs().max() <= TOLERANCE * logits.abs().max()


@pytest.mark.parametrize("threads", [1, 2])
def test_exact_entropies_have_the_bits_of_a_full_pass(blt: BLT, patcher: Patcher, text: bytes, threads: int) -> None:
    assert patcher.entropy_model is not None
    tokens = [torch.from_numpy(encode(text[begin : begin + 220], eos=False)) for begin in (0, 1000, 2000)]
    begins = (0, 13, 130)  # before the window is full, and after
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        full = [patcher.entropy_model.entropies(row[None])[0].numpy() for row in tokens]
        prompts = [text[1000 * i : 1000 * i + begin] for i, begin in enumerate(begins)]
        state = GenerationState(blt, patcher, prompts, exact_entropies=True)
        for i in range(40):
            step = torch.stack([row[begin + i + 1] for row, begin in zip(tokens, begins, strict=True)])
            read, entropies = state.encode(step)
            expected = np.array([row[begin + i + 1] for row, begin in zip(full, begins, strict=True)])
            assert (entropies == expected).all(), i
            state.decode(read, entropies)
    finally:
        torch.set_num_threads(before)


def test_exact_entropies_do_not_depend_on_neighbours(blt: BLT, patcher: Patcher, text: bytes) -> None:
    row = torch.from_numpy(encode(text[:60], eos=False))
    states = [
        GenerationState(blt, patcher, [text[:30], *others], exact_entropies=True)
        for others in ([], [b"x"], [text[400 * i : 400 * i + 50 + i] for i in range(9)])
    ]
    for token in row[31:]:
        known = [state.encode(token.repeat(state.num_rows)) for state in states]
        assert len({entropies[0] for _, entropies in known}) == 1
        for state, read in zip(states, known, strict=True):
            state.decode(*read)


def test_a_threshold_between_the_two_entropies_of_a_byte(blt: BLT, patcher: Patcher, text: bytes) -> None:
    """In natural text no entropy is as near to the threshold as its rounding. Here one is: the patches differ there,
    and with exact entropies they do not."""
    assert patcher.entropy_model is not None
    tokens = torch.from_numpy(encode(text[:200], eos=False))
    full = patcher.entropy_model.entropies(tokens[None])[0].numpy()
    state = GenerationState(blt, patcher, [b""])
    stepped = np.concatenate([state.encode(token[None])[1] for token in tokens[1:]])
    different = np.flatnonzero(stepped != full[1:]) + 1
    place = next(int(i) for i in different if i > 60 and not np.isin(min(full[i], stepped[i - 1]), np.delete(full, i)))
    threshold = float(min(full[place], stepped[place - 1]))  # one of the two is above it, and the other is not
    near = Patcher(dataclasses.replace(patcher.config, threshold=threshold), patcher.entropy_model)
    _, layout = full_pass(blt, near, tokens)

    def patches(exact: bool) -> list[int]:
        state = GenerationState(blt, near, [b""], exact_entropies=exact)
        counts = []
        for token in tokens[1:]:
            state.step(token[None])
            counts += state.num_patches
        return counts

    expected = (layout.visible_ids[0, 1:] + 1).tolist()
    assert patches(exact=True) == expected
    difference = 1 if stepped[place - 1] > full[place] else -1
    assert [a - b for a, b in zip(patches(exact=False), expected, strict=True)] == [
        0 if i + 1 < place else difference for i in range(len(tokens) - 1)
    ]


def test_the_two_likeliest_logits_within_their_rounding(blt: BLT, patcher: Patcher, text: bytes) -> None:
    """The likeliest byte flips where, and only where, another one is as likely up to rounding."""
    model = copy.deepcopy(blt)
    with torch.no_grad():
        head = model.lm_head.weight
        head[UNUSED] = head[SPACE] + 3e-8 * torch.randn_like(head[SPACE])
    tokens = torch.from_numpy(encode(text[:620], eos=False))
    logits, _ = full_pass(model, patcher, tokens)
    state = GenerationState(model, patcher, [b""])
    flips = 0
    for (position,) in forced(state, [tokens], (0,), 600):
        full, step = logits[position], state.logits[0]
        if int(full.argmax()) != int(step.argmax()):
            assert {int(full.argmax()), int(step.argmax())} == {SPACE, UNUSED}
            assert abs(full[SPACE] - full[UNUSED]) <= TOLERANCE * full.abs().max()
            flips += 1
    assert flips > 0


def test_other_shapes(blt: BLT, patcher: Patcher, text: bytes) -> None:
    """Parts of unequal depth, heads and windows; heads that share keys; more slots."""
    config = dataclasses.replace(
        blt.config,
        encoder=TransformerConfig(24, 1, 3, 40, window=7),
        decoder=TransformerConfig(24, 3, 6, 40, window=30, num_kv_heads=2),
        latent=TransformerConfig(72, 1, 4, 40, num_kv_heads=1),
        slots_per_patch=3,
        ngram_sizes=(),
        hash_dim=None,
    )
    torch.manual_seed(1)
    model = BLT(config)
    tokens = torch.from_numpy(encode(text[:150], eos=False))
    logits, _ = full_pass(model, patcher, tokens)
    state = GenerationState(model, patcher, [text[:40]])
    for (position,) in forced(state, [tokens], (40,), 100):
        assert (state.logits[0] - logits[position]).abs().max() <= TOLERANCE * logits.abs().max()


def test_prompts_that_end_in_a_newline(blt: BLT, patchers: dict[str, Patcher], text: bytes) -> None:
    """A context that restarts at newlines has nothing to remember after one; other rows of the batch go on."""
    patcher = patchers["threshold, reset at newlines"]
    for prompts in ([b"\n"], [text[:60] + b"\n", b"x = 1\ny", b"\n\n"]):
        expected = generate_uncached(blt, patcher, prompts, max_new_bytes=8)
        assert generate(blt, patcher, prompts, max_new_bytes=8) == expected
    with pytest.raises(ValueError, match="GenerationState: exact_entropies: expected False for a patcher that resets"):
        GenerationState(blt, patcher, [b""], exact_entropies=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-7), (torch.bfloat16, 5e-2)])
def test_other_dtypes(
    blt: BLT, patchers: dict[str, Patcher], text: bytes, dtype: torch.dtype, tolerance: float
) -> None:
    """Layers are not fused then. In double precision only the rounding of the logits to float32 is left."""
    patcher = patchers["spaces"]  # the same patches in every dtype
    model = copy.deepcopy(blt).to(dtype)
    tokens = [torch.from_numpy(encode(text[begin : begin + 130], eos=False)) for begin in (0, 900)]
    full = [full_pass(model, patcher, row) for row in tokens]
    state = GenerationState(model, patcher, [text[:3], text[900:950]])
    for positions in forced(state, tokens, (3, 50), 70):
        for row, position in enumerate(positions):
            logits, layout = full[row]
            assert state.num_patches[row] == int(layout.visible_ids[0, position]) + 1
            assert (state.logits[row] - logits[position]).abs().max() <= tolerance * logits.abs().max()
