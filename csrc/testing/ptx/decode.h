// From the text of an instruction to what runs.
#pragma once

#include "testing/ptx/names.h"

namespace blt::ptx {

// "@!%p1 add.s32 %r1, %r2, 3", without its semicolon. A branch has its label in `label`. Errors name the opcode.
Instruction decode(const std::string& text, Names& names, std::string& label);

}  // namespace blt::ptx
