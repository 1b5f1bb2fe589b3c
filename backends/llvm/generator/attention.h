#pragma once
#include <llvm/IR/Function.h>

#include "jit/ops/attention.h"
#include "jit/target.h"

namespace kiln::generator {

/// Adds the kernel of a canonical attention desc to the module: `void (const attention::Call*)`.
/// `target` holds only features that the code may use.
llvm::Function* emit_attention(llvm::Module& module, const KernelDesc& desc, const Target& target);

/// What the driver must know about that kernel.
attention::Plan attention_plan(const KernelDesc& desc, const Target& target);

} // namespace kiln::generator
