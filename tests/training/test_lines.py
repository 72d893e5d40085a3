"""Entropies whose context begins anew with each line, against a loop over the lines."""

from __future__ import annotations

import pytest
import torch

from blt_kernels import segment
from blt_kernels.data import encode
from blt_kernels.model import EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.training.lines import entropies_of, lines_of
from blt_kernels.training.patcher import Patcher, PatcherConfig

TEXTS = [
    "def f(x):\n    return x\n\n\nf(1)\r\n",
    "no end of a line",
    "\n",
    "",
    "\n\nlong " + 30 * "and longer " + "\nend",
]


def make_model(window: int | None = 8, **options: object) -> EntropyModel:
    torch.manual_seed(0)
    model = EntropyModel(EntropyModelConfig(TransformerConfig(16, 2, 2, 32, window=window), **options))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # entropies that differ from byte to byte
    return model.eval()


def row(text: str) -> torch.Tensor:
    return torch.from_numpy(encode(text))[None]


def by_lines(model: EntropyModel, text: str) -> torch.Tensor:
    """The definition: the entropies of each line, read by itself, one behind the other."""
    lines = text.splitlines(keepends=True) if "\r" not in text else [part + "\n" for part in text[:-1].split("\n")]
    tokens = [encode(line, bos=False, eos=False) for line in lines] or [encode("", bos=False, eos=False)]
    if tokens[-1].size and lines[-1].endswith("\n"):
        tokens.append(encode("", bos=False, eos=False))  # EOS stands after the last newline
    parts = [torch.from_numpy(line)[None] for line in tokens]
    parts[0] = torch.cat((torch.tensor([[1]]), parts[0]), 1)
    parts[-1] = torch.cat((parts[-1], torch.tensor([[2]])), 1)
    return torch.cat([model.entropies(part) for part in parts], 1)


@pytest.mark.parametrize("window", [None, 8, 1000])
@pytest.mark.parametrize("text", TEXTS)
def test_a_line_is_read_by_itself(text: str, window: int | None) -> None:
    model = make_model(window)
    got = entropies_of(model, row(text), reset_at_newline=True)
    torch.testing.assert_close(got, by_lines(model, text), rtol=1e-4, atol=1e-5)
    if text.count("\n") > 1:
        assert (got - entropies_of(model, row(text))).abs().max() > 0.05


def test_the_tables_of_an_entropy_model_stay_within_lines() -> None:
    model = make_model(ngram_sizes=(2, 3), hash_rows=31)
    torch.nn.init.normal_(model.hash_tok_embedding.weight)
    got = entropies_of(model, row(TEXTS[0]), reset_at_newline=True)
    torch.testing.assert_close(got, by_lines(model, TEXTS[0]), rtol=1e-4, atol=1e-5)


def test_the_newline_belongs_to_the_line_that_it_ends() -> None:
    model = make_model()
    tokens = row("ab\ncd")  # BOS a b newline c d EOS
    assert lines_of(tokens, torch.tensor([0, 7])).tolist() == [0, 4, 7]
    other = tokens.clone()
    other[0, 2] = 100
    changed = entropies_of(model, tokens, reset_at_newline=True) != entropies_of(model, other, reset_at_newline=True)
    assert changed.tolist() == [[False, False, True, True, False, False, False]]


def test_packed_rows_and_batches() -> None:
    """Sequences begin lines too, repeats at the end of cu_seqlens and a tail change nothing, and rows stay apart."""
    model = make_model()
    texts = TEXTS[:3]
    parts = [row(text) for text in texts]
    ends = torch.tensor([0, *(part.shape[1] for part in parts), 0, 0]).cumsum(0).int()
    packed = torch.cat((*parts, torch.full((1, 5), 14)), 1)  # the tail looks like newlines
    got = entropies_of(model, packed, cu_seqlens=ends, reset_at_newline=True)[:, : int(ends[-1])]
    expected = torch.cat([by_lines(model, text) for text in texts], 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    rows = torch.cat((row("a\nbc"), row("\nabc"), row("abc\n")))
    got = entropies_of(model, rows, reset_at_newline=True)
    expected = torch.cat([entropies_of(model, part[None], reset_at_newline=True) for part in rows])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert entropies_of(model, torch.zeros(2, 0, dtype=torch.int64), reset_at_newline=True).shape == (2, 0)


def test_a_patcher_cuts_by_these_entropies() -> None:
    model = make_model()
    config = PatcherConfig(rule="monotonic", threshold=0.1, reset_at_newline=True)
    entropies = by_lines(model, TEXTS[0])
    layout = segment(entropies, 0.1, rule="monotonic")
    lengths, seen = Patcher(config, model).cut(encode(TEXTS[0]))
    torch.testing.assert_close(torch.from_numpy(seen)[None], entropies, rtol=1e-4, atol=1e-5)
    assert lengths.tolist() == layout.lengths()[0, : int(layout.num_patches)].tolist()
    assert lengths.tolist() != Patcher(PatcherConfig(rule="monotonic", threshold=0.1), model)(encode(TEXTS[0])).tolist()


def test_it_is_part_of_what_a_checkpoint_holds() -> None:
    patcher = Patcher(PatcherConfig(threshold=1.0, reset_at_newline=True), make_model())
    state = patcher.state()
    assert Patcher.from_state(state, patcher.weights()).config.reset_at_newline
    del state["config"]["reset_at_newline"]  # from before there was one
    assert not Patcher.from_state(state, patcher.weights()).config.reset_at_newline
    with pytest.raises(ValueError, match="reset_at_newline: expected False for a method without an entropy model"):
        PatcherConfig("spaces", reset_at_newline=True)
    with pytest.raises(TypeError, match="reset_at_newline: expected a bool"):
        PatcherConfig(threshold=1.0, reset_at_newline=1)  # type: ignore[arg-type]
