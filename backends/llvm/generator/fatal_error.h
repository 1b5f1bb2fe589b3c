#pragma once
#include <string>

#include <llvm/ADT/STLFunctionalExtras.h>

namespace kiln::generator {

/// Runs `work`, which must not throw. False, with LLVM's message, when LLVM called report_fatal_error in it, which
/// aborts the process by default: control leaves `work` at once, and what it held is leaked, as in LLVM's own crash
/// recovery, since LLVM's state cannot be trusted to be destroyed.
bool survives(llvm::function_ref<void()> work, std::string& message);

} // namespace kiln::generator
