"""`python -m benchmarks matched`: BLT against token models of equal FLOPs.

cpu    a smoke test of everything: about 25 minutes on two cores
gpu    one GPU, about an hour in all; --max-minutes 9 makes pieces
pair   one BLT and one token model, within 3 minutes on two cores

Run it again to go on after an interruption: finished jobs are skipped, training resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from blt_kernels._devices import resolve_device

from ..machine import device_name, device_slug
from ..report.table import console as new_console
from . import results
from .jobs import SCALES, jobs_of
from .run import RESERVED_SECONDS, Bench, OutOfTime
from .summary import SMOKE, summary
from .texts import open_texts


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks matched", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", choices=tuple(SCALES), default="cpu", help="default: cpu")
    parser.add_argument("--data", type=Path, help="text to train on; default: Python's standard library")
    parser.add_argument(
        "--languages", type=Path, help="folder of <language>/test.*; default: --data, or a few sentences"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of <device>/flop_matched/<scale>/<job>.json"
    )
    parser.add_argument("--only", default="", help="only jobs whose name contains this")
    parser.add_argument("--max-minutes", type=float, help="stop training after this long; run again to go on")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:i or auto; default: cuda for the scale gpu, cpu for the others"
    )
    options = parser.parse_args(arguments)
    least = max(RESERVED_SECONDS.values()) / 60 + 1
    if options.max_minutes is not None and not options.max_minutes >= least:  # NaN is not, either
        parser.error(f"--max-minutes: expected at least {least:g}, got {options.max_minutes:g}")
    begin = time.monotonic()

    scale = SCALES[options.scale]
    jobs = [job for job in jobs_of(scale) if options.only in job.name]
    if not jobs:
        parser.error(f"--only {options.only}: no job of this scale has that in its name")
    device = resolve_device(options.device or ("cuda" if scale.name == "gpu" else "cpu"))
    slug = device_slug(device_name(device))
    folder = options.out / slug / results.FOLDER / scale.name
    console = new_console()
    if scale.smoke:
        console.print(SMOKE, style="bold")
    texts = open_texts(
        options.data,
        options.languages,
        folder / ".work",
        valid_bytes=scale.valid_bytes,
        test_bytes=scale.test_bytes,
        document_bytes=scale.document_bytes,
        language_bytes=scale.language_bytes,
    )
    deadline = None if options.max_minutes is None else begin + 60 * options.max_minutes
    bench = Bench(scale, texts, folder, device, console, deadline)
    done = 0
    try:
        for number, job in enumerate(jobs, 1):
            started = time.monotonic()
            if bench.run(job):
                console.print(f"{number}/{len(jobs)} {job.name}: {time.monotonic() - started:.0f} s")
            done += 1
    except (OutOfTime, KeyboardInterrupt):
        console.print(f"{done} of {len(jobs)} jobs are finished; the same command goes on")
    rows = [result for job in jobs if (result := results.read(bench.path(job))) and result["finished"]]
    summary(console, rows)
    console.print(f"{(time.monotonic() - begin) / 60:.1f} minutes; results: {folder}/")
