"""Counts what the compiled kernels do, without a GPU: instructions, pipe cycles, wavefronts, bytes in flight.

nvcc compiles a kernel to PTX, in which every instruction gets a line number of its own (`numbering`). The interpreter
of csrc/testing/ptx executes that PTX and says how often each line ran; ptxas keeps the line numbers when it assembles
the same text, and nvdisasm shows them beside each SASS instruction (`sass`). Together they say how often each SASS
instruction is issued (`work`), and `limits` how many warps are resident. `cases` has the ops at their central shapes,
and `budget` compares all of it with csrc/cuda/budget.json or writes that file.
"""
