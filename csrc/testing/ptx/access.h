// Instructions that access memory.
#pragma once

#include <string>

#include "testing/ptx/lanes.h"

namespace blt::ptx {

// Operands: the elements of the vector, then the address.
void load_global(Warp&, const Instruction&, Mask lanes);
void store_global(Warp&, const Instruction&, Mask lanes);
void load_shared(Warp&, const Instruction&, Mask lanes);
void store_shared(Warp&, const Instruction&, Mask lanes);
void load_parameter(Warp&, const Instruction&, Mask lanes);

// Atomics by what follows "atom." and "red.": "global.add.u32". Operands: the old value (which red lacks), the address,
// then one source or two.
void define_atomics(Opcodes& opcodes);

}  // namespace blt::ptx
