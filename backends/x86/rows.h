#pragma once
#include "jit/implementation.h"

/// The x86-64 rows of the implementation table. All emission works on any host.
namespace kiln::x86 {

Implementation int8_mm_amx();
Implementation int8_mm_avx512vnni();
Implementation int8_mm_avxvnni();
Implementation int8_mm_avx2();
Implementation int8_linear_amx();
Implementation int8_linear_avx512vnni();
Implementation int8_linear_avxvnni();
Implementation int8_linear_avx2();

} // namespace kiln::x86
