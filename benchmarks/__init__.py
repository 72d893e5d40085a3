"""Speed of the ops beside PyTorch, and of BLT beside token models of equal FLOPs. See docs/benchmarks.md."""

import os

# Without this the profiler that counts memory prints a line whenever it starts or stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
