"""`python -m benchmarks generation`: seconds a byte of cached generation, beside loops that run the whole model again.

Each row of the table is a model, a number of rows that are generated together and the length of their prompts:

cached        `GenerationState`, fed with text, so that patches close as in text
uncached      one pass over the prompt, which is what a loop without a cache does for every byte
transformers  the same pass of Hugging Face's BltForCausalLM on the same weights, where transformers is installed

Models have random weights and a threshold that gives patches of 4.5 bytes; --model takes a trained one. "width 8" is
the tiny model with heads of width 8: its step takes as long as its operations take to start, in Python and in torch, so
that its share of the tiny model's step is overhead. All loops must agree on the logits before they are timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from blt_kernels import calibrate_threshold
from blt_kernels.checkpoints import load_any, save_pretrained
from blt_kernels.data import DocumentStream, encode
from blt_kernels.generation import GenerationState
from blt_kernels.model import BLT, BLTConfig, EntropyModel, EntropyModelConfig, TransformerConfig
from blt_kernels.training.patcher import Patcher, PatcherConfig
from blt_kernels.training.runs import standard_library

from .machine import describe_machine, device_slug
from .report.table import Table
from .store import write_json
from .timing import format_seconds

PATCH_SIZE = 4.5


def _narrow(shape: TransformerConfig) -> TransformerConfig:
    return dataclasses.replace(shape, dim=8 * shape.num_heads, ffn_dim=8)


def _shapes() -> dict[str, tuple[BLTConfig, EntropyModelConfig]]:
    tiny, entropy = BLTConfig.preset("tiny"), EntropyModelConfig.preset("tiny")
    local = _narrow(tiny.encoder)
    narrow = dataclasses.replace(
        tiny, encoder=local, decoder=local, latent=_narrow(tiny.latent), hash_rows=31, hash_dim=8
    )
    middle = TransformerConfig(256, 2, 4, 704, window=256)
    return {
        "tiny": (tiny, entropy),
        "width 8": (narrow, dataclasses.replace(entropy, transformer=_narrow(entropy.transformer))),
        "20M": (
            BLTConfig(middle, TransformerConfig(512, 5, 8, 1408), middle, hash_rows=4099),
            EntropyModelConfig(dataclasses.replace(middle, rope_theta=10000.0)),
        ),
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks generation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a trained BLT in place of those with random weights")
    parser.add_argument("--shapes", nargs="+", default=list(_shapes()), choices=list(_shapes()))
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 1024, 2048, 8192], help="bytes of a prompt")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows that are generated together")
    parser.add_argument("--bytes", type=int, default=64, help="bytes of each row in a round (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="in turn with the other loops (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where the JSON file goes")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    length = max(options.prompts) + options.rounds * options.bytes + 100 * max(options.rows)
    text = _text(length)
    result: dict[str, Any] = describe_machine(device) | {"bytes": options.bytes, "rows": []}
    for name, model, patcher in _models(options, text):
        for rows in options.rows:
            for prompt in options.prompts:
                case = {"model": name, "parameters": _parameters(model, patcher), "rows": rows, "prompt": prompt}
                result["rows"].append(case | _measure(model, patcher, text, rows, prompt, options))
                _table(result["rows"][-1:]).show()
    path = options.out / device_slug(result["device"]) / "generation.json"
    write_json(path, result)
    _table(result["rows"]).show()
    print(path)


def _models(options: argparse.Namespace, text: bytes) -> Iterator[tuple[str, BLT, Patcher]]:
    if options.model is not None:
        model, patcher = load_any(options.model, dtype=torch.float32)
        if not isinstance(model, BLT) or patcher is None:
            raise ValueError(f"{options.model}: expected a BLT with a patcher")
        yield str(options.model), model, patcher
        return
    for name in options.shapes:
        shape, entropy_shape = _shapes()[name]
        torch.manual_seed(0)
        entropy_model, model = EntropyModel(entropy_shape), BLT(shape).eval()
        tokens = torch.from_numpy(encode(text[:8192], eos=False))[None]
        threshold = calibrate_threshold(entropy_model.entropies(tokens), PATCH_SIZE)
        yield name, model, Patcher(PatcherConfig(threshold=threshold), entropy_model)


def _measure(
    model: BLT, patcher: Patcher, text: bytes, rows: int, prompt: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Median seconds of each loop for one byte of all rows, with quartiles; and the closed patches a step."""
    texts = [text[100 * row :] for row in range(rows)]
    state = GenerationState(model, patcher, [part[:prompt] for part in texts])
    given = torch.stack([torch.from_numpy(encode(part[:prompt], eos=False)) for part in texts])
    new = [encode(part[prompt : prompt + options.rounds * options.bytes], bos=False, eos=False) for part in texts]
    coming = torch.stack([torch.from_numpy(row) for row in new])
    before, place = sum(state.num_patches), 0

    def cached() -> float:
        nonlocal place
        begin = time.perf_counter()
        for i in range(place, place + options.bytes):
            state.decode(*state.encode(coming[:, i]))
        place += options.bytes
        return (time.perf_counter() - begin) / options.bytes

    passes: dict[str, Callable[[], torch.Tensor]] = {}
    passes["uncached"] = lambda: model(given, patcher.layout(given).trim())
    if rows == 1 and importlib.util.find_spec("transformers") is not None:
        passes["transformers"] = _transformers_pass(model, patcher, given)
    with torch.inference_mode():
        for name, call in passes.items():
            _check_equal(name, call()[:, -1], state.logits)
    loops = {"cached": cached} | {name: _timed(call) for name, call in passes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    with torch.inference_mode():
        for _ in range(options.rounds):
            for name, loop in loops.items():
                seconds[name].append(loop())
    figures: dict[str, Any] = {
        name: {"seconds": statistics.median(values), "quartiles": _quartiles(values)}
        for name, values in seconds.items()
    }
    return figures | {"patches_per_step": (sum(state.num_patches) - before) / (options.rounds * options.bytes)}


def _check_equal(name: str, logits: torch.Tensor, ours: torch.Tensor) -> None:
    apart = float((logits - ours).abs().max() / logits.abs().max())
    if apart > 1e-4:
        raise ValueError(f"benchmarks generation: expected the logits of {name}, got {apart:.1e} of their size off")


def _timed(call: Callable[[], Any]) -> Callable[[], float]:
    def timed() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return timed


def _transformers_pass(model: BLT, patcher: Patcher, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    from transformers import BltForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Path(folder) / "model", model, patcher)
        other = BltForCausalLM.from_pretrained(Path(folder) / "model").eval()
    return lambda: other(input_ids=tokens, use_cache=False).logits


def _quartiles(values: list[float]) -> list[float]:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [first, third]


def _parameters(model: BLT, patcher: Patcher) -> int:
    """Of both models, those of the hash tables left out."""
    tables = model.encoder_hash_tok_embedding
    count = sum(p.numel() for p in model.parameters()) - (0 if tables is None else tables.weight.numel())
    return count + sum(weight.numel() for weight in patcher.weights().values())


def _table(results: list[dict[str, Any]]) -> Table:
    lines = []
    for row in results:
        cached = row["cached"]["seconds"]
        cells = [row["model"], f"{row['parameters'] / 1e6:.1f} M", str(row["rows"]), str(row["prompt"])]
        cells += [format_seconds(cached), f"{row['rows'] / cached:,.0f}", f"{row['patches_per_step']:.2f}"]
        for name in ("uncached", "transformers"):
            seconds = row[name]["seconds"] if name in row else None
            cells.append("" if seconds is None else f"{format_seconds(seconds)} ({seconds / cached:.0f}x)")
        lines.append(tuple(cells))
    columns = ("model", "parameters", "rows", "prompt", "cached", "bytes/s", "patches a step", "uncached")
    return Table("Seconds for one byte of every row", (*columns, "transformers"), lines)


def _text(length: int) -> bytes:
    """The beginning of the standard library's source."""
    text = bytearray()
    for document in DocumentStream(standard_library(), shuffle=False, epochs=1):
        text += document
        if len(text) >= length:
            return bytes(text)
    raise ValueError(f"benchmarks generation: expected {length:,} bytes of text, got {len(text):,}")
