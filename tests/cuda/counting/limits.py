"""How many warps of a kernel a multiprocessor holds at once."""

from __future__ import annotations

WARP = 32
# Of a multiprocessor of compute capability 9.0 or 10.0 (CUDA C++ Programming Guide, "Compute Capabilities").
WARPS, BLOCKS, QUARTERS = 64, 32, 4
REGISTERS = 65536
SHARED = 228 * 1024  # bytes
SHARED_OF_SYSTEM = 1024  # bytes that each block takes besides its own
# In what steps they are handed out: registers to a warp, bytes to a block.
REGISTER_STEP, SHARED_STEP = 256, 128


def up_to(step: int, n: int) -> int:
    """The first multiple of `step` from n on."""
    return -(-n // step) * step


def resident_warps(registers: int, threads: int, shared: int) -> int:
    """The warps that are resident at once. A block is resident as a whole or not at all.

    A warp lies in one quarter of the multiprocessor and takes its registers there.

    Args:
        registers: of a thread.
        threads: of a block.
        shared: bytes of shared memory of a block.
    """
    warps = up_to(WARP, threads) // WARP
    of_a_quarter = REGISTERS // QUARTERS // up_to(REGISTER_STEP, registers * WARP)
    of_a_block = up_to(SHARED_STEP, shared + SHARED_OF_SYSTEM)
    return warps * min(BLOCKS, WARPS // warps, QUARTERS * of_a_quarter // warps, SHARED // of_a_block)
