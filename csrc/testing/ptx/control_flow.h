// Where the lanes of a warp meet again after a branch.
#pragma once

#include "testing/ptx/kernel.h"

namespace blt::ptx {

// Sets `meeting` of every branch: the first instruction that every way from the branch to the end passes, or the number
// of instructions if there is none.
void find_meetings(Kernel& kernel);

}  // namespace blt::ptx
