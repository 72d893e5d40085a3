"""The JSON that a job leaves behind: one file for each job, one schema for all.

    format          1
    job, kind, scale, smoke    which job; `smoke`: too short for its quality to mean anything
    finished        false while the job runs: what is there so far
    machine         what it ran on, versions and commit, as benchmarks/harness.py writes it
    data            name, fingerprint of the training text, valid_bytes
    size, seed      FLOP class; of weights and order of the documents
    model           name: "token", "blt-...", "entropy-model"; config: of the model; parameters: all, and of them
                    `table_parameters` in n-gram tables; unit_bytes: mean bytes of a token or patch;
                    patcher: how patches were made (null for others); context: tokens, and for a BLT patches, of a row
    flops           per byte of text: paper, inclusive (inference), training (inclusive, entropy model's forward pass
                    included), target (the token model's inclusive count), components (of inclusive)
    training        rate, table_rate, steps, batch_bytes
    diverged        true of a tuning run whose loss was not finite; its curve is empty
    curve           of a training run, a list of: step, bytes, seconds (of training, loader included),
                    training_flops, train_bits_per_byte (of that step), valid_bits_per_byte
    test            by name ("clean", a noise, "language <name>"): bits_per_byte, bytes
    measured        of kind "throughput": train_bytes_per_second, prefill_bytes_per_second, peak_memory_bytes and, on a
                    GPU, the same under "compiled" (see throughput.measure); preparation_bytes_per_second, at which
                    documents become tokens or patches; used_tokens and used_slots, shares of a row that hold something.
                    Of kind "backends": see throughput.compare_backends

Keys that mean nothing for a kind are left out. Bits per byte divide by the UTF-8 bytes of the text, noised text
included; EOS is predicted and not counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT = 1
REQUIRED = ("format", "job", "kind", "scale", "smoke", "finished", "machine", "data", "model")


def read(path: Path) -> dict[str, Any] | None:
    """The result of a job; None where there is none yet.

    Raises:
        ValueError: the file is damaged or of another format; the message names it.
    """
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged: not JSON ({error}); delete it to run the job again") from error
    if not isinstance(result, dict) or any(key not in result for key in REQUIRED):
        raise ValueError(f"{path}: damaged: not the result of a job; delete it to run the job again")
    if result["format"] != FORMAT or result["job"] != path.stem:
        got = f"format {result['format']} of job {result['job']!r}"
        raise ValueError(f"{path}: expected format {FORMAT} of job {path.stem!r}, got {got}")
    return result
