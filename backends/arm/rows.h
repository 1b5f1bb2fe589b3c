#pragma once
#include "jit/implementation.h"

/// The aarch64 rows of the implementation table. All emission works on any host.
namespace kiln::arm {

Implementation int8_mm_sme();
Implementation int8_mm_sve_i8mm();
Implementation int8_mm_i8mm();
Implementation int8_mm_sve_sdot();
Implementation int8_mm_sdot();
Implementation int8_mm_neon();
Implementation int8_linear_sme();
Implementation int8_linear_sve_i8mm();
Implementation int8_linear_i8mm();
Implementation int8_linear_sve_sdot();
Implementation int8_linear_sdot();
Implementation int8_linear_neon();

} // namespace kiln::arm
