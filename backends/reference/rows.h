#pragma once
#include "jit/implementation.h"

/// Plain C++: serves where no code may be generated, and is what every other path is compared with.
namespace kiln::reference {

Implementation int8_mm();
Implementation int8_linear();
Implementation int4_mm();
Implementation fp8_block_bmm();
Implementation attention();

} // namespace kiln::reference
