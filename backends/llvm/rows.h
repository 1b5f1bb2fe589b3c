#pragma once
#include <string_view>

#include "jit/implementation.h"

/// Rows whose kernels are made by LLVM. These functions live in libkiln; LLVM itself is in a shared object of its own, opened only
/// when one of them has to compile.
namespace kiln::portable {

Implementation int8_mm();

/// Digest (hex) of the generator's sources and of LLVM's version: the same on every architecture. The shared object must have been
/// built with the same one.
std::string_view generator_id();

} // namespace kiln::portable
