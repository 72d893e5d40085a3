"""Speed of the ops beside PyTorch, and of BLT beside token models of equal FLOPs. `python -m benchmarks --help`."""
