"""`python -m benchmarks <command>` runs the benchmarks. See docs/benchmarks.md.

ops             the ops beside PyTorch and beside a copy of the same bytes
matched         BLT against token models of equal FLOPs
rows            how full packed batches are
tables          what a BLT learns with each optimiser of its hash tables
entropy_models  what tables of n-grams do for an entropy model, and for a BLT on its patches
overhead        what a call costs where there is next to nothing to compute
generation      cached generation beside loops that run the whole model for each byte
report          the pages and plots of committed results, or the tables of others
gpu             build, test, sanitize and measure on a machine with a GPU

`python -m benchmarks <command> --help` names the options of a command.
"""

from __future__ import annotations

import importlib
import os
import sys

# A module is imported when its command is given, so that each needs only what it uses: `gpu` needs torch alone, and not
# even our own library, which it builds.
COMMANDS = {
    "ops": "benchmarks.ops.suite",
    "matched": "benchmarks.flop_matched.command",
    "rows": "benchmarks.rows",
    "tables": "benchmarks.table_optimizers",
    "overhead": "benchmarks.overhead",
    "entropy_models": "benchmarks.entropy_models",
    "generation": "benchmarks.generation",
    "report": "benchmarks.report.pages",
    "gpu": "benchmarks.gpu",
}


def main(arguments: list[str]) -> None:
    """Runs one command. What the outside world causes is one line on stderr, and exit status 1."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    command, *rest = arguments
    if command not in COMMANDS:
        sys.exit(f"benchmarks: expected one of {', '.join(COMMANDS)}, got {command!r}")
    try:
        importlib.import_module(COMMANDS[command]).main(rest)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("BLT_KERNELS_DEBUG") == "1":
            raise
        sys.exit(f"benchmarks {command}: {one_line(error)}")


def one_line(error: Exception) -> str:
    """An error in one line, with its type where the text alone would say too little."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install '.[bench]' in the checkout"
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError) and text:
        return text
    kind = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{kind} (BLT_KERNELS_DEBUG=1 shows the traceback)"


if __name__ == "__main__":
    main(sys.argv[1:])
