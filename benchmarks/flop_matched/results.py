"""The JSON that a job leaves behind: one file for each job, one schema for all.

    format          1
    job, kind, scale, smoke    which job; `smoke`: too short for its quality to mean anything
    finished        false while the job runs: what is there so far
    machine         what it ran on, versions and commit, see `machine.describe_machine`
    data            name, fingerprint of the training text, valid_bytes
    size, seed      FLOP class; of weights and order of the documents
    model           name: "token", "blt-...", or an entropy model; config: of the model; parameters: all, and of them
                    `table_parameters` in n-gram tables; unit_bytes: mean bytes of a token or patch;
                    patcher: how patches were made (null for others); context: tokens, and for a BLT patches, of a
                    row, and tokens of the longest sequence
    flops           per byte of text: paper, inclusive (inference), training (inclusive, entropy model's forward pass
                    included), target (the token model's inclusive count), components (of inclusive)
    training        rate, table_rate, steps, batch_bytes
    diverged        true of a tuning run whose loss was not finite; its curve is empty
    curve           of a training run, a list of: step, bytes, seconds (of training, loader included),
                    training_flops, train_bits_per_byte (of that step), valid_bits_per_byte
    test            by name ("clean", a noise, "language <name>"): bits_per_byte, bytes
    measured        of kind "throughput": train_bytes_per_second, prefill_bytes_per_second, peak_memory_bytes and, on a
                    GPU, the same under "compiled" (see speed.py); preparation_bytes_per_second, at which
                    documents become tokens or patches; used_tokens and used_slots, shares of a row that hold something.
                    Beside it, of a BLT, `twin`: flops and measured of the token model, in turn with the BLT.
                    Of kind "profile": under "blt" and "token" seconds of a training step, parts (seconds of a step by
                    what they are spent on, under the profiler), and flops_per_second of the parts that are products.
                    Of kind "backends", where the same run was made on fused and on reference ops: under "fused" and
                    "reference" losses in nats and seconds a step; largest_difference of the losses; time_ratio, the
                    median step of the reference ops over that of the fused ones

Keys that mean nothing for a kind are left out. Bits per byte divide by the UTF-8 bytes of the text, noised text
included; EOS is predicted and not counted.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blt_kernels.model import BLT, EntropyModel

from .jobs import Job, Scale
from .texts import Texts

if TYPE_CHECKING:
    from .contenders import Model

FORMAT = 1
FOLDER = "flop_matched"  # in that of a device; in it a folder for each scale
REQUIRED = ("format", "job", "kind", "scale", "smoke", "finished", "machine", "data", "size", "model", "flops")
# By kind, what a finished result has besides.
FINISHED = {
    "entropy": ("training", "curve"),
    "tune": ("training", "curve"),
    "main": ("training", "curve", "test"),
    "ablation": ("training", "curve", "test"),
    "throughput": ("measured",),
    "profile": ("measured",),
    "backends": ("measured",),
}
# What these objects of a finished result have at least.
PARTS = {
    "machine": ("device",),
    "model": ("name",),
    "flops": ("paper", "inclusive", "training"),
    "test": ("clean",),
}


def begin(
    job: Job,
    scale: Scale,
    machine: dict[str, Any],
    texts: Texts,
    built: BLT | EntropyModel,
    model: Model,
    target: float | None,
) -> dict[str, Any]:
    """The result of a job, as far as it is known before the job runs.

    Args:
        built: the model itself, whose parameters are counted.
        target: inclusive FLOPs per byte of the token model.
    """
    tables = built.hash_tok_embedding if isinstance(built, EntropyModel) else built.encoder_hash_tok_embedding
    inclusive = model.flops["inclusive"]
    return {
        "format": FORMAT,
        "job": job.name,
        "kind": job.kind,
        "scale": scale.name,
        "smoke": scale.smoke,
        "finished": False,
        "machine": machine,
        "data": {
            "name": texts.name,
            "fingerprint": texts.fingerprint,
            "valid_bytes": sum(map(len, texts.valid)),
        },
        "size": job.size,
        "seed": job.seed,
        "model": {
            "name": job.model,
            "config": model.config.to_dict(),
            "cross_attention": model.cross_attention,
            "parameters": sum(parameter.numel() for parameter in built.parameters()),
            "table_parameters": 0 if tables is None else tables.weight.numel(),
            "unit_bytes": model.unit_bytes,
            "context": dataclasses.asdict(model.shape),
            "patcher": None if model.patcher is None else dataclasses.asdict(model.patcher.config),
        },
        "flops": {
            "paper": model.flops["paper"].forward,
            "inclusive": inclusive.forward,
            "training": inclusive.training,
            "target": target,
            "components": inclusive.components,
        },
    }


def final_bits(result: dict[str, Any]) -> float:
    """Bits per byte of the validation text at the end of a training run; infinity where it diverged."""
    return math.inf if result.get("diverged") else result["curve"][-1]["valid_bits_per_byte"]


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
    if result["finished"] and (missing := [key for key in FINISHED.get(result["kind"], ()) if key not in result]):
        raise ValueError(f"{path}: damaged: it has no {', '.join(missing)}; delete it to run the job again")
    for key, names in PARTS.items() if result["finished"] else ():
        if key in result and not (isinstance(result[key], dict) and all(name in result[key] for name in names)):
            raise ValueError(
                f"{path}: damaged: {key}: expected an object with {', '.join(names)}; delete it to run the job again"
            )
    if result["finished"] and "curve" in result and not (result["curve"] or result.get("diverged")):
        raise ValueError(f"{path}: damaged: its curve is empty; delete it to run the job again")
    if result["format"] != FORMAT or result["job"] != path.stem:
        got = f"format {result['format']} of job {result['job']!r}"
        raise ValueError(f"{path}: expected format {FORMAT} of job {path.stem!r}, got {got}")
    return result
