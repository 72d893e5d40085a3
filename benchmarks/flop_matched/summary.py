"""Tables of results, and what they may be read as."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console

from ..report.table import Table
from .models import TOKEN
from .results import final_bits

SMOKE = "smoke test: too short to say which model is better"

Results = list[dict[str, Any]]


def summary(console: Console, rows: Results) -> None:
    """Prints what the results in `rows` (JSON of finished jobs, any order) allow."""
    if not rows:
        console.print("no finished jobs yet")
        return
    smoke = any(row["smoke"] for row in rows)
    if smoke:
        console.print(SMOKE, style="bold")
    console.print(where(rows), markup=False)
    for table in tables(rows):
        console.print(table.rich())
    for line in backends(rows):
        console.print(line, markup=False)
    if smoke:
        console.print(SMOKE, style="bold")


def where(rows: Results) -> str:
    """The machine, the versions and the text of some results: everything that one of them was made with."""

    def each(key: str, length: int | None = None) -> str:
        return " and ".join(dict.fromkeys(str(row["machine"][key])[:length] for row in rows))

    return (
        f"{each('device')}, threads: {each('threads')}, torch {each('torch')}, commit {each('commit', 12)}, "
        f"{each('date')}; text: {rows[0]['data']['name']}"
    )


def tables(rows: Results) -> Iterator[Table]:
    """The tables that results allow, size by size."""
    for size in dict.fromkeys(row["size"] for row in rows if row["size"]):
        mine = [row for row in rows if row["size"] == size]
        for make in (_rates, _quality, _scaling, speed, _profile, _robustness):
            if table := make(size, mine):
                yield table


def _rates(size: str, rows: Results) -> Table | None:
    tuned = [row for row in rows if row["kind"] == "tune"]
    if not tuned:
        return None
    rates = sorted({row["training"]["rate"] for row in tuned})
    lines = []
    for name, runs in _by_model(tuned):
        bits = {run["training"]["rate"]: final_bits(run) for run in runs}
        best = min(bits, key=lambda rate: bits[rate])
        edge = " (edge of the grid)" if best in (rates[0], rates[-1]) else ""
        lines.append((name, *(f"{bits[rate]:.3f}" if rate in bits else "" for rate in rates), f"{best:g}{edge}"))
    title = f"{size}: valid bits/byte of short runs, by learning rate"
    return Table(title, ("model", *(f"{rate:g}" for rate in rates), "best"), lines)


def _quality(size: str, rows: Results) -> Table | None:
    trained = [row for row in rows if row["kind"] in ("main", "ablation")]
    if not trained:
        return None
    columns = (
        "model", "test bits/byte", "seeds", "rate", "bytes/patch or token", "FLOPs/byte inclusive", "paper",
        "training FLOPs", "MB read", "seconds",
    )  # fmt: skip
    lines = []
    for name, runs in _by_model(trained):
        first, last = runs[0], runs[0]["curve"][-1]
        lines.append(
            (
                name,
                _spread([run["test"]["clean"]["bits_per_byte"] for run in runs]),
                str(len(runs)),
                f"{first['training']['rate']:g}",
                f"{first['model']['unit_bytes']:.2f}",
                _flops(first["flops"]["inclusive"]),
                _flops(first["flops"]["paper"]),
                _flops(last["training_flops"]),
                f"{last['bytes'] / 1e6:.2f}",
                f"{statistics.mean(run['curve'][-1]['seconds'] for run in runs):.0f}",
            )
        )
    return Table(f"{size}: quality at equal training FLOPs", columns, lines)


def _scaling(size: str, rows: Results) -> Table | None:
    """Fixed-inference scaling: what a larger patch buys, at equal FLOPs per byte."""
    runs = [row for row in rows if row["kind"] == "main" and row["model"]["name"] != TOKEN]
    if not runs:
        return None
    lines = []
    for name, mine in sorted(_by_model(runs), key=lambda item: item[1][0]["model"]["unit_bytes"]):
        first = mine[0]
        latent = first["model"]["config"]["latent"]
        share = sum(flops for part, flops in first["flops"]["components"].items() if part.startswith("latent"))
        lines.append(
            (
                name,
                f"{first['model']['unit_bytes']:.2f}",
                str(latent["num_layers"]),
                str(latent["dim"]),
                f"{share / first['flops']['inclusive']:.0%}",
                _spread([run["test"]["clean"]["bits_per_byte"] for run in mine]),
            )
        )
    columns = ("model", "bytes/patch", "layers", "width", "latent share of FLOPs", "test bits/byte")
    return Table(f"{size}: patch size x latent size at equal FLOPs/byte", columns, lines)


def speed(size: str, rows: Results) -> Table | None:
    measured = [row for row in rows if row["kind"] == "throughput"]
    if not measured:
        return None
    columns = (
        "model", "training kB/s", "realisation", "prefill kB/s", "realisation", "cutting kB/s", "peak MB", "slots used",
        "row used", "token model's row used",
    )  # fmt: skip
    lines = []
    for row in measured:
        m = row["measured"]
        lines.append(
            (
                row["model"]["name"],
                f"{best(m, 'train_bytes_per_second') / 1e3:.1f}",
                f"{realisation(row, 'train_bytes_per_second'):.2f}" if "twin" in row else "",
                f"{best(m, 'prefill_bytes_per_second') / 1e3:.1f}",
                f"{realisation(row, 'prefill_bytes_per_second'):.2f}" if "twin" in row else "",
                f"{m['preparation_bytes_per_second'] / 1e3:.0f}",
                f"{m['peak_memory_bytes'] / 1e6:.0f}",
                f"{m['used_slots']:.1%}" if "used_slots" in m else "",
                f"{m['used_tokens']:.1%}",
                f"{row['twin']['measured']['used_tokens']:.1%}" if "twin" in row else "",
            )
        )
    return Table(
        f"{size}: speed, without the time of cutting text into patches or tokens; FLOP realisation = bytes/s x "
        "FLOPs/byte over the token model's, both measured in turn in one process",
        columns,
        lines,
    )


def best(measured: dict[str, Any], key: str) -> float:
    """The higher of eager and, where it was measured, compiled."""
    return max(measured[key], measured.get("compiled", measured)[key])


def realisation(row: dict[str, Any], key: str) -> float:
    """FLOP realisation: inclusive FLOPs that the BLT gets done in a second, over the token model's.

    The entropy model runs in the loader when training, and its FLOPs do not count there.

    Args:
        row: result of kind "throughput" with a twin.
        key: "train_bytes_per_second" or "prefill_bytes_per_second".
    """

    def flops_per_second(one: dict[str, Any]) -> float:
        flops = one["flops"]
        if key == "train_bytes_per_second":
            per_byte = flops["training"] - flops["components"].get("entropy model", 0.0)
        else:
            per_byte = flops["inclusive"]
        return best(one["measured"], key) * per_byte

    return flops_per_second(row) / flops_per_second(row["twin"])


def realisation_line(scale: str, rows: Results) -> list[str]:
    """FLOP realisation of the BLTs in training, a sentence for README.md; nothing where it was not measured."""
    measured = [row for row in rows if row["kind"] == "throughput" and "twin" in row]
    if not measured:
        return []
    ranges = []
    for size in dict.fromkeys(row["size"] for row in measured):
        values = [realisation(row, "train_bytes_per_second") for row in measured if row["size"] == size]
        ranges.append(f"{min(values):.2f} to {max(values):.2f} ({size} models)")
    fullness = [
        f"{min(shares):.1%} of {what}"
        for what, shares in (
            ("patches", [row["measured"]["used_slots"] for row in measured]),
            ("bytes", [row["measured"]["used_tokens"] for row in measured]),
            ("the token model's tokens", [row["twin"]["measured"]["used_tokens"] for row in measured]),
        )
    ]
    return [
        f"**FLOP realisation** of BLT in training, {scale} scale: {', '.join(ranges)}. That is bytes/s x FLOPs/byte "
        "over those of a token model of equal FLOPs per byte, measured in turn in one process: at 1 every FLOP saved "
        f"is time saved. Rows are packed; of a batch at least {', '.join(fullness)} are used."
    ]


def _profile(size: str, rows: Results) -> Table | None:
    profiled = [row for row in rows if row["kind"] == "profile"]
    if not profiled:
        return None
    measured = profiled[0]["measured"]
    models = measured["blt"], measured["token"]
    parts = sorted({part for model in models for part in model["parts"]}, key=lambda part: -_most(models, part))
    lines = []
    for part in parts:
        cells = []
        for model in models:
            seconds, rate = model["parts"].get(part), model["flops_per_second"].get(part)
            cells.append("" if seconds is None else f"{seconds * 1e3:.1f}")
            cells.append("" if rate is None else f"{rate / 1e9:.0f}")
        lines.append((part, *cells))
    lines.append(("all", *(text for model in models for text in (f"{sum(model['parts'].values()) * 1e3:.1f}", ""))))
    name, threads = profiled[0]["model"]["name"], profiled[0]["machine"]["threads"]
    columns = ("part", f"{name}, ms", "GFLOP/s", "token, ms", "GFLOP/s")
    return Table(f"{size}: where a training step goes, forward and backward, threads: {threads}", columns, lines)


def _most(models: Iterable[dict[str, Any]], part: str) -> float:
    return max(model["parts"].get(part, 0.0) for model in models)


def _robustness(size: str, rows: Results) -> Table | None:
    tested = [row for row in rows if len(row.get("test", {})) > 1]
    if not tested:
        return None
    lines = []
    for name in tested[0]["test"]:
        bits = [row["test"].get(name, {}).get("bits_per_byte") for row in tested]
        lines.append((name, *("" if value is None else f"{value:.3f}" for value in bits)))
    title = f"{size}: test bits/byte of the text as it is, under noise, and of other languages"
    return Table(title, ("text", *(row["model"]["name"] for row in tested)), lines)


def backends(rows: Results) -> Iterator[str]:
    """What fused ops gain over the reference in a training run, a sentence for each size."""
    for row in rows:
        if row["kind"] == "backends":
            m, name = row["measured"], row["model"]["name"]
            yield (
                f"{row['size']}: fused against reference ops over {len(m['fused']['losses'])} steps of {name}: "
                f"losses differ by at most {m['largest_difference']:.2g} nats; a step of the reference takes "
                f"{m['time_ratio']:.2f} times as long"
            )


def _by_model(rows: Results) -> Iterable[tuple[str, Results]]:
    names = dict.fromkeys(row["model"]["name"] for row in rows)
    return [(name, [row for row in rows if row["model"]["name"] == name]) for name in names]


def _spread(values: list[float]) -> str:
    """The mean, and the range over seeds."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} .. {max(values):.3f})"


def _flops(value: float) -> str:
    return f"{value:.3g}"
