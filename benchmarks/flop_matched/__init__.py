"""BLT against token models at equal FLOPs: `python -m benchmarks.flop_matched --help`."""
