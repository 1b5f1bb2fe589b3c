#pragma once
#include "jit/implementation.h"

/// Rows whose kernels are made by LLVM. These functions live in libkiln; LLVM itself is in a shared object of its own,
/// opened only when one of them has to compile.
namespace kiln::portable {

Implementation int8_mm();

Implementation attention_avx512bf16();
/// With f32 multiply-adds.
Implementation attention();

} // namespace kiln::portable
