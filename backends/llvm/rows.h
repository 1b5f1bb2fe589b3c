#pragma once
#include "jit/implementation.h"

/// Rows whose kernels are made by LLVM. These functions live in libkiln; LLVM itself is in a shared object of its own,
/// opened only when one of them has to compile.
namespace kiln::portable {

Implementation int8_mm();
Implementation int8_linear();

/// With tdpbf16ps.
Implementation attention_amx();
/// With vdpbf16ps.
Implementation attention_avx512bf16();
/// With bfmmla for many rows, bfdot for few.
Implementation attention_bf16mm();
/// With f32 multiply-adds.
Implementation attention();

} // namespace kiln::portable
