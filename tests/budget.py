"""`python tests/budget.py` writes csrc/cuda/budget.json, and what docs/design.md shows of it.

It needs nvcc and the packages of requirements-dev.txt, but no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "cuda")]


def main() -> None:
    from counting import budget

    from benchmarks.report import pages

    budget.write(budget.found())
    pages.write()


if __name__ == "__main__":
    main()
