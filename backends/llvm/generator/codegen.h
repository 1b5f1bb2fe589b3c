#pragma once
#include <memory>

#include <llvm/IR/Module.h>
#include <llvm/Support/MemoryBuffer.h>
#include <llvm/Target/TargetMachine.h>

#include "cache/status.h"
#include "jit/target.h"

namespace kiln::generator {

/// Makes the architectures known to LLVM; before anything else here, as often as one likes.
void initialise_llvm();

/// LLVM's name of the architecture, Linux for every host: it decides the calling convention and the object format.
/// Empty when this generator does not serve the architecture.
const char* triple_of(Arch arch);

/// For the target and its features, nothing of the host: what LLVM makes is the same everywhere.
Result<std::unique_ptr<llvm::TargetMachine>> make_target_machine(const Target& target);

/// Optimises the module and compiles it to a relocatable object. `entry` is what stays visible to the linker.
Result<std::unique_ptr<llvm::MemoryBuffer>> compile_module(llvm::Module& module, llvm::Function& entry,
                                                           llvm::TargetMachine& machine);

} // namespace kiln::generator
