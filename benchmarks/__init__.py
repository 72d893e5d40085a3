"""Speed of the ops beside PyTorch, and of BLT beside token models of equal FLOPs. See docs/benchmarks.md."""

import os

# The profiler that counts memory would say, at every call, that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
