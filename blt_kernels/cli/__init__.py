"""`blt-kernels`, the command line. It needs the extra `train`, except for `blt-kernels doctor`."""

from __future__ import annotations

import importlib.util
import sys

from ..doctor import report


def entry_point() -> None:
    """Runs the command line. `doctor` needs torch and numpy alone; every other command says what is missing."""
    if all(importlib.util.find_spec(package) for package in ("rich", "typer")):
        from .main import main

        main()
    elif sys.argv[1:] == ["doctor"]:
        print(report())
    else:
        sys.exit("blt-kernels: the command line needs more packages: pip install 'blt_kernels[train]'")
