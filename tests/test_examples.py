"""Every program in examples/ runs as a user would run it, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

import blt_kernels

EXAMPLES = REPOSITORY / "examples"
# What each program must print.
PROMISES = {
    "compare_backends": r"segment_logits \(patches\) +equal, bit for bit.*2 threads are equal, bit for bit: True",
    "compile_without_recompiling": r"graphs compiled so far\n(?: +\d\.\d\d bytes +\S+ +\S+ +1\n){4}$",
    "count_flops": r"entropy model +0\.0 +219\.9.*1048576 FLOPs of encoder_cross_attention, by hand 1048576",
    "cross_attention": r"encoder: largest difference \d\.\de-0[5-9].*decoder: .*difference \d\.\de-0[5-9].*MB, linear",
    "drop_into_your_model": r"ByteModel +loss (\d\.\d{4})\d*\nFasterByteModel +loss \1",
    "entropy_without_logits": r"17\.0 MB by way of the logits, 0\.\d+ MB.*in the row: True.*4\.\d\d bytes a patch",
    "generate": r"loss \d.*a cache: True\nequal with two rows at once: True\n\d+ pieces: .*closed: \[\d+, \d+\]",
    "hash_ngrams": r"lookups: \d\.\de-0[5-9].*(\d+) rows of 300126.*RowwiseAdagrad changed \1 rows.*same step: True",
    "layouts": r"gives the same: True.*restores every used slot: True.*visible_ids: expected 0 in row 0, byte 1, got 1",
    "patch_a_sentence": r"segment_spaces: 10 patches.*<\|def \|next_\|.*give [345]\.\d\d bytes a patch",
    "pool_and_gather": r"patch_pool max : largest difference (0\.0e\+00|\d\.\de-0[5-9]).*patch_gather own",
    "train_blt": r"entropy model: loss .*threshold \d\.\d+ nats.*BLT: loss .*128 of 128 slots",
}


@pytest.mark.parametrize("name", PROMISES)
def test_example(name: str) -> None:
    # One thread: programs that share two cores with others otherwise spend their time in waiting for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(blt_kernels.__file__).parents[1])}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(PROMISES[name], done.stdout, flags=re.S), done.stdout
    for line in done.stdout.splitlines():  # losses fall
        if "in its first five steps" in line or line.startswith("loss, step by step"):
            losses = [float(number) for number in re.findall(r"\d+\.\d\d", line)]
            assert len(losses) >= 2 and losses == sorted(losses, reverse=True), line


def test_every_example_is_run_and_says_what_one_learns() -> None:
    programs = sorted(EXAMPLES.glob("*.py"))
    assert {path.stem for path in programs} == set(PROMISES)
    for path in programs:
        assert "\n\nYou learn: " in path.read_text().partition('"""\n\nimport')[0], path.name


def test_every_public_name_has_an_example() -> None:
    code = "".join(path.read_text() for path in EXAMPLES.glob("*.py"))
    constants = {"HASH_PRIMES", "__version__"}
    # `build_info` is what `blt-kernels doctor` prints; `keep_coalesced` is for tables made inside torch.compile.
    wanted = set(blt_kernels.__all__) - constants - {"build_info", "keep_coalesced"}
    methods = {f"PatchLayout.{name}" for name in ("from_lengths", "from_starts")}
    methods |= {f".{name}" for name in ("trim", "pack", "unpack", "validate", "lengths")}
    assert [name for name in sorted(wanted | methods) if not re.search(rf"{re.escape(name)}\b", code)] == []
