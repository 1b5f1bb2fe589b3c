#pragma once
#include <llvm/IR/Function.h>

#include "jit/ops/int8_linear.h"
#include "jit/ops/int8_mm.h"
#include "jit/target.h"

namespace kiln::generator {

/// Adds the kernel of a canonical int8_mm desc to the module: `void (const int8_mm::Call*)`.
/// `target` holds only features that the code may use.
llvm::Function* emit_int8_mm(llvm::Module& module, const KernelDesc& desc, const Target& target);

/// Likewise of an int8_linear desc: `void (const int8_linear::Call*)`.
llvm::Function* emit_int8_linear(llvm::Module& module, const KernelDesc& desc, const Target& target);

/// What the driver must know about that kernel.
int8_mm::Plan int8_mm_plan(const KernelDesc& desc, const Target& target);
int8_linear::Plan int8_linear_plan(const KernelDesc& desc, const Target& target);

} // namespace kiln::generator
