#pragma once
#include "jit/ops/int8_mm.h"
#include "jit/target.h"

namespace kiln::portable {

/// How the portable kernels want B. x86 multiplies pairs along k (pmaddwd); NEON's smlal takes one k and a lane of A.
inline int8_mm::PackLayout int8_mm_layout(Arch arch) {
  return {.n_block = 16, .k_block = arch == Arch::x86_64 ? 2 : 1};
}

} // namespace kiln::portable
