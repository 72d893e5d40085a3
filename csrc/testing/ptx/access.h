// Instructions that access memory, and those through which the lanes of a warp talk to each other.
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

// Shuffles: the value, a predicate that says whether the lane asked for exists (may be missing), the source, which
// lane, limits, members. Votes: the result, a predicate, members. Sums over the warp: the result, a source, members.
void define_exchanges(Opcodes& opcodes);

}  // namespace blt::ptx
