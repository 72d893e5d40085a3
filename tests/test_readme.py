"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)
OPS = (
    "segment", "segment_logits", "segment_spaces", "segment_fixed", "calibrate_threshold", "entropy", "linear_entropy",
    "patch_pool", "patch_gather", "encoder_cross_attention", "decoder_cross_attention", "hash_ngram_embedding",
)  # fmt: skip


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.splitlines()[1][:60])
def test_example_runs(code: str) -> None:
    assert len(code.strip().splitlines()) <= 12, "an example is about ten lines"
    exec(compile(code, "README.md", "exec"), {})


def test_every_op_has_an_example() -> None:
    assert [op for op in OPS if not re.search(rf"\b{op}\(", "".join(EXAMPLES))] == []
