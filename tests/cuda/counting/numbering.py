"""PTX in which every instruction has a line number of its own.

The interpreter counts by these numbers, and ptxas -lineinfo writes them beside the SASS that it makes of the same text.
"""

from __future__ import annotations

import re

# A statement is an instruction if it starts with an opcode or its guard; a directive starts with a dot. One line has
# several of them where it comes from inline assembly.
_INSTRUCTION = re.compile(
    r"(?:^|(?<=[;{]))(\s*)((?:@!?%p\d+\s+)?[a-z][\w.:]*(?:\s[^;{}]*(?:\{[^}]*\}[^;{}]*)*)?;)", re.MULTILINE
)


def numbered(text: str) -> str:
    """PTX with `.loc 1 N 0` before every instruction, N counting from 1 through the file."""
    count = 0

    def with_number(match: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return f"\n\t.loc 1 {count} 0\n{match[1]}{match[2]}"

    without_comments = re.sub(r"//.*", "", text)
    return _INSTRUCTION.sub(with_number, without_comments) + '\n\t.file 1 "kernels.ptx"\n'
